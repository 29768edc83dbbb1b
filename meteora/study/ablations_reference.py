"""The model as notebooks 01 and 02 have made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from meteora.study.ablations import Ablations, Variant
from meteora.study.ablations_composites import composite_settings, validation_rows
from meteora.study.measures import Row


def reference_study(ablations: Ablations) -> Iterator[Variant]:
    """The unchanged methods, which the variants are compared with, also on composites."""

    def produce() -> list[Row]:
        rows = ablations.accuracy_rows(ablations.reference, adapters=len(ablations.tasks))
        rows += ablations.gate_rows(ablations.study.model, adapters=len(ablations.tasks))
        return rows + validation_rows(ablations, ablations.study.methods, "reference")

    settings = {"composite": composite_settings(ablations), "items": ablations.settings.composite_items}
    yield Variant("as trained", settings, produce)


STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {"reference": reference_study}
