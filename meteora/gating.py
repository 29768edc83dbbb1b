"""From gate logits to a routing: which adapters each token uses, and how much of each (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Routing:
    """The adapters of T tokens: ``indices`` (T, k) int64 and ``weights`` (T, k) float32, best first."""

    indices: Tensor
    weights: Tensor


def gate_logits(x: Tensor, gate: Tensor, *, absolute: bool = False) -> Tensor:
    """Logits (..., N) of a gate (N, in) for inputs x (..., in), in float32 whatever their dtype.

    In bf16 rounding would decide between adapters whose logits lie close together. With ``absolute`` they are |G x|:
    the rows of a training-free gate are singular vectors, whose sign means nothing (:mod:`meteora.arrow`).
    """
    with torch.autocast(x.device.type, enabled=False):
        logits = torch.nn.functional.linear(x.float(), gate.float())
    return logits.abs() if absolute else logits


def route(logits: Tensor, top_k: int, temperature: float = 1.0, least_share: float = 0.0) -> Routing:
    """Choose the ``top_k`` largest of ``logits`` (T, N); their weights are a softmax over them divided by T.

    All weights of a token are 0 where a softmax over all its logits, whatever T, gives the chosen less than ``least_share``.
    """
    values, indices = logits.topk(top_k, dim=-1)
    weights = torch.softmax(values / temperature, dim=-1)
    if least_share:
        weights = torch.where(chosen_share(logits, indices) < least_share, 0, weights)
    return Routing(indices, weights)


def chosen_share(logits: Tensor, indices: Tensor) -> Tensor:
    """What a softmax over all ``logits`` (T, N) gives the ``indices`` (T, k) together: (T, 1)."""
    return torch.softmax(logits, dim=-1).gather(-1, indices).sum(-1, keepdim=True)


def forced(adapters: Tensor) -> Routing:
    """Every token uses exactly the adapter that ``adapters`` (T,) int64 names: k = 1, weight 1."""
    indices = adapters.unsqueeze(-1)
    return Routing(indices, torch.ones(indices.shape, dtype=torch.float32, device=indices.device))


def gate_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one gate, and its right choices, each summed over the tokens with their weights.

    Args:
        logits: (T, N) float32.  labels: (T,) int64, the index of the right adapter.  weights: (T,) float32, 0 at pads.
    """
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    correct = logits.detach().argmax(-1) == labels
    return (losses * weights).sum(), (correct * weights).sum()
