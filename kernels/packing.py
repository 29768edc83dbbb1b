"""The layout of what is multiplied with x: all adapters' A and the gate in one matrix. Free of Triton."""

from __future__ import annotations

import torch
from torch import Tensor

# Matrix products and 16-byte loads want rows of a multiple of this many numbers.
ALIGNMENT = 16


def padded(columns: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def gate_parts(dtype: torch.dtype) -> int:
    """Into how many numbers of ``dtype`` a float32 gate weight is split, so that logits keep about 16 bits or more."""
    return 1 if dtype == torch.float32 else 2


def pack(A: Tensor, gate: Tensor) -> Tensor:
    """All that is multiplied with x, in one matrix (C, in) of A's dtype: A (R, in), the gate (N, in), zeros.

    A 16-bit dtype would round the float32 gate to 8 or 11 bits and flip close decisions, so it comes in two parts, the
    rounded weights and what rounding took away. C is a multiple of 16.
    """
    rounded = gate.to(A.dtype)
    rows = [A, rounded]
    if gate_parts(A.dtype) == 2:
        rows.append((gate.float() - rounded.float()).to(A.dtype))
    count = sum(map(len, rows))
    return torch.cat([*rows, A.new_zeros(padded(count) - count, A.shape[1])])
