"""The Triton kernels: gate, top-k, shrink and expand in two or three launches, near the cost of a single LoRA.

Wants a GPU; with ``TRITON_INTERPRET=1`` the same kernels run, slowly, on a CPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from meteora.gating import Routing
from meteora.kernels.launch import MOST_ADAPTERS, on_its_device
from meteora.kernels.packing import pack


INSTALLED = importlib.util.find_spec("triton") is not None


def why_not(device_type: str) -> str | None:
    """Why the kernels cannot run on ``cpu`` or ``cuda``, in a few words; ``None`` if they can."""
    if not INSTALLED:
        return "Triton is not installed"
    if device_type == "cuda":
        return None
    import triton

    return None if triton.knobs.runtime.interpret else "it needs a GPU"


def mix(y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, routing: Routing) -> Tensor:
    """Add the mixture into y (T, out); see :mod:`meteora.backends` for the arguments."""
    from meteora.kernels import grouped_training, ops  # not before it is needed: Triton may be missing

    _check_dtype(y)
    _check_no_tangent(y, x, A, B, routing.weights)
    operands = (y, x, A, B, column_adapter, routing.indices, routing.weights)
    if _needs_gradient(y, x, A, B, routing.weights):
        found = grouped_training.fits(len(x), A, B, column_adapter, routing.indices.shape[1])
        if found is not None:
            return grouped_training.given(y, x, A, B, found, routing.indices, routing.weights)
        return ops.mix(*operands)[0]
    return ops.mix_(*operands)


def _check_dtype(y: Tensor) -> None:
    if y.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"backend 'triton' computes in float32, float16 or bfloat16, not in {y.dtype}; use 'dense'.")
    if y.dtype == torch.bfloat16 and not y.is_cuda:
        raise ValueError("Triton's interpreter multiplies no bfloat16 matrices; use float32 or float16, or 'dense'.")


def _check_no_tangent(*tensors: Tensor) -> None:
    """Dual tensors need no gradient, so that the kernels would write their values and leave out their tangents."""
    if torch.autograd.forward_ad._current_level >= 0 and any(
        torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError("backend 'triton' has no forward-mode derivative; use 'dense'.")


def _check_adapters(number: int) -> None:
    if number > MOST_ADAPTERS:
        raise ValueError(f"backend 'triton' chooses among {MOST_ADAPTERS} adapters at most, not {number}; use 'dense'.")


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def gated_mix(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    column_adapter: Tensor,
    top_k: int,
    temperature: float = 1.0,
    *,
    absolute: bool = False,
    least_share: float = 0.0,
    packed: Tensor | None = None,
    widest: int = 0,
) -> Tensor:
    """Add the mixture that the gate (N, in) float32 chooses into y (T, out); the rest as in :mod:`meteora.backends`.

    Where gradients are needed, a new tensor y + mixture is returned instead, and y stays as it is.

    Args:
        absolute: choose by the logits' absolute values; not where the gate's gradient is needed.
        least_share: of a softmax over all logits, below which the chosen weigh nothing (:func:`meteora.gating.route`).
        packed: ``meteora.kernels.packing.pack(A, gate)``, for callers that keep it; otherwise it is made in each call.
        widest: the largest out of the layers that get x: without gradients, the bits are those of `gated_mixes` then,
            up to 64 tokens.
    """
    from meteora.kernels import grouped_training, ops

    _check_dtype(y)
    _check_no_tangent(y, x, A, B, gate)
    _check_adapters(len(gate))
    if packed is None:
        packed = pack(A.detach(), gate.detach())
    if _needs_gradient(y, x, A, B, gate):
        if absolute:
            raise ValueError("gates that choose by absolute logits have no gradient here; use another backend.")
        found = grouped_training.fits(len(x), A, B, column_adapter, top_k)
        if found is not None:
            return grouped_training.gated(y, x, packed, B, gate, found, top_k, temperature, least_share)
        return ops.gated_mix(y, x, A, B, gate, packed, column_adapter, top_k, temperature, least_share)[0]
    options = {"absolute": absolute, "least_share": least_share, "widest": widest}
    return ops.gated_mix_(y, x, packed, B, column_adapter, len(gate), top_k, temperature, **options)


def for_siblings(tokens: int, column_adapter: Tensor, top_k: int) -> bool:
    """Whether `gated_mixes` would compute it as `gated_mix` does; tokens grouped by adapter it does not know."""
    from meteora.kernels import grouped

    return column_adapter.shape[0] > 0 and grouped.fits(tokens, column_adapter, top_k) is None


@on_its_device
def gated_mixes(
    base: Callable[[], list[Tensor]],
    x: Tensor,
    packed: Tensor,
    Bs: Sequence[Tensor],
    column_adapter: Tensor,
    num_adapters: int,
    top_k: int,
    temperature: float,
    *,
    absolute: bool,
    least_share: float,
) -> list[Tensor]:
    """`gated_mix` of n layers that get the same x (T, in), T > 0, and have the same ``column_adapter``.

    Args:
        base: makes the base layers' outputs, n times (T, out), into which is added.  Bs: n times (out, R).
        packed: (n * C, in), ``meteora.kernels.packing.pack`` of each layer's A and gate, one below the other.
    """
    from meteora.kernels import ops

    _check_dtype(x)
    _check_adapters(num_adapters)
    operands = (column_adapter, num_adapters, top_k, temperature)
    options = {"absolute": absolute, "least_share": least_share}
    # In a CUDA graph, what needs x alone is a branch that runs while the base layers do. Outside, starting a branch
    # takes the CPU longer than the GPU could gain. What the branch allocates is not used anew before this is over, as
    # the next branch begins with a wait for it.
    branch = _side_stream(x.device) if x.is_cuda and torch.cuda.is_current_stream_capturing() else None
    if branch is not None:
        branch.wait_stream(torch.cuda.current_stream(x.device))
    with nullcontext() if branch is None else torch.cuda.stream(branch):
        chosen = ops.choose_siblings(x, packed, len(Bs), max(map(len, Bs)), *operands, **options)
    ys = base()
    if branch is not None:
        torch.cuda.current_stream(x.device).wait_stream(branch)
    # Not early without a branch either: a graph is to hold kernels that were loaded before it was recorded.
    ops.add_siblings(ys, chosen, Bs, *operands, **options, early=False)
    return ys


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
