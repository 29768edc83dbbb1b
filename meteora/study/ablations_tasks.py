"""Studies of tasks that the gates do not know: one that is added later, and prompts no adapter was trained for."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from data_prep.prepare import load_split, prepare_tasks
from meteora import MeteoraModel
from meteora.batches import Batch, by_task, encode, micro_batches
from meteora.study.ablations import Ablations, Variant, mean_rows, methods_of, row
from meteora.study.baselines import Method
from meteora.study.evaluation import Accuracies, answer_budget
from meteora.study.measures import Example, Row
from meteora.study.routing import routing_rows
from meteora.study.statistics import paired_difference_over_tasks
from meteora.training_loop import response_losses

PROTOTYPE_EXAMPLES = 8  # training examples of each task that a gate row is computed from
SHRINKAGE = 0.01  # of the mean eigenvalue, added to the inputs' second moments
ROUTING_PROMPTS = 16


# One more adapter -----------------------------------------------------------------------------------------------------


def added_study(ablations: Ablations) -> Iterator[Variant]:
    """What an added adapter costs: the gates of all other tasks are trained first, then it is added in four ways.

    Rows of task ``ADDED`` are its own accuracy, those of ``OTHERS`` the mean over the other tasks.
    """
    added, gates = ablations.settings.added_task, ablations.profile.gates
    if added is None:
        return
    others = [task for task in ablations.tasks if task != added]

    def model_without() -> MeteoraModel:
        model = ablations.model_with(others)
        return ablations.trained(f"without {added}", model, ablations.profile.gate_config()).model

    def with_zero_row() -> MeteoraModel:
        model = model_without()
        model.add_adapter(added, ablations.study.adapters[added])
        model.state.untrained.clear()
        return model

    def rows(model: MeteoraModel, name: str, seconds: float | None) -> list[Row]:
        answers = ablations.answer(methods_of(model, "meteora_top2"), ablations.valid, "added", name)
        answers["peft"] = ablations.reference["peft"]
        found = ablations.accuracy_rows({"meteora_top2": answers["meteora_top2"]}, adapters=len(model.adapter_names))
        for method, by_task in answers.items():
            common = {"method": method, "split": "valid", "adapters": len(model.adapter_names)}
            for part, tasks in (("ADDED", [added]), ("OTHERS", others)):
                found += mean_rows({task: by_task[task] for task in tasks if task in by_task}, part, common)
        if seconds is not None:
            found.append(row("training_seconds", seconds, unit="s"))
        return found

    def row_alone() -> list[Row]:
        model = with_zero_row()
        first, *_ = ablations.profile.gate_config(weight_decay=0.0).stages()
        config = dataclasses.replace(first, max_steps=ablations.settings.added_steps)
        with only_rows_trained(model, [len(others)]):
            found = ablations.trained(f"row of {added}", model, config, tasks=ablations.tasks)
        return rows(found.model, "row", found.seconds)

    def closed_form() -> list[Row]:
        model = with_zero_row()
        begin = time.perf_counter()
        shown = {
            task: load_split(ablations.workspace.data, task, "train")[:PROTOTYPE_EXAMPLES] for task in ablations.tasks
        }
        set_row(model, ablations.study.tokenizer, shown, added, max_length=ablations.profile.gate_config().max_length)
        return rows(model, "closed form", time.perf_counter() - begin)

    yield Variant("before", {"gates": gates, "added": added}, lambda: rows(model_without(), "before", None))
    yield Variant("closed form", {"gates": gates, "added": added}, closed_form)
    steps = ablations.settings.added_steps
    yield Variant("its row trained", {"gates": gates, "added": added, "steps": steps}, row_alone)
    yield Variant("all trained anew", {"added": added}, lambda: rows(ablations.study.model, "anew", None))


@contextmanager
def only_rows_trained(model: MeteoraModel, rows: Sequence[int]) -> Iterator[None]:
    """Inside, an optimiser leaves all other rows of the gates as they are: their gradient is zero in every step."""
    gates = {id(layer.gate.weight) for layer in model.layers.values()}

    def keep(optimizer: torch.optim.Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gates and parameter.grad is not None:
                    kept = parameter.grad[list(rows)].clone()
                    parameter.grad.zero_()
                    parameter.grad[list(rows)] = kept

    handle = register_optimizer_step_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


class _Moments:
    """Sums over the inputs of every layer: called by each layer with its inputs and logits."""

    def __init__(self, added: int) -> None:
        self.added = added
        self.sums: dict[torch.nn.Module, dict[str, torch.Tensor]] = defaultdict(dict)
        self.batch: Batch | None = None

    def __call__(self, layer: torch.nn.Module, x: torch.Tensor, logits: torch.Tensor) -> None:
        labels, real = self.batch.token_tasks.flatten(), self.batch.attention_mask.flatten().bool()
        for name, where in (("new", real & (labels == self.added)), ("old", real & (labels != self.added))):
            inputs = x[where].float()
            self._add(layer, f"{name} xx", inputs.T @ inputs)
            self._add(layer, f"{name} x", inputs.sum(0))
            self._add(layer, f"{name} tokens", where.sum())
        # what trained rows say to their own tasks' tokens, and to others
        old, others = logits[real & (labels != self.added)], logits.shape[1] - 2
        own = old.gather(1, labels[real & (labels != self.added)].unsqueeze(1)).sum()
        self._add(layer, "own", own)
        known = torch.arange(logits.shape[1], device=logits.device) != self.added
        self._add(layer, "other", (old[:, known].sum() - own) / max(1, others))

    def _add(self, layer: torch.nn.Module, name: str, value: torch.Tensor) -> None:
        sums = self.sums[layer]
        sums[name] = sums[name] + value if name in sums else value


@torch.no_grad()
def set_row(
    model: MeteoraModel, tokenizer, examples: Mapping[str, Sequence[Example]], task: str, *, max_length: int
) -> None:
    """Give every gate a row for ``task`` without training: a ridge regression on the inputs of a few examples.

    The row's logits are to be those that trained rows have on average: on tokens of ``task`` what they give to their
    own, on other tokens what they give to others', both kinds of tokens weighing the same.

    Args:
        examples: task -> a few rows {prompt, response, task}, for every adapter of the model.
    """
    names = {name: n for n, name in enumerate(model.adapter_names)}
    samples = encode([r for rows in examples.values() for r in rows], names, tokenizer, max_length)
    device = next(model.parameters()).device
    moments = _Moments(names[task])
    for batch in micro_batches(samples, 4096, tokenizer.pad_token_id, device):
        moments.batch = batch
        # each sample by its own adapter, so that no layer sees what a wrong choice in an earlier one would give
        with model.route_to([model.adapter_names[n] for n in batch.tasks]):
            model.state.gate_observer = moments
            try:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            finally:
                model.state.gate_observer = None
    for layer, sums in moments.sums.items():
        new, old = sums["new tokens"], sums["old tokens"]
        second = sums["new xx"] / new + sums["old xx"] / old
        ridge = SHRINKAGE * second.diagonal().mean() * torch.eye(len(second), device=second.device)
        wanted = sums["own"] / old * sums["new x"] / new + sums["other"] / old * sums["old x"] / old
        layer.gate.weight[names[task]] = torch.linalg.solve(second + ridge, wanted)


# Prompts that no adapter was trained for ------------------------------------------------------------------------------


def unknown_study(ablations: Ablations) -> Iterator[Variant]:
    """Tasks left out of the model (``held out``), and tasks that are none of the profile's (``foreign``).

    Rows ``share`` say what the gates choose for their prompts; rows ``response_loss`` are nats per token of the right
    answer, which tell methods apart where none answers in the form that is asked for.
    """
    held_out, foreign = ablations.settings.held_out, ablations.settings.foreign
    gates = ablations.profile.gates

    def methods_against(model: MeteoraModel) -> dict[str, Method]:
        return {"base": ablations.study.methods["base"], **methods_of(model, "meteora_top2")}

    def without() -> list[Row]:
        known = [task for task in ablations.tasks if task not in held_out]
        model = ablations.model_with(known)
        ablations.trained("held out", model, ablations.profile.gate_config())
        examples = {task: ablations.valid[task] for task in held_out}
        methods = methods_against(model) | {"peft": ablations.study.methods["peft"]}
        return _met(ablations, model, methods, examples, "held out")

    def elsewhere() -> list[Row]:
        folder = ablations.folder / "foreign"
        sizes = {"train": 50, "valid": ablations.settings.samples, "test": 0}
        found = prepare_tasks(
            foreign, folder, sizes=sizes, seed=ablations.profile.seed, cache_dir=ablations.profile.cache,
            max_characters=ablations.profile.data.max_characters,
        )  # fmt: skip
        cap, tokenizer = ablations.profile.evaluation.max_new_tokens, ablations.study.tokenizer
        for task in found["tasks"]:
            responses = (example["response"] for example in load_split(folder, task, "train"))
            ablations.limits[task] = answer_budget(tokenizer, responses, cap=cap)
        examples = {task: load_split(folder, task, "valid") for task in found["tasks"]}
        model = ablations.study.model
        return _met(ablations, model, methods_against(model), examples, "foreign")

    if held_out:
        yield Variant("held out", {"gates": gates, "tasks": held_out}, without)
    if foreign:
        yield Variant("foreign", {"tasks": foreign}, elsewhere)


def _met(
    ablations: Ablations, model: MeteoraModel, methods: Mapping[str, Method], examples: Mapping[str, Sequence[Example]],
    name: str,
) -> list[Row]:  # fmt: skip
    answers: Accuracies = ablations.answer(methods, examples, "unknown", name)
    rows = ablations.accuracy_rows(answers, against=None, adapters=len(model.adapter_names))
    if answers["base"]:
        difference = paired_difference_over_tasks(answers["meteora_top2"], answers["base"])
        n = sum(map(len, answers["base"].values()))
        common = {"method": "meteora_top2", "split": "valid", "unit": "minus base"}
        rows.append(row("difference", *difference, n=n, task="ALL", **common))
    for method in methods.values():
        for task, rows_of_task in examples.items():
            loss, tokens = _response_loss(method, ablations.study.tokenizer, rows_of_task, task)
            common = {"method": method.name, "task": task, "split": "valid", "unit": "nats per token"}
            rows.append(row("response_loss", loss, n=tokens, **common))
    prompts = {task: [r["prompt"] for r in rows_of_task[:ROUTING_PROMPTS]] for task, rows_of_task in examples.items()}
    with methods["meteora_top2"].active():
        shares = defaultdict(list)
        for found in routing_rows(model, ablations.study.tokenizer, prompts):
            shares[found["task"], found["adapter"]].append(found["share"])
    for (task, adapter), values in shares.items():
        common = {"method": "meteora_top2", "task": task, "adapter": adapter, "split": "valid"}
        rows.append(row("share", sum(values) / len(values), n=len(prompts[task]), **common))
    return rows


@torch.no_grad()
def _response_loss(method: Method, tokenizer, examples: Sequence[Example], task: str) -> tuple[float, int]:
    """Mean loss of the right answers' tokens, and their number."""
    samples = by_task(encode([{**r, "task": task} for r in examples], {task: 0}, tokenizer, 4096))[0]
    device = next(method.model.parameters()).device
    tokens = sum(sample.response_tokens for sample in samples)
    with method.active(task):
        batches = micro_batches(samples, 8192, tokenizer.pad_token_id, device)
        return sum(response_losses(method.model, batch).sum().item() for batch in batches) / tokens, tokens


STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {"added": added_study, "unknown": unknown_study}
