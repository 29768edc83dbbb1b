"""Each token's own adapter, for the training of many side by side.

It is no backend, as it takes adapters of one rank and one of them for a token, whose gradients are wanted.
"""

import torch
from torch import Tensor


def mix_own(y: Tensor, x: Tensor, A: Tensor, B: Tensor, own: Tensor) -> Tensor:
    """y (..., out) plus the update of each token's adapter.

    All adapters' columns are computed for every token, and its own are kept: that costs less than to gather each
    token's own weights, and gradients are sums in a fixed order.

    Args:
        x: (..., in).  A: (N * r, in).  B: (out, N * r), scaling folded in.  One dtype.
        own: (..., N) of the same dtype, 1 at the token's adapter, else 0.
    """
    hidden = (x @ A.t()).unflatten(-1, (own.shape[-1], -1)) * own.unsqueeze(-1)
    update = torch.addmm(y.flatten(0, -2), hidden.flatten(-2).flatten(0, -2), B.t())
    return update.view(y.shape)
