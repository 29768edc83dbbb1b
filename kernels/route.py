"""route: from the products of shrink to the weighted columns that expand takes, and back for the gradients.

One program holds a token's logits and all its columns, so the top-k, the softmax and the mask need no further pass:
columns of adapters that were not chosen become zero, the others are multiplied by their adapter's weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from meteora.kernels.launch import MOST_ADAPTERS, block, cdiv, overlap_options
from meteora.kernels.packing import gate_parts, padded


def route_ref(
    products: Tensor, column_adapter: Tensor, num_adapters: int, top_k: int, temperature: float = 1.0, *,
    absolute: bool = False, least_share: float = 0.0, parts: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What :func:`route` computes, in plain torch; columns are not padded."""
    summed, R = products.sum(0), len(column_adapter)
    logits = summed[:, R : R + parts * num_adapters].unflatten(1, (parts, num_adapters)).sum(1)
    indices, weights = choose_of_ref(logits, top_k, temperature, absolute=absolute, least_share=least_share)
    return mask_ref(summed[:, :R], column_adapter, indices, weights), summed[:, :R], indices, weights


def choose_of_ref(
    logits: Tensor, top_k: int, temperature: float, *, absolute: bool = False, least_share: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The indices and weights (T, k) that logits (T, N) give, in plain torch."""
    logits = logits.abs() if absolute else logits
    values, indices = logits.topk(top_k)
    share = torch.softmax(logits, -1).gather(1, indices).sum(1, keepdim=True)
    return indices, torch.where(share < least_share, 0, torch.softmax(values / temperature, -1))


def mask_ref(raw: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What :func:`mask` computes, in plain torch; columns are not padded."""
    chosen = indices.unsqueeze(-1) == column_adapter  # (T, k, R)
    column_weight = (chosen * weights.unsqueeze(-1)).sum(1)
    return torch.where(chosen.any(1), raw * column_weight, 0)


@triton.jit
def sort_keys(logits, n, N, ABSOLUTE: tl.constexpr):
    """What the top-k compares: NaN above everything, so that it reaches the output; padding below everything."""
    if ABSOLUTE:
        logits = tl.abs(logits)
    keys = tl.where(logits == logits, logits, float("inf"))
    return tl.where((n < N)[None, :], keys, float("-inf"))


@triton.jit
def largest(keys, n, SIZE: tl.constexpr):
    """The largest of each row and its index, the lowest one in a tie; and the keys without it."""
    value = tl.max(keys, 1)
    index = tl.min(tl.where(keys == value[:, None], n[None, :], SIZE), 1)
    return value, index, tl.where(n[None, :] == index[:, None], float("-inf"), keys)


@triton.jit
def unsure(chosen, keys, top, least_share):
    """Whether a row's ``chosen`` exponentials are less than ``least_share`` of all together; NaN is not, so that it is seen."""
    return chosen < least_share * tl.sum(tl.exp(keys - top[:, None]), 1)


@triton.jit(do_not_specialize=["T"])
def _route(
    p_ptr, owner_ptr, s_ptr, raw_ptr, index_ptr, weight_ptr, T, R, N, C, s_stride,
    inverse_temperature, least_share,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, GIVEN: tl.constexpr, ABSOLUTE: tl.constexpr,
    UNSURE: tl.constexpr, KEEP: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = (token < T)[:, None]
    c = tl.program_id(1) * BR + tl.arange(0, BR)
    n = tl.arange(0, BN)
    slot = tl.arange(0, BK)
    owner = tl.load(owner_ptr + c, mask=c < R, other=-1).to(tl.int32)
    if OVERLAP:
        gdc_wait()
    columns = tl.zeros((BT, BR), tl.float32)
    logits = tl.zeros((BT, BN), tl.float32)
    row = p_ptr + token[:, None] * C
    for _ in tl.static_range(SPLITS):
        columns += tl.load(row + c[None, :], mask=live & (c < R)[None, :], other=0.0).to(tl.float32)
        if not GIVEN:
            for part in tl.static_range(PARTS):
                logits += tl.load(row + R + part * N + n[None, :], mask=live & (n < N)[None, :], other=0.0)
        row += T.to(tl.int64) * C

    # First the exponentials of the chosen logits, then, once their sum is known, the weights.
    column_weight = tl.zeros((BT, BR), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    chosen = tl.zeros((BT,), tl.float32)  # what the chosen exponentials add up to at temperature 1
    indices = tl.zeros((BT, BK), tl.int32)
    weights = tl.zeros((BT, BK), tl.float32)
    keys = sort_keys(logits, n, N, ABSOLUTE)
    every, top = keys, tl.max(keys, 1)
    for j in tl.range(TOP_K, loop_unroll_factor=2):
        if GIVEN:
            index = tl.load(index_ptr + token * TOP_K + j, mask=token < T, other=0).to(tl.int32)
            weight = tl.load(weight_ptr + token * TOP_K + j, mask=token < T, other=0.0)
        else:
            value, index, keys = largest(keys, n, BN)
            weight = tl.exp((value - top) * inverse_temperature)
            total += weight
            if UNSURE:
                chosen += tl.exp(value - top)
            indices = tl.where(slot[None, :] == j, index[:, None], indices)
            weights = tl.where(slot[None, :] == j, weight[:, None], weights)
        column_weight += tl.where(owner[None, :] == index[:, None], weight[:, None], 0.0)
    if not GIVEN:
        if UNSURE:
            total = tl.where(unsure(chosen, every, top, least_share), float("inf"), total)  # so that all weights are zero
        column_weight /= total[:, None]
        weights /= total[:, None]
    # A column whose adapter was not chosen is zero even where its product is infinite.
    s = tl.where(column_weight != 0, columns * column_weight, 0.0)
    inside = live & (c < s_stride)[None, :]
    tl.store(s_ptr + token[:, None] * s_stride + c[None, :], s.to(s_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(raw_ptr + token[:, None] * s_stride + c[None, :], columns.to(raw_ptr.dtype.element_ty), mask=inside)
        if not GIVEN:
            if tl.program_id(1) == 0:
                there = live & (slot < TOP_K)[None, :]
                tl.store(index_ptr + token[:, None] * TOP_K + slot[None, :], indices, mask=there)
                tl.store(weight_ptr + token[:, None] * TOP_K + slot[None, :], weights, mask=there)


def _launch_route(
    products, column_adapter, s, raw, indices, weights, num_adapters, top_k, parts, temperature, least_share, **flags
):  # fmt: skip
    splits, T, C = products.shape
    R, columns = column_adapter.shape[0], s.shape[1]
    BT, warps = (1, 1) if T <= 16 else (1, 2) if T <= 64 else (4, 4)
    BR = block(columns, 256)
    grid = (cdiv(T, BT), cdiv(columns, BR))
    _route[grid](
        products, column_adapter, s, raw, indices, weights, T, R, num_adapters, C, columns, 1 / temperature,
        least_share, UNSURE=least_share > 0, SPLITS=splits, TOP_K=top_k, PARTS=parts, BT=BT, BR=BR,
        BN=block(num_adapters, MOST_ADAPTERS), BK=block(top_k, 1024, 1), num_warps=warps, **flags, **overlap_options(s),
    )  # fmt: skip


def route(
    products: Tensor, column_adapter: Tensor, num_adapters: int, top_k: int, temperature: float = 1.0, *,
    absolute: bool = False, least_share: float = 0.0, dtype: torch.dtype, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose each token's adapters, and weight its columns.

    Args:
        products: (splits, T, C) float32, as :func:`meteora.kernels.shrink.shrink` gives them for packed weights: R
            columns of the adapters, then one or two parts of N gate columns whose sum is the logits, then padding.
        column_adapter: (R,), the adapter that owns each column.
        absolute: compare and weigh the logits' absolute values.
        least_share: of a softmax over all logits, below which the chosen weigh nothing (:func:`meteora.gating.route`).
        keep: also return what the backward pass needs.

    Returns:
        s (T, R'), R' = R padded to a multiple of 16: products of the chosen adapters times their weights, else zero.
        raw (T, R'): the products themselves.  indices (T, k) int32, weights (T, k) float32, best first.
        The last three are empty unless ``keep``.
    """
    splits, T, C = products.shape
    R = column_adapter.shape[0]
    empty = products.new_empty
    s = empty((T, padded(R)), dtype=dtype)
    kept = T if keep else 0
    raw = empty((kept, padded(R)), dtype=dtype)
    indices, weights = empty((kept, top_k), dtype=torch.int32), empty((kept, top_k))
    _launch_route(
        products, column_adapter, s, raw, indices, weights, num_adapters, top_k, gate_parts(dtype), temperature,
        least_share, GIVEN=False, ABSOLUTE=absolute, KEEP=keep,
    )  # fmt: skip
    return s, raw, indices, weights


def mask(
    products: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor, *, dtype: torch.dtype,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight each token's columns by a routing that is given: indices (T, k), weights (T, k) float32.

    ``products`` (splits, T, C), C >= R. Returns s and raw as :func:`route` does.
    """
    T, R = products.shape[1], len(column_adapter)
    s = products.new_empty((T, padded(R)), dtype=dtype)
    raw = products.new_empty((T if keep else 0, padded(R)), dtype=dtype)
    indices, weights = indices.contiguous(), weights.contiguous()
    _launch_route(
        products, column_adapter, s, raw, indices, weights, 1, indices.shape[1], 1, 1.0, 0.0,
        GIVEN=True, ABSOLUTE=False, KEEP=keep,
    )  # fmt: skip
    return s, raw


def route_backward_ref(
    ds: Tensor, raw: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor, num_adapters: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ds weighted (T, R), the logits' gradient (T, N) and the weights' (T, k), in plain torch; without padding."""
    chosen = indices.unsqueeze(-1) == column_adapter  # (T, k, R)
    dweights = (chosen * (ds.float() * raw.float()).unsqueeze(1)).sum(-1)
    inner = dweights - (weights * dweights).sum(-1, keepdim=True)
    dlogits = torch.zeros(len(ds), num_adapters, device=ds.device)
    dlogits.scatter_(1, indices.long(), weights * inner / temperature)
    return mask_ref(ds, column_adapter, indices, weights), dlogits, dweights


@triton.jit(do_not_specialize=["T"])
def _route_backward(
    ds_ptr, raw_ptr, owner_ptr, index_ptr, weight_ptr, out_ptr, dweight_ptr, T, R, N, ds_stride, raw_stride,
    out_stride, inverse_temperature,
    TOP_K: tl.constexpr, GATED: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = token < T
    n = tl.arange(0, BN)
    slot = tl.arange(0, BK)
    # dL/dw_j = <ds, raw> over adapter j's columns: no (T, k, out) tensor is ever made.
    dweights = tl.zeros((BT, BK), tl.float32)
    mean = tl.zeros((BT,), tl.float32)
    for j in tl.range(TOP_K, loop_unroll_factor=2):
        index = tl.load(index_ptr + token * TOP_K + j, mask=live, other=0).to(tl.int32)
        weight = tl.load(weight_ptr + token * TOP_K + j, mask=live, other=0.0)
        dot = tl.zeros((BT,), tl.float32)
        for start in range(0, R, BR):
            c = start + tl.arange(0, BR)
            owner = tl.load(owner_ptr + c, mask=c < R, other=-1).to(tl.int32)
            own = live[:, None] & (owner[None, :] == index[:, None])
            ds = tl.load(ds_ptr + token[:, None] * ds_stride + c[None, :], mask=own, other=0.0).to(tl.float32)
            raw = tl.load(raw_ptr + token[:, None] * raw_stride + c[None, :], mask=own, other=0.0).to(tl.float32)
            dot += tl.sum(ds * raw, 1)
        mean += weight * dot
        dweights = tl.where(slot[None, :] == j, dot[:, None], dweights)
    if GATED:
        dlogits = tl.zeros((BT, BN), tl.float32)
        for j in tl.range(TOP_K, loop_unroll_factor=2):
            index = tl.load(index_ptr + token * TOP_K + j, mask=live, other=0).to(tl.int32)
            weight = tl.load(weight_ptr + token * TOP_K + j, mask=live, other=0.0)
            dot = tl.sum(tl.where(slot[None, :] == j, dweights, 0.0), 1)
            gradient = weight * (dot - mean) * inverse_temperature
            dlogits += tl.where(n[None, :] == index[:, None], gradient[:, None], 0.0)
        gate_columns = live[:, None] & (R + n < out_stride)[None, :]
        gate_out = out_ptr + token[:, None] * out_stride + R + n[None, :]
        tl.store(gate_out, dlogits.to(out_ptr.dtype.element_ty), mask=gate_columns)
    else:
        chosen = live[:, None] & (slot < TOP_K)[None, :]
        tl.store(dweight_ptr + token[:, None] * TOP_K + slot[None, :], dweights, mask=chosen)
    for start in range(0, R, BR):
        c = start + tl.arange(0, BR)
        owner = tl.load(owner_ptr + c, mask=c < R, other=-1).to(tl.int32)
        column_weight = tl.zeros((BT, BR), tl.float32)
        for j in tl.range(TOP_K, loop_unroll_factor=2):
            index = tl.load(index_ptr + token * TOP_K + j, mask=live, other=0).to(tl.int32)
            weight = tl.load(weight_ptr + token * TOP_K + j, mask=live, other=0.0)
            column_weight += tl.where(owner[None, :] == index[:, None], weight[:, None], 0.0)
        inside = live[:, None] & (c < R)[None, :]
        ds = tl.load(ds_ptr + token[:, None] * ds_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        weighted = tl.where(column_weight != 0, ds * column_weight, 0.0)
        out = out_ptr + token[:, None] * out_stride + c[None, :]
        tl.store(out, weighted.to(out_ptr.dtype.element_ty), mask=inside)


def route_backward(
    ds: Tensor, raw: Tensor, column_adapter: Tensor, indices: Tensor, weights: Tensor, num_adapters: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients behind the mask.

    Args:
        ds: (T, R), the gradient of s.  raw: (T, >= R), as :func:`route` kept it.
        indices, weights: (T, k), the forward pass's.
        num_adapters: N if the gate chose; ``None`` if the routing was given.

    Returns:
        gradient (T, C'): R columns of ds weighted as the forward pass weighted s, then, if the gate chose, the N
        gradients of the logits, then zeros up to a multiple of 16, so that one product with the packed weights gives
        the gradient of x. And the weights' gradient (T, k) float32 if the routing was given, else an empty tensor.
    """
    T, R = len(ds), len(column_adapter)
    gated = num_adapters is not None
    width = padded(R + (num_adapters or 0)) if gated else R
    out = ds.new_empty(T, width)
    dweights = weights.new_empty(0 if gated else T, weights.shape[1])
    if T:
        BT = 4
        _route_backward[(cdiv(T, BT),)](
            ds, raw, column_adapter, indices.contiguous(), weights.contiguous(), out, dweights, T, R,
            num_adapters or 1, ds.stride(0), raw.stride(0), out.stride(0), 1 / temperature,
            TOP_K=indices.shape[1], GATED=gated, BT=BT, BR=block(R, 256), BN=block(width - R, 2 * MOST_ADAPTERS),
            BK=block(indices.shape[1], 1024, 1), num_warps=4,
        )  # fmt: skip
    return out, dweights
