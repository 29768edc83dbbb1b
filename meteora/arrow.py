"""Gates without training: Arrow (Ostapenko et al. 2024, arXiv 2405.11157), from nothing but the adapters themselves.

An adapter's update B A moves most what lies along its first right singular vector v, so an input with a large |v x| is
taken for one of that adapter's. v is a gate's row; its sign means nothing, which is why such a model takes its logits'
absolute values (``MeteoraConfig.absolute_logits``). The gates of this paper are linear, know signs, and are trained.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from meteora.layer import MeteoraLinear


def prototypes(layer: MeteoraLinear) -> Tensor:
    """The first right singular vector of every adapter's B A, (N, in) float32; zero where an adapter adds nothing.

    With A^T = Q R and B = P S, B A = P (S R^T) Q^T: the decomposition is one of (r, r) matrices.
    """
    owner = layer.column_adapter
    found = torch.zeros_like(layer.gate.weight)
    ranks = torch.bincount(owner, minlength=len(found))
    for rank in ranks[ranks > 0].unique():
        adapters = torch.nonzero(ranks == rank).flatten()  # (n,): all of one rank together
        columns = torch.stack([torch.nonzero(owner == n).flatten() for n in adapters])  # (n, r)
        A, B = layer.lora_A.float()[columns], layer.lora_B.t().float()[columns]  # (n, r, in), (n, r, out)
        Q, R = torch.linalg.qr(A.mT)
        S = torch.linalg.qr(B.mT).R
        _, sizes, V = torch.linalg.svd(S @ R.mT)
        found[adapters] = (V[:, :1] @ Q.mT).squeeze(1) * (sizes[:, :1] > 0)
    return found


@torch.no_grad()
def set_prototypes(layers: Iterable[MeteoraLinear]) -> None:
    """Make every gate's rows the prototypes of its layer's adapters."""
    for layer in layers:
        layer.gate.weight.copy_(prototypes(layer))
