"""Which columns belong to which adapter, as the grouped kernels need to know it: once for each layer, not in each call.

Free of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meteora.kernels.kept import Kept
from meteora.kernels.launch import MOST_ADAPTERS

ALIGNED = 8  # a 16-byte load holds so many 16-bit numbers


@dataclass(frozen=True)
class Segments:
    """Adapter n owns the columns starts[n] .. starts[n + 1] - 1.

    Attributes:
        starts: (count + 1,) int32 on the columns' device.
        count: one more than the last adapter that has columns.
        widest, least: the largest rank, and the smallest, of the adapters that are counted.
        aligned: whether every segment starts at a multiple of ALIGNED, and ends there.
    """

    starts: Tensor
    count: int
    widest: int
    least: int
    aligned: bool


def segments(column_adapter: Tensor) -> Segments | None:
    """The segments of column_adapter (R,), R > 0; ``None`` where the columns are not in their adapters' order.

    Nor are there any of more than MOST_ADAPTERS adapters.

    They are found once for each tensor, see :class:`meteora.kernels.kept.Kept`; ``None`` also where they cannot be.
    """
    return _kept(column_adapter)


def _find(column_adapter: Tensor) -> Segments | None:
    owner = column_adapter.cpu()
    if (owner[1:] < owner[:-1]).any():
        return None
    ranks = torch.bincount(owner)
    if len(ranks) > MOST_ADAPTERS:
        return None
    ends = torch.cumsum(ranks, 0)
    starts = torch.cat([ends.new_zeros(1), ends])
    return Segments(
        starts=starts.to(column_adapter.device, torch.int32),
        count=len(ranks),
        widest=int(ranks.max()),
        least=int(ranks.min()),
        aligned=not bool((starts % ALIGNED).any()),
    )


_kept = Kept(_find)
