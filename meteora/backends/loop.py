"""One adapter after another, each over the tokens that chose it: the paper's baseline, and the easiest to read."""

import torch
from torch import Tensor

from meteora.gating import Routing


def mix(y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, routing: Routing) -> Tensor:
    """Add the mixture into y (T, out); see :mod:`meteora.backends` for the arguments."""
    for n in column_adapter.unique().tolist():
        columns = column_adapter == n
        tokens, slot = torch.where(routing.indices == n)
        if tokens.numel():
            weight = routing.weights[tokens, slot].unsqueeze(-1).to(x.dtype)
            y.index_add_(0, tokens, weight * ((x[tokens] @ A[columns].t()) @ B[:, columns].t()))
    return y
