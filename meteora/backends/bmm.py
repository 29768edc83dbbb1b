"""Batched matrix products over weights gathered for every token: the paper's ``bmm-torch``.

Fast for few tokens, and hungry: it holds T * k * r * in gathered numbers, then T * k * r * out, or both where gradients
are needed, and for many tokens a copy of B. Mixed ranks are filled up to the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meteora.gating import Routing
from meteora.kernels.kept import Kept


@dataclass(frozen=True)
class Slots:
    """Adapter n's columns are ``columns[n]`` where ``filled[n]`` says so, both (N + 1, r), r being the largest rank.

    The last row, without columns, serves all adapters beyond those that have some. What is not filled repeats a column
    of the adapter's own, if it has one: weighed with zero, another adapter's could still bring what is not finite.
    """

    columns: Tensor
    filled: Tensor


def slots(column_adapter: Tensor) -> Slots:
    """The slots of column_adapter (R,), R > 0, found once for each tensor, see :class:`meteora.kernels.kept.Kept`.

    Raises:
        RuntimeError: in a CUDA graph that is being captured, for a tensor that was not met before.
    """
    if torch.compiler.is_compiling():
        return _find(column_adapter)  # part of the graph; what is kept cannot be
    found = _kept(column_adapter)
    if found is None:
        raise RuntimeError("backend 'bmm' cannot begin in a CUDA graph: call the layer once before it is captured.")
    return found


def _find(column_adapter: Tensor) -> Slots:
    adapters = 1 + int(column_adapter.max())
    ranks = torch.bincount(column_adapter, minlength=adapters + 1)
    first = torch.cumsum(ranks, 0) - ranks
    order = torch.argsort(column_adapter, stable=True)
    slot = torch.arange(int(ranks.max()), device=order.device).expand(adapters + 1, -1)
    filled = slot < ranks.unsqueeze(1)
    return Slots(order[(first.unsqueeze(1) + slot * filled).clamp(max=len(order) - 1)], filled)


_kept = Kept(_find)


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
    # To gather columns reads numbers one by one: where it is for many, a copy is soon paid for. A compiler does not know.
    many = torch.compiler.is_compiling() or len(columns) > B.shape[1]
    rows = B.t().contiguous() if many else B.t()
    gathered = rows.index_select(0, columns).view(tokens, -1, B.shape[0])  # (T, k * r, out)
    return y.unsqueeze(1).baddbmm_(s.view(tokens, 1, -1), gathered).squeeze(1)
