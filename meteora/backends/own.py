"""Each sample's own adapter, for the training of many side by side: the products are of one adapter's rank.

It is no backend, as it takes adapters of one rank and one of them for all tokens of a sample. Over all adapters' columns
the gradients of A and B would be sums over all tokens for each of them, zeros mostly.
"""

import torch
from torch import Tensor


def mix_own(y: Tensor, x: Tensor, A: Tensor, B: Tensor, own: Tensor) -> Tensor:
    """y (S, L, out) plus the update of each sample's adapter.

    Args:
        x: (S, L, in), S samples of L tokens.  A: (N * r, in).  B: (out, N * r), scaling folded in.  One dtype.
        own: (S, N) of the same dtype, 1 at the sample's adapter, else 0. As a factor it makes the gradients sums in a
            fixed order, which those of picked rows would not be on a GPU.
    """
    N = own.shape[1]
    own_A = (own @ A.view(N, -1)).view(len(own), -1, A.shape[1])  # (S, r, in)
    own_B = (own @ B.t().reshape(N, -1)).view(len(own), -1, B.shape[0])  # (S, r, out)
    return torch.baddbmm(y, x @ own_A.transpose(1, 2), own_B)
