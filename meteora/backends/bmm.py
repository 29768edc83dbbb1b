"""Batched matrix products over weights gathered for every token: the paper's ``bmm-torch``.

Fast for few tokens, and hungry: it holds T * k * r * (in + out) gathered weights. Mixed ranks are padded with zeros.
"""

import torch
from torch import Tensor

from meteora.gating import Routing


def pad_adapters(A: Tensor, B: Tensor, column_adapter: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """Stack A (R, in) to (adapters, r, in) and B (out, R) to (adapters, out, r), r being the largest rank."""
    ranks = torch.bincount(column_adapter, minlength=adapters)
    first = torch.cumsum(ranks, 0) - ranks
    order = torch.argsort(column_adapter, stable=True)
    owner = column_adapter[order]
    slot = torch.arange(len(order), device=order.device) - first[owner]
    rank = int(ranks.max()) if len(order) else 0
    A_stack = A.new_zeros(adapters, rank, A.shape[1]).index_put((owner, slot), A[order])
    B_stack = B.new_zeros(adapters, rank, B.shape[0]).index_put((owner, slot), B.t()[order])
    return A_stack, B_stack.transpose(1, 2)


def mix(y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, routing: Routing) -> Tensor:
    """Add the mixture into y (T, out); see :mod:`meteora.backends` for the arguments."""
    tokens, k = routing.indices.shape
    if tokens == 0:
        return y
    adapters = 1 + max(int(routing.indices.max()), int(column_adapter.max()) if len(column_adapter) else 0)
    A_stack, B_stack = pad_adapters(A, B, column_adapter, adapters)
    chosen = routing.indices.flatten()  # (T * k,)
    s = torch.bmm(A_stack[chosen], x.repeat_interleave(k, 0).unsqueeze(-1))  # (T * k, r, 1)
    update = torch.bmm(B_stack[chosen], s).view(tokens, k, -1)  # (T, k, out)
    return y.add_((update * routing.weights.unsqueeze(-1).to(update.dtype)).sum(dim=1))
