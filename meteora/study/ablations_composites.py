"""Studies of composites: solved examples in the prompt, and the methods that notebook 04 leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from data_prep.composite import build_composites
from meteora.study.ablations import Ablations, Variant
from meteora.study.composite import CompositePredictions, can_run, composite_rows, predict_composite
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
            rows = []
            for protocol in protocols:
                found = predict_composite(
                    {name: ablations.study.methods[name] for name in names}, items, protocol,
                    tokenizer=ablations.study.tokenizer, limits=composite_limits(ablations), batch_size=composite.batch_size,
                    predictions_dir=ablations.workspace.predictions / "ablations" / f"{shots}-shot",
                )  # fmt: skip
                rows += totals(composite_rows(items, protocol, found, shots=shots))
            return rows

        yield Variant(f"{shots}-shot", {"composite": composite_settings(ablations), "items": count}, produce)


def composites_study(ablations: Ablations) -> Iterator[Variant]:
    """The composites of notebook 04, items and protocols alike, answered by the other methods."""
    composite = ablations.profile.composite
    for name in ablations.settings.composite_methods:

        def produce(name: str = name) -> list[Row]:
            study = open_study(ablations.workspace, [name], device=ablations.device)
            rows = []
            for size, tasks in composite.sizes.items():
                items = build_composites(
                    ablations.workspace.data, tasks, composite.items, shots=composite.shots, seed=ablations.profile.seed
                )
                for protocol in composite.protocols:
                    if not can_run(study.methods[name], protocol):
                        continue
                    found: CompositePredictions = predict_composite(
                        study.methods, items, protocol, tokenizer=study.tokenizer, limits=composite_limits(ablations),
                        predictions_dir=ablations.workspace.predictions, batch_size=composite.batch_size,
                        tokens_per_batch=ablations.profile.evaluation.tokens_per_batch,
                    )  # fmt: skip
                    rows += totals(composite_rows(items, protocol, found, shots=composite.shots))
            return rows

        yield Variant(name, {"composite": composite_settings(ablations), "xlora": ablations.profile.xlora}, produce)


def composite_settings(ablations: Ablations) -> list:
    """What decides the composites of notebook 04, for a variant's settings."""
    composite = ablations.profile.composite
    sizes = [[size, list(tasks)] for size, tasks in composite.sizes.items()]
    return [sizes, composite.items, composite.shots, composite.protocols, composite.max_new_tokens_per_answer]


def composite_limits(ablations: Ablations) -> dict[str, int]:
    """Task -> most new tokens of its answer in a composite."""
    return ablations.study.answer_limits(cap=ablations.profile.composite.max_new_tokens_per_answer)


def totals(rows: Sequence[Row]) -> list[Row]:
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
