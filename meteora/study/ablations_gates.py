"""Studies that train gates: by another objective, for fewer adapters or modules, with other seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_prep.splits import stable_rng
from meteora import MeteoraConfig, MeteoraModel
from meteora.adapters import load_adapter
from meteora.study.ablations import Ablations, TrainedGates, Variant, mean_rows, methods_of, row
from meteora.study.ablations_composites import composite_settings, validation_rows
from meteora.study.ablations_routing import require_modules
from meteora.study.artifacts import Workspace
from meteora.study.baselines import build_methods, share_weights
from meteora.study.collection import collect_adapters
from meteora.study.measures import Row


def gates_study(ablations: Ablations) -> Iterator[Variant]:
    """Objectives, weights, learning rates, transcripts: accuracy, also on composites, and what the training took."""
    items = [composite_settings(ablations), ablations.settings.composite_items]
    for name, options in ablations.settings.gates.items():

        def produce(name: str = name, options: Mapping[str, Any] = options) -> list[Row]:
            config = ablations.profile.gate_config(**options)
            found = ablations.trained(f"gates {name}", ablations.model_with(ablations.tasks), config)
            methods = methods_of(found.model, "meteora_top1", "meteora_top2")
            composites = validation_rows(ablations, methods, "gates", name)
            return _of_gates(ablations, found.model, "gates", name) + composites + _cost(found)

        yield Variant(name, {"gates": [ablations.profile.gates, options, *items]}, produce)


def arrow_study(ablations: Ablations) -> Iterator[Variant]:
    """Gates that nothing was trained for (:mod:`meteora.arrow`), in our own model: the mixture is the same."""
    if not ablations.settings.gates:
        return

    def produce() -> list[Row]:
        base = share_weights(ablations.study.plain)
        model = MeteoraModel.from_adapters(base, ablations.study.adapters, gates="arrow").eval()
        return _of_gates(ablations, model, "arrow gates")

    yield Variant("prototypes, nothing trained", {}, produce)


def prompts_study(ablations: Ablations) -> Iterator[Variant]:
    """Gates trained on few examples a task, in as many steps as the profile's own, which stand beside them."""
    for count in sorted(set(ablations.settings.prompts)):

        def produce(count: int = count) -> list[Row]:
            model = ablations.model_with(ablations.tasks)
            found = ablations.trained(f"{count} prompts", model, ablations.profile.gate_config(), prompts=count)
            return _of_gates(ablations, found.model, "prompts", str(count), prompts=count) + _cost(found)

        yield Variant(f"{count} prompts a task", {"gates": ablations.profile.gates}, produce)

    def all_prompts() -> list[Row]:
        count = max(map(len, ablations.examples("train").values()))
        common = {"adapters": len(ablations.tasks), "prompts": count}
        answers = {name: ablations.reference[name] for name in ("meteora_top1", "meteora_top2")}
        return ablations.accuracy_rows(answers, **common) + ablations.gate_rows(ablations.study.model, **common)

    if ablations.settings.prompts:
        yield Variant("all prompts", {}, all_prompts)


def _of_gates(ablations: Ablations, model: MeteoraModel, *names: str, **setting: Any) -> list[Row]:
    """Accuracy of a model of all adapters, whose gates choose one and two, and the gates' own; answers as `answer`."""
    common = {"adapters": len(ablations.tasks), **setting}
    answers = ablations.answer(methods_of(model, "meteora_top1", "meteora_top2"), ablations.valid, *names)
    return ablations.accuracy_rows(answers, **common) + ablations.gate_rows(model, **common)


def _cost(found: TrainedGates) -> list[Row]:
    """What a training of gates took; its memory is known on a GPU alone."""
    rows = [row("training_seconds", found.seconds, unit="s")]
    if found.peak_bytes is not None:
        rows.append(row("training_peak_bytes", found.peak_bytes, unit="bytes"))
    return rows


