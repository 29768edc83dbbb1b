"""Composites in studies: solved examples in the prompt, methods that notebook 04 leaves out, validation problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.composite import CompositeItem, build_composites
from meteora.study.ablations import Ablations, Variant, methods_of
from meteora.study.ablations_routing import GATED, none_where_unsure, unsure
from meteora.study.baselines import Method
from meteora.study.composite import can_run, composite_rows, predict_composite
from meteora.study.measures import Row
from meteora.study.opening import open_study


def shots_study(ablations: Ablations) -> Iterator[Variant]:
    """Prompts with and without solved examples, in the protocols that have such prompts; the smallest composite."""
    composite = ablations.profile.composite
    size, protocols = min(composite.sizes), [p for p in composite.protocols if p != "sequential"]
    tasks, count = composite.sizes[size], ablations.settings.composite_items
    names = [name for name in ("base", "lora_b", "meteora_top2") if name != "lora_b" or ablations.profile.lora_b]
    for shots in ablations.settings.shots:

        def produce(shots: int = shots) -> list[Row]:
            seed = ablations.profile.seed
            items = build_composites(ablations.workspace.data, tasks, count, shots=shots, seed=seed)
            methods = {name: ablations.study.methods[name] for name in names}
            folder = ablations.answers_folder(f"{shots}-shot")
            return answer_composites(ablations, methods, items, protocols, folder, shots=shots)

        yield Variant(f"{shots}-shot", {"composite": composite_settings(ablations), "items": count}, produce)


def composites_study(ablations: Ablations) -> Iterator[Variant]:
    """The composites of notebook 04, items and protocols alike, answered by the other methods.

    The last variant is MeteoRA at temperature 1, without adapters where its gates are unsure.
    """
    composite, least = ablations.profile.composite, ablations.settings.weights_tested
    for name in ablations.settings.composite_methods:

        def produce(name: str = name) -> list[Row]:
            study = open_study(ablations.workspace, [name], device=ablations.device)
            return answer_all_composites(ablations, study.methods, composite.count, ablations.workspace.predictions)

        yield Variant(name, {"composite": composite_settings(ablations), "xlora": ablations.profile.xlora}, produce)

    def without_unsure() -> list[Row]:
        model, name = ablations.study.model, f"none below {least:g}"
        with unsure(model, least):
            folder = ablations.answers_folder("composites", name)
            rows = answer_all_composites(ablations, methods_of(model, *GATED), composite.count, folder)
        return [row | {"method": none_where_unsure(row["method"])} for row in rows]

    if least is not None:
        yield Variant(f"none below {least:g}", {"composite": composite_settings(ablations)}, without_unsure)


def composite_settings(ablations: Ablations) -> list:
    """What decides the composites of notebook 04, for a variant's settings."""
    composite = ablations.profile.composite
    sizes = [[size, list(tasks)] for size, tasks in composite.sizes.items()]
    counts = [composite.count(protocol) for protocol in composite.protocols]
    return [sizes, counts, composite.shots, composite.protocols, composite.max_new_tokens_per_answer]


def answer_all_composites(
    ablations: Ablations, methods: Mapping[str, Method], count: Callable[[str], int], folder: Path
) -> list[Row]:
    """Rows of composites of every size, in notebook 04's protocols, of each ``count(protocol)``, and with its shots."""
    composite, rows = ablations.profile.composite, []
    most = max(map(count, composite.protocols))
    for tasks in composite.sizes.values():
        items = build_composites(
            ablations.workspace.data, tasks, most, shots=composite.shots, seed=ablations.profile.seed
        )
        for protocol in composite.protocols:
            some = items[: count(protocol)]
            rows += answer_composites(ablations, methods, some, [protocol], folder, shots=composite.shots)
    return rows


def validation_rows(ablations: Ablations, methods: Mapping[str, Method], *names: str) -> list[Row]:
    """Rows of `sequential` composites of validation problems, every size; answers as in `Ablations.answer`."""
    folder, rows = ablations.answers_folder(*names), []
    for tasks in ablations.profile.composite.sizes.values():
        items = build_composites(
            ablations.workspace.data, tasks, ablations.settings.composite_items, shots=0,
            seed=ablations.profile.seed, split="valid",
        )  # fmt: skip
        rows += answer_composites(ablations, methods, items, ["sequential"], folder, shots=0)
    return [row | {"split": "valid"} for row in rows]


def answer_composites(
    ablations: Ablations, methods: Mapping[str, Method], items: Sequence[CompositeItem], protocols: Sequence[str],
    folder: Path, *, shots: int,
) -> list[Row]:  # fmt: skip
    """Rows of the items' answers in these protocols, by the methods that can run there; kept in ``folder``."""
    rows = []
    for protocol in protocols:
        able = {name: method for name, method in methods.items() if can_run(method, protocol)}
        if not able:
            continue
        found = predict_composite(
            able, items, protocol, tokenizer=ablations.study.tokenizer, limits=ablations.composite_limits,
            predictions_dir=folder, batch_size=ablations.profile.composite.batch_size,
            tokens_per_batch=ablations.profile.evaluation.tokens_per_batch,
        )  # fmt: skip
        rows += _totals(composite_rows(items, protocol, found, shots=shots))
    return rows


def _totals(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of `composite.csv`, those over all sub-tasks, in the columns of `ablations.csv`."""
    return [
        {("task" if key == "subtask" else key): value for key, value in row.items()} | {"split": "test"}
        for row in rows
        if row["subtask"] == "ALL"
    ]


STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {
    "shots": shots_study,
    "composites": composites_study,
}
