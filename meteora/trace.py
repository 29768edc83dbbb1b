"""A record of what the gates saw and chose, layer by layer and token by token."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from meteora.gating import Routing


class Trace:
    """Gate logits, chosen adapters and weights of every adapted module during ``with model.trace() as trace``.

    The keys are the modules' dotted names in the base model. Several forward passes, such as those of ``generate``, are
    concatenated along the tokens. Pad tokens are included.

    Attributes:
        logits: name -> (batch, tokens, N) float32, before the temperature.
        indices: name -> (batch, tokens, k) int64, by descending logit; under ``route_to`` k is 1. Of equal logits, such as
            those of untrained gates, any may come first, and without a trace Triton's kernels may take others.
        weights: name -> (batch, tokens, k) float32.
    """

    def __init__(self) -> None:
        self._steps: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def record(self, name: str, batch: torch.Size, logits: Tensor, routing: Routing) -> None:
        """Append one forward pass of module ``name``; ``batch`` is its input's shape without the features."""
        shape = batch if len(batch) == 2 else (1, -1)
        parts = (logits, routing.indices, routing.weights)
        step = tuple(part.detach().reshape(*shape, part.shape[-1]) for part in parts)
        if self._steps[name]:
            first, (batch, k) = self._steps[name][0][1].shape, (step[1].shape[0], step[1].shape[-1])
            if first[0] != batch:
                raise ValueError(
                    f"this trace holds batches of {first[0]} and now one of {batch}; open a new trace for each batch size."
                )
            if first[-1] != k:
                raise ValueError(
                    f"this trace holds {first[-1]} chosen adapters a token and now {k}; open a new trace for each top-k, "
                    "and for route_to."
                )
            held, now = self._steps[name][0][0].shape[-1], logits.shape[-1]
            if held != now:
                raise ValueError(
                    f"this trace holds the logits of {held} adapters, and the model has {now} now; open a new trace after "
                    "add_adapter."
                )
        self._steps[name].append(step)

    def _joined(self, part: int) -> dict[str, Tensor]:
        return {name: torch.cat([step[part] for step in steps], dim=1) for name, steps in self._steps.items()}

    @property
    def logits(self) -> dict[str, Tensor]:
        return self._joined(0)

    @property
    def indices(self) -> dict[str, Tensor]:
        return self._joined(1)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self._joined(2)