def nested_tasks(tasks: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` of the tasks, in their order; those of a smaller number are in every larger one."""
    drawn = set(stable_rng(seed, "number of adapters").sample(list(tasks), len(tasks))[:count])
    return [task for task in tasks if task in drawn]


def adapters_study(ablations: Ablations) -> Iterator[Variant]:
    """Does a task suffer from adapters of other tasks beside its own? Gates are trained anew for every number.

    Rows of task ``COMMON`` are means over the tasks that every one of the models has.
    """
    counts = [count for count in sorted(set(ablations.settings.adapters)) if count < len(ablations.tasks)]
    if not counts:
        return
    seed = ablations.profile.seed
    smallest = nested_tasks(ablations.tasks, counts[0], seed)
    for count in [*counts, len(ablations.tasks)]:

        def produce(count: int = count) -> list[Row]:
            tasks = nested_tasks(ablations.tasks, count, seed)
            model, rows = ablations.study.model, []
            if count < len(ablations.tasks):
                config = ablations.profile.gate_config()
                found = ablations.trained(f"{count} adapters", ablations.model_with(tasks), config)
                model, rows = found.model, _cost(found)
            valid = {task: ablations.valid[task] for task in tasks}
            answers = ablations.answer(methods_of(model, "meteora_top2"), valid, "adapters", str(count))
            rows += ablations.accuracy_rows(answers, adapters=count, top_k=2)
            answers["peft"] = {task: values for task, values in ablations.reference["peft"].items() if task in tasks}
            for method, by_task in answers.items():
                shared = {task: values for task, values in by_task.items() if task in smallest}
                rows += mean_rows(shared, "COMMON", {"method": method, "split": "valid", "adapters": count})
            return rows + ablations.gate_rows(model, adapters=count)

        yield Variant(f"{count} adapters", {"gates": ablations.profile.gates, "smallest": smallest}, produce)


def modules_study(ablations: Ablations) -> Iterator[Variant]:
    """Adapters, and with them gates, in some modules alone; the rest of every adapter is left out.

    `peft` is the same part of the right adapter: how much of it was in the modules that are left.
    """
    for name, parts in ablations.settings.modules.items():

        def produce(name: str = name, parts: Sequence[str] = parts) -> list[Row]:
            require_modules(ablations.study.model, name, parts)
            adapters = []
            for task, path in ablations.study.adapters.items():
                whole = load_adapter(task, path)
                kept = {module: w for module, w in whole.modules.items() if module.rpartition(".")[2] in parts}
                adapters.append(dataclasses.replace(whole, modules=kept))
            model = MeteoraModel(share_weights(ablations.study.plain), adapters, MeteoraConfig()).eval()
            found = ablations.trained(f"modules {name}", model, ablations.profile.gate_config())
            answers = ablations.answer(methods_of(model, "peft", "meteora_top2"), ablations.valid, "modules", name)
            return ablations.accuracy_rows(answers, adapters=len(ablations.tasks)) + _cost(found)

        yield Variant(f"adapters in {name}", {"gates": ablations.profile.gates, "modules": parts}, produce)


def seeds_study(ablations: Ablations) -> Iterator[Variant]:
    """Adapters, LoRA-B and gates trained with other seeds from the same examples, on the test split as in Table 1.

    Adapters that the profile takes from a folder stay what they are; the gates alone are then trained anew.
    """
    names = ["peft", "meteora_top1", "meteora_top2"] + (["lora_b"] if ablations.profile.lora_b else [])

    def rows(answers: Mapping, seed: int) -> list[Row]:
        return ablations.accuracy_rows(answers, split="test", against=None, adapters=len(ablations.tasks))

    def as_trained() -> list[Row]:
        methods = {name: ablations.study.methods[name] for name in names}
        return rows(ablations.answer(methods, ablations.study.tests, "seeds", "own"), ablations.profile.seed)

    if ablations.settings.seeds:
        shared = {"test_samples": ablations.profile.evaluation.test_samples}
        yield Variant(f"seed {ablations.profile.seed}", shared, as_trained)
    for seed in ablations.settings.seeds:

        def produce(seed: int = seed) -> list[Row]:
            model, single = _trained_with(ablations, seed)
            methods = build_methods(names, model, single)
            return rows(ablations.answer(methods, ablations.study.tests, "seeds", str(seed)), seed)

        profile = ablations.profile
        trained = [dataclasses.asdict(part) for part in (profile.adapters, profile.lora_b) if part is not None]
        yield Variant(f"seed {seed}", {**shared, "trained": trained, "gates": profile.gates}, produce)


def _trained_with(ablations: Ablations, seed: int) -> tuple[MeteoraModel, MeteoraModel | None]:
    """The model, and that of the single adapters, as notebooks 01 and 02 make them with another seed."""
    profile = ablations.profile
    some = ("base", "peft")
    other = dataclasses.replace(
        profile, seed=seed, lora_f=None, ablations=None,
        evaluation=dataclasses.replace(profile.evaluation, methods=some),
        composite=dataclasses.replace(profile.composite, methods=some),
    )  # fmt: skip
    workspace = Workspace(other, root=ablations.folder / f"seed-{seed}")
    train, valid = ablations.examples("train"), ablations.examples("valid")
    base = share_weights(ablations.study.plain)
    found = collect_adapters(workspace, base, ablations.study.tokenizer, train, valid)
    model = MeteoraModel.from_adapters(share_weights(ablations.study.plain), found.tasks).eval()
    ablations.trained(f"seed {seed}", model, other.gate_config())
    single = MeteoraModel.from_adapters(share_weights(ablations.study.plain), found.single) if found.single else None
    return model, single


STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {
    "gates": gates_study,
    "arrow": arrow_study,
    "prompts": prompts_study,
    "adapters": adapters_study,
    "modules": modules_study,
    "seeds": seeds_study,
}
