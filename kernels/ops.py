"""The kernels as operators of torch: with gradients, under ``torch.compile`` and in CUDA graphs.

``gated_mix`` takes tokens and gate and does everything: logits, top-k, weights, shrink, expand. ``mix`` is for a routing
that is given. Each exists twice: functional, with gradients, and in place (``*_``), for inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meteora.kernels import decode, gathered, grouped
from meteora.kernels.expand import expand, expand_ref
from meteora.kernels.launch import dense_rows, on_its_device
from meteora.kernels.packing import padded
from meteora.kernels.route import choose_of_ref, mask, mask_ref, route, route_backward
from meteora.kernels.shrink import mm_float32, shrink


def gated_mix_ref(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor, column_adapter: Tensor, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0,
) -> Tensor:  # fmt: skip
    """What :func:`gated_mix` computes, in plain torch and float32 until the end."""
    options = {"absolute": absolute, "least_share": least_share}
    return mix_ref(y, x, A, B, column_adapter, *choose_of_ref(x.float() @ gate.float().t(), top_k, temperature, **options))


def mix_ref(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """What :func:`mix` computes, in plain torch and float32 until the end."""
    return expand_ref(y, mask_ref(x.float() @ A.float().t(), column_adapter, indices, weights), B)


def _require_dense_rows(y: Tensor) -> None:
    if y.stride(-1) != 1 and y.shape[-1] > 1:
        raise ValueError(f"y has the strides {y.stride()}, but its rows must be dense; give y.contiguous().")
    if y.shape[0] > 1 and y.stride(0) < y.shape[1]:
        raise ValueError(f"y has the strides {y.stride()}, so its rows overlap; give y.contiguous().")


# Inference: adds into y ----------------------------------------------------------------------------------------------


@on_its_device
def _gated_mix_inplace(
    y: Tensor, x: Tensor, packed: Tensor, B: Tensor, column_adapter: Tensor, num_adapters: int, top_k: int,
    temperature: float, absolute: bool, least_share: float, widest: int,
) -> None:  # fmt: skip
    if not x.shape[0] or not column_adapter.shape[0]:
        return
    _require_dense_rows(y)
    x, packed, B = dense_rows(x), dense_rows(packed), dense_rows(B)
    options = {"absolute": absolute, "least_share": least_share}
    found = grouped.fits(x.shape[0], column_adapter, top_k)
    if found is not None:
        grouped.gated(y, x, packed, B, found, num_adapters, top_k, temperature, **options)
        return
    operands, widest = (column_adapter, num_adapters, top_k, temperature), max(widest, y.shape[1])
    chosen = choose_siblings(x, packed, 1, widest, *operands, **options)
    add_siblings([y], chosen, [B], *operands, **options, widest=widest)


def choose_siblings(
    x: Tensor, packed: Tensor, n: int, widest: int, column_adapter: Tensor, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0,
) -> Tensor | gathered.Chosen:  # fmt: skip
    """What n layers that get one input need of it: all of the mixture that is done before their outputs are there.

    Args:
        x: (T, in), T > 0, dense rows.  packed: (n * C, in), the layers' packed weights one below the other.
        widest: the largest out of the layers that get x, for which the way is chosen.
        column_adapter: (R,), R > 0, the same one in all layers.

    Returns:
        What :func:`add_siblings` takes: (splits, T * n, C) float32 products for `decode`, or s (T * n, R'), or what was
        chosen of many columns.
    """
    options = {"absolute": absolute, "least_share": least_share}
    found = gathered.fits(len(x), column_adapter, top_k)
    if found is not None:
        columns = column_adapter.shape[0]
        return gathered.choose(x, packed, n, columns, found, num_adapters, top_k, temperature, **options)
    products = shrink(x, packed, n)
    products = products.view(len(products), -1, len(packed) // n)  # to `route` a token's siblings are tokens in a row
    if decode.fits(len(x), widest, column_adapter.shape[0]):
        return products
    return route(products, column_adapter, num_adapters, top_k, temperature, **options, dtype=x.dtype)[0]


def add_siblings(
    ys: Sequence[Tensor], chosen: Tensor | gathered.Chosen, Bs: Sequence[Tensor], column_adapter: Tensor,
    num_adapters: int, top_k: int, temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0,
    early: bool = True, widest: int = 0,
) -> None:  # fmt: skip
    """Add the mixtures into the layers' outputs, n times (T, out), after :func:`choose_siblings`.

    ``early``: no kernels but those of `choose_siblings` were started since those that made the outputs.
    ``widest``: the largest out of the layers that get x, where they are not all here.
    """
    if isinstance(chosen, gathered.Chosen):
        gathered.add(ys, chosen, Bs, early=early)
    elif chosen.dim() == 3:
        options = {"absolute": absolute, "least_share": least_share, "early": early}
        decode.decode(ys, chosen, Bs, column_adapter, num_adapters, top_k, temperature, **options)
    else:
        expand(ys, chosen, Bs, early=early, widest=widest)


@on_its_device
def _mix_inplace(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor
) -> None:
    if not x.shape[0] or not column_adapter.shape[0]:
        return
    _require_dense_rows(y)
    x, A, B = dense_rows(x), dense_rows(A), dense_rows(B)
    found = grouped.fits(x.shape[0], column_adapter, indices.shape[1])
    if found is not None:
        grouped.given(y, x, A, B, found, indices, weights)
        return
    found = gathered.fits(x.shape[0], column_adapter, indices.shape[1])
    if found is not None:
        gathered.given(y, x, A, B, found, indices, weights)
        return
    expand([y], mask(shrink(x, A), column_adapter, indices, weights, dtype=B.dtype)[0], [B])


gated_mix_op_ = torch.library.custom_op("meteora::gated_mix_", _gated_mix_inplace, mutates_args=("y",))
mix_op_ = torch.library.custom_op("meteora::mix_", _mix_inplace, mutates_args=("y",))
gated_mix_op_.register_fake(lambda *args: None)
mix_op_.register_fake(lambda *args: None)


def gated_mix_(
    y: Tensor, x: Tensor, packed: Tensor, B: Tensor, column_adapter: Tensor, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0, widest: int = 0,
) -> Tensor:  # fmt: skip
    """Add the mixture into y (T, out) and return it; see :func:`gated_mix`.

    ``widest``: the largest out of the layers that get x, so that each computes what `choose_siblings` would for all.
    """
    # Outside of a compiler the operator's dispatcher is only a detour.
    run = gated_mix_op_ if torch.compiler.is_compiling() or type(x) is not Tensor else _gated_mix_inplace
    run(y, x, packed, B, column_adapter, num_adapters, top_k, temperature, absolute, least_share, widest)
    return y


def mix_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """Add the mixture of a given routing into y (T, out) and return it; see :func:`mix`."""
    run = mix_op_ if torch.compiler.is_compiling() or type(x) is not Tensor else _mix_inplace
    run(y, x, A, B, column_adapter, indices, weights)
    return y


# Training: a new tensor, and gradients -------------------------------------------------------------------------------


@torch.library.custom_op("meteora::gated_mix", mutates_args=())
@on_its_device
def gated_mix(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor, packed: Tensor, column_adapter: Tensor, top_k: int,
    temperature: float, least_share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y plus the mixture that the gate chooses, differentiable in y, x, A, B and gate.

    Args:
        y: (T, out), the base layer's output.  x: (T, in).  A: (R, in).  B: (out, R), scaling folded in. One dtype.
        gate: (N, in) float32.  packed: (C, in), :func:`meteora.kernels.packing.pack` of A and gate, which is what is computed with.
        column_adapter: (R,), the adapter that owns each of the R.
        least_share: of a softmax over all logits, below which the chosen weigh nothing.

    Returns:
        out (T, out), and for the backward pass: raw (T, R'), indices (T, k) int32, weights (T, k) float32.
    """
    T, R = len(x), len(column_adapter)
    y, packed, B = dense_rows(y), dense_rows(packed), dense_rows(B)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    if not T or not R:
        out.copy_(y)
        return out, y.new_empty(0, padded(R)), y.new_empty(0, top_k, dtype=torch.int32), y.new_empty(0, top_k).float()
    products = shrink(dense_rows(x), packed)
    options = {"least_share": least_share, "dtype": B.dtype, "keep": True}
    s, *kept = route(products, column_adapter, len(gate), top_k, temperature, **options)
    expand([y], s, [B], [out])
    return out, *kept


@gated_mix.register_fake
def _(y, x, A, B, gate, packed, column_adapter, top_k, temperature, least_share):
    T = x.shape[0] if len(column_adapter) else 0  # len() would tie a compiled graph to this number of tokens
    indices, weights = y.new_empty(T, top_k, dtype=torch.int32), y.new_empty(T, top_k, dtype=torch.float32)
    return torch.empty_like(y, memory_format=torch.contiguous_format), y.new_empty(T, padded(len(A))), indices, weights


@torch.library.custom_op("meteora::mix", mutates_args=())
@on_its_device
def mix(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """y plus the mixture of a given routing, differentiable in y, x, A, B and weights; the rest as in `gated_mix`.

    Args:
        indices: (T, k).  weights: (T, k) float32.

    Returns:
        out (T, out), and for the backward pass raw (T, R').
    """
    y, A, B = dense_rows(y), dense_rows(A), dense_rows(B)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    if not len(x) or not len(column_adapter):
        out.copy_(y)
        return out, y.new_empty(0, padded(len(column_adapter)))
    s, raw = mask(shrink(dense_rows(x), A), column_adapter, indices, weights, dtype=B.dtype, keep=True)
    expand([y], s, [B], [out])
    return out, raw


@mix.register_fake
def _(y, x, A, B, column_adapter, indices, weights):
    raw = y.new_empty(x.shape[0] if len(column_adapter) else 0, padded(len(A)))
    return torch.empty_like(y, memory_format=torch.contiguous_format), raw


@torch.library.custom_op("meteora::route_backward", mutates_args=())
@on_its_device
def route_backward_op(
    ds: Tensor, raw: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor, num_adapters: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return route_backward(ds, raw, column_adapter, indices, weights, num_adapters, temperature)


@route_backward_op.register_fake
def _(ds, raw, column_adapter, indices, weights, num_adapters, temperature):
    R = len(column_adapter)
    width = R if num_adapters is None else padded(R + num_adapters)
    return ds.new_empty(ds.shape[0], width), torch.empty_like(weights if num_adapters is None else weights[:0])


@torch.library.custom_op("meteora::mask", mutates_args=())
@on_its_device
def mask_op(raw: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """raw (T, R') weighted as the forward pass weighted it: its s, which is not kept."""
    return mask(raw.unsqueeze(0), column_adapter, indices, weights, dtype=raw.dtype)[0]


@mask_op.register_fake
def _(raw, column_adapter, indices, weights):
    return torch.empty_like(raw)


def _setup_gated(ctx, inputs, output) -> None:
    _, x, _, B, gate, packed, column_adapter, _, temperature, _ = inputs
    _, raw, indices, weights = output
    ctx.mark_non_differentiable(raw, indices, weights)
    ctx.set_materialize_grads(False)  # those three have no gradients, which would be three tensors of zeros
    ctx.save_for_backward(x, B, packed, column_adapter, raw, indices, weights)
    ctx.num_adapters, ctx.temperature = len(gate), temperature


@once_differentiable
def _backward_gated(ctx, dy, *_) -> tuple:
    x, B, packed, column_adapter, raw, indices, weights = ctx.saved_tensors
    needs_x, needs_A, needs_B, needs_gate = ctx.needs_input_grad[1:5]
    R, N = len(column_adapter), ctx.num_adapters
    if not raw.shape[0]:
        zero = [torch.zeros_like(t) for t in (x, packed[:R], B, packed[:N].float())]
        return dy, *zero, None, None, None, None, None
    dx = dA = dB = dgate = None
    if needs_x or needs_A or needs_gate:
        # A single choice has the weight 1 whatever its logit: nothing comes back to the gate.
        gates = N if indices.shape[1] > 1 else None
        t, _ = route_backward_op(dy @ B, raw, column_adapter, indices, weights, gates, ctx.temperature)
        dx = t @ packed[: t.shape[1]] if needs_x else None
        dA = t[:, :R].t() @ x if needs_A else None
        if needs_gate:
            dgate = mm_float32(t[:, R : R + N].t(), x) if gates else x.new_zeros(N, x.shape[1], dtype=torch.float32)
    if needs_B:
        dB = dy.t() @ mask_op(raw, column_adapter, indices, weights)[:, :R]
    return dy, dx, dA, dB, dgate, None, None, None, None, None


def _setup_mix(ctx, inputs, output) -> None:
    _, x, A, B, column_adapter, indices, weights = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, A, B, column_adapter, indices, weights, output[1])


@once_differentiable
def _backward_mix(ctx, dy, *_) -> tuple:
    x, A, B, column_adapter, indices, weights, raw = ctx.saved_tensors
    needs_x, needs_A, needs_B = ctx.needs_input_grad[1:4]
    needs_weights = ctx.needs_input_grad[6]
    if not raw.shape[0]:
        return dy, *map(torch.zeros_like, (x, A, B)), None, None, torch.zeros_like(weights)
    dx = dA = dB = dweights = None
    if needs_x or needs_A or needs_weights:
        t, dweights = route_backward_op(dy @ B, raw, column_adapter, indices, weights, None, 1.0)
        dx = t @ A if needs_x else None
        dA = t.t() @ x if needs_A else None
    if needs_B:
        dB = dy.t() @ mask_op(raw, column_adapter, indices, weights)[:, : B.shape[1]]
    return dy, dx, dA, dB, None, None, dweights if needs_weights else None


gated_mix.register_autograd(_backward_gated, setup_context=_setup_gated)
mix.register_autograd(_backward_mix, setup_context=_setup_mix)
