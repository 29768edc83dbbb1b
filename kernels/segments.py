"""Which columns belong to which adapter, as the grouped kernels need to know it: once for each layer, not in each call.

Free of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ALIGNED = 8  # a 16-byte load holds so many 16-bit numbers


@dataclass(frozen=True)
class Segments:
    """Adapter n owns the columns starts[n] .. starts[n + 1] - 1.

    Attributes:
        starts: (N + 1,) int32 on the columns' device, N being one more than the last adapter that has columns.
        widest: the largest rank.
        aligned: whether every segment starts at a multiple of ALIGNED, and ends there.
    """

    starts: Tensor
    widest: int
    aligned: bool

    @property
    def count(self) -> int:
        return len(self.starts) - 1


# column_adapter -> (its version, its segments)
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def segments(column_adapter: Tensor) -> Segments | None:
    """The segments of column_adapter (R,), R > 0; ``None`` where the columns are not in their adapters' order.

    Finding them waits for the GPU, so they are kept as long as the tensor lives and is not written to; a CUDA graph
    that is being captured cannot wait, so there an unknown tensor has none.
    """
    version = 0 if column_adapter.is_inference() else column_adapter._version
    kept = _kept.get(column_adapter)
    if kept is not None and kept[0] == version:
        return kept[1]
    if column_adapter.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    found = _find(column_adapter)
    _kept[column_adapter] = version, found
    return found


def _find(column_adapter: Tensor) -> Segments | None:
    owner = column_adapter.cpu()
    if (owner[1:] < owner[:-1]).any():
        return None
    ranks = torch.bincount(owner)
    ends = torch.cumsum(ranks, 0)
    starts = torch.cat([ends.new_zeros(1), ends])
    return Segments(
        starts=starts.to(column_adapter.device, torch.int32),
        widest=int(ranks.max()),
        aligned=not bool((starts % ALIGNED).any()),
    )
