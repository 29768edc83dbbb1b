"""Ways to compute the same mixture, y += sum_j w_j * B_j (A_j x), and the choice between them.

All have one signature::

    mix(y (T, out), x (T, in), A (R, in), B (out, R), column_adapter (R,), routing) -> y

They add into ``y`` in place and return it; where a gradient is needed, ``triton`` returns a new tensor instead. ``A``
holds the rows of all adapters, ``B`` their columns with the scaling folded in, R being the sum of the ranks, and
``column_adapter`` (int64) says which adapter owns which of the R. An adapter without columns may be chosen: it adds
zero. ``routing.indices`` (T, k), ``routing.weights`` (T, k). y, x, A and B are of one dtype and on one device.

A backend that computes the gate as well also has ``gated_mix``; see :func:`get_gated_mix`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from meteora.backends import bmm, dense, loop, triton
from meteora.config import check_backend

logger = logging.getLogger(__name__)

Mix = Callable[..., torch.Tensor]
MIXERS: dict[str, Mix] = {"loop": loop.mix, "bmm": bmm.mix, "dense": dense.mix, "triton": triton.mix}


@torch.compiler.assume_constant_result
def resolve(backend: str, device_type: str) -> str:
    """The backend that is used on ``cpu`` or ``cuda`` for a name that may be ``auto``.

    ``auto`` is ``triton`` on a GPU and ``dense`` elsewhere, whatever the sizes, so that a compiled model needs no other
    rule. On an H200 ``triton`` was the fastest in all of 532 settings (results/smollm2/metrics/benchmark.csv). On a CPU
    ``bmm`` may be the faster one for few tokens of many adapters; name it there. Where Triton is missing on a GPU
    ``auto`` falls back to ``dense``, and says so once.

    Raises:
        ValueError: for a name that is none.
        RuntimeError: for ``triton`` where it cannot run.
    """
    if check_backend(backend) not in ("auto", "triton"):
        return backend
    if backend == "auto" and device_type != "cuda":
        return "dense"
    reason = triton.why_not(device_type)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(
            f"backend 'triton' cannot run on {device_type!r}, as {reason}; use 'auto', or set TRITON_INTERPRET=1 to "
            "try the kernels on a CPU."
        )
    _say_once(f"backend 'auto' uses 'dense' on this GPU, as {reason}.")
    return "dense"


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def get_mix(backend: str, device_type: str | None = None) -> Mix:
    """The ``mix`` function of a backend's name, on ``cpu`` or ``cuda`` (default: a GPU, if there is one).

    Raises:
        ValueError, RuntimeError: as :func:`resolve` does.
    """
    return MIXERS[resolve(backend, device_type or _default_device())]


def get_gated_mix(backend: str, device_type: str | None = None) -> Mix | None:
    """The backend's function that computes gate, top-k and mixture together, or ``None`` if it has none.

    ``gated_mix(y, x, A, B, gate (N, in) float32, column_adapter, top_k, temperature=1.0, absolute=False, least_share=0.0)
    -> y + mixture``, in place unless gradients are needed.
    """
    resolved = resolve(backend, device_type or _default_device())
    return triton.gated_mix if resolved == "triton" else None
