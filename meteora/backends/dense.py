"""All adapters at once: two matrix products with a mask between them.

The R columns of all adapters together are one small product. Zeroing the columns of the adapters that a token did not
choose, and weighting those of the ones it did, costs less than gathering weights per token ever saves, as long as R
stays in the hundreds.
"""

from torch import Tensor

from meteora.gating import Routing


def column_weights(routing: Routing, column_adapter: Tensor) -> Tensor:
    """The weight (T, R) float32 of every column for every token; 0 for the adapters it did not choose."""
    return _weights(_chosen(routing, column_adapter), routing)


def _chosen(routing: Routing, column_adapter: Tensor) -> Tensor:
    """(T, k, R): whether a choice is the column's adapter."""
    return routing.indices.unsqueeze(-1) == column_adapter


def _weights(chosen: Tensor, routing: Routing) -> Tensor:
    return (chosen * routing.weights.unsqueeze(-1)).sum(dim=1)


def mix(y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, routing: Routing) -> Tensor:
    """Add the mixture into y (T, out); see :mod:`meteora.backends` for the arguments."""
    chosen = _chosen(routing, column_adapter)
    # Not by their weight of zero alone: where an adapter that was not chosen overflows, that would be NaN.
    s = (x @ A.t()).masked_fill(~chosen.any(dim=1), 0)  # (T, R)
    s = s * _weights(chosen, routing).to(s.dtype)
    return y.addmm_(s, B.t())
