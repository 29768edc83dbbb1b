"""Every study of notebook 06 by its name, in the order in which they stand there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from meteora.study import (
    ablations_composites,
    ablations_formats,
    ablations_gates,
    ablations_routing,
    ablations_speed,
    ablations_tasks,
)
from meteora.study.ablations import Ablations, Variant, reference_study

STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {
    "reference": reference_study,
    **ablations_routing.STUDIES,
    **ablations_gates.STUDIES,
    **ablations_tasks.STUDIES,
    **ablations_composites.STUDIES,
    **ablations_formats.STUDIES,
    **ablations_speed.STUDIES,
}
