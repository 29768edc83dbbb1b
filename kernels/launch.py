"""How the kernels are started: what the GPU can do, and sizes that tensors are padded to."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

# torch.mm with a float32 result, and 16-byte loads, need rows that are multiples of this.
ALIGNMENT = 16


def padded(columns: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def gate_parts(dtype: torch.dtype) -> int:
    """Into how many numbers of ``dtype`` a float32 gate weight is split, so that logits keep about 16 bits or more."""
    return 1 if dtype == torch.float32 else 2


def block(size: int, most: int, least: int = 16) -> int:
    """A power of two of at least ``size``, within ``least`` and ``most``."""
    return max(least, min(most, triton.next_power_of_2(size)))


@functools.cache
def _hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def overlaps(tensor: Tensor) -> bool:
    """Whether a kernel may be started before the one it depends on has ended (programmatic dependent launch).

    It then does what needs no result, waits, and goes on: 1 to 2 us less between two small kernels.
    """
    return tensor.is_cuda and _hopper(tensor.device.index)


def overlap_options(tensor: Tensor) -> dict[str, bool]:
    """Launch options of a kernel that waits for the one before it by itself."""
    return {"launch_pdl": True} if overlaps(tensor) else {}
