"""Batched matrix products over weights gathered for every token: the paper's ``bmm-torch``.

Fast for few tokens, and hungry: it holds T * k * r * in gathered numbers, then T * k * r * out. Mixed ranks are filled
up to the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from meteora.gating import Routing


@dataclass(frozen=True)
class Slots:
    """Adapter n's columns are ``columns[n]`` where ``filled[n]`` says so, both (N + 1, r), r being the largest rank.

    The last row, without columns, serves all adapters beyond those that have some.
    """

    columns: Tensor
    filled: Tensor


# column_adapter -> (its version, its slots): finding them waits for the GPU, so it is done once for each layer.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.compiler.disable
def slots(column_adapter: Tensor) -> Slots:
    """The slots of column_adapter (R,), kept as long as the tensor lives and is not written to."""
    version = 0 if column_adapter.is_inference() else column_adapter._version
    kept = _kept.get(column_adapter)
    if kept is None or kept[0] != version:
        kept = _kept[column_adapter] = version, _find(column_adapter)
    return kept[1]


def _find(column_adapter: Tensor) -> Slots:
    owner = column_adapter.cpu()
    ranks = torch.bincount(owner)
    order = owner.argsort(stable=True)
    slot = torch.arange(len(order)) - (ranks.cumsum(0) - ranks).repeat_interleave(ranks)
    columns = torch.zeros(len(ranks) + 1, int(ranks.max()), dtype=torch.int64)
    filled = torch.zeros_like(columns, dtype=torch.bool)
    columns[owner[order], slot] = order
    filled[owner[order], slot] = True
    return Slots(columns.to(column_adapter.device), filled.to(column_adapter.device))


def mix(y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, routing: Routing) -> Tensor:
    """Add the mixture into y (T, out); see :mod:`meteora.backends` for the arguments."""
    tokens, k = routing.indices.shape
    if tokens == 0 or len(column_adapter) == 0:
        return y
    found = slots(column_adapter)
    chosen = routing.indices.clamp(max=len(found.columns) - 1)  # (T, k)
    columns = found.columns[chosen].flatten()  # (T * k * r,)
    s = torch.bmm(A.index_select(0, columns).view(tokens, -1, A.shape[1]), x.unsqueeze(-1)).view(tokens, k, -1)
    s = torch.where(found.filled[chosen], s, 0) * routing.weights.unsqueeze(-1).to(s.dtype)  # (T, k, r)
    # To gather from a column-major B reads its numbers one by one: where it is for many, a copy is soon paid for.
    rows = B.t().contiguous() if len(columns) > len(B.t()) else B.t()
    gathered = rows.index_select(0, columns).view(tokens, -1, B.shape[0])  # (T, k * r, out)
    return y.unsqueeze(1).baddbmm_(s.view(tokens, 1, -1), gathered).squeeze(1)
