"""How the kernels are started: the sizes of their blocks, and what the GPU can do."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


MOST_ADAPTERS = 1024  # whose logits, or counts, a program holds at once


# Triton has both of these too, as functions that kernels may call, and they take a microsecond each time.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block(size: int, most: int, least: int = 16) -> int:
    """A power of two of at least ``size``, within ``least`` and ``most``."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def cut(size: int, pieces: int, step: int) -> tuple[int, int]:
    """Cut an inner dimension into about so many pieces, each a multiple of ``step``: (a piece's size, their number)."""
    piece = cdiv(cdiv(size, pieces), step) * step
    return piece, cdiv(size, piece)


def on_its_device(function: Callable) -> Callable:
    """The function, run with its first tensor's device as the current one, on which Triton starts kernels."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(*args, **kwargs)

    return run


def dense_rows(x: Tensor) -> Tensor:
    """x with a last dimension of stride 1, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


def overlaps(tensor: Tensor) -> bool:
    """Whether a kernel may be started before the one it depends on has ended (programmatic dependent launch).

    It then does what needs no result, waits, and goes on: 1 to 2 us less between two small kernels.
    """
    return tensor.is_cuda and _hopper(tensor.device.index)


_OVERLAP = {"OVERLAP": True, "launch_pdl": True}
_NO_OVERLAP = {"OVERLAP": False}


def overlap_options(tensor: Tensor, early: bool = True) -> dict[str, bool]:
    """The argument OVERLAP, and launch options, of a kernel that waits for the one before it by itself.

    Not ``early``: the kernel needs more than the one before it, so it begins when all that has ended.
    """
    return _OVERLAP if early and overlaps(tensor) else _NO_OVERLAP
