"""Ways to compute the same mixture, y += sum_j w_j * B_j (A_j x), and the choice between them.

All have one signature::

    mix(y (T, out), x (T, in), A (R, in), B (out, R), column_adapter (R,), routing) -> y

They add into ``y`` in place and return it. ``A`` holds the rows of all adapters, ``B`` their columns with the scaling
folded in, R being the sum of the ranks, and ``column_adapter`` (int64) says which adapter owns which of the R. An
adapter without columns may be chosen: it adds zero. ``routing.indices`` (T, k), ``routing.weights`` (T, k). y, x, A and
B are of one dtype and on one device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from meteora.backends import bmm, dense, loop
from meteora.config import check_backend

Mix = Callable[..., torch.Tensor]
MIXERS: dict[str, Mix] = {"loop": loop.mix, "bmm": bmm.mix, "dense": dense.mix}


def get_mix(backend: str) -> Mix:
    """The ``mix`` function of a backend's name.

    ``auto`` is ``dense`` today: of the plain-torch backends it is the fastest at every size measured, on CPU and GPU.

    Raises:
        ValueError: for a name that is none.
        NotImplementedError: for ``triton``, whose kernels this version does not have.
    """
    if check_backend(backend) == "auto":
        return MIXERS["dense"]
    if backend not in MIXERS:
        raise NotImplementedError(f"backend {backend!r} is not part of this version; use 'auto', or {sorted(MIXERS)}.")
    return MIXERS[backend]
