"""decode: route and expand in one kernel, for the one to a few tokens of a decoding step.

A matrix unit would be mostly idle: each program sums one token's partial products, routes it and multiplies its own few
rows of B on ordinary cores. Routing is computed again by every program, which costs less than one more kernel.

One launch does for several layers of one input ("siblings"), whose outputs lie apart: a program belongs to one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from meteora.kernels.expand import expand_ref
from meteora.kernels.launch import MOST_ADAPTERS, block, cdiv, overlap_options
from meteora.kernels.packing import gate_parts
from meteora.kernels.route import largest, route_ref, sort_keys, unsure

MOST_COLUMNS = 256  # R, of which a program holds its rows of B in registers
MOST_OUTPUTS = 2**14  # tokens * out: beyond it B is read too often


def fits(tokens: int, out_features: int, columns: int) -> bool:
    """Whether this kernel is the fast one (measured on an H100); ``out_features`` of the widest sibling."""
    return columns <= MOST_COLUMNS and tokens <= 8 and tokens * out_features <= MOST_OUTPUTS


def decode_ref(
    y: Tensor, products: Tensor, B: Tensor, column_adapter: Tensor, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0,
) -> Tensor:  # fmt: skip
    """What :func:`decode` computes, in plain torch."""
    parts = gate_parts(B.dtype)
    options = {"absolute": absolute, "least_share": least_share, "parts": parts}
    s = route_ref(products, column_adapter, num_adapters, top_k, temperature, **options)[0]
    return expand_ref(y, s, B)


@triton.jit(do_not_specialize=["T", "splits"])
def _decode(
    ys, bs, outs, y_strides, b_strides, p_ptr, owner_ptr, T, R, N, C, splits,
    inverse_temperature, least_share,
    SIBLINGS: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, ABSOLUTE: tl.constexpr, UNSURE: tl.constexpr,
    BO: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    y_ptr, b_ptr, OUT, y_stride, b_stride = ys[0], bs[0], outs[0], y_strides[0], b_strides[0]
    for i in tl.static_range(1, SIBLINGS):
        before = tl.cdiv(OUT, BO)
        later = tile >= before
        tile = tl.where(later, tile - before, tile)
        p_ptr = tl.where(later, p_ptr + C, p_ptr)
        y_ptr, b_ptr = tl.where(later, ys[i], y_ptr), tl.where(later, bs[i], b_ptr)
        OUT = tl.where(later, outs[i], OUT)
        y_stride, b_stride = tl.where(later, y_strides[i], y_stride), tl.where(later, b_strides[i], b_stride)
    token = tl.program_id(1).to(tl.int64)
    column = tile * BO + tl.arange(0, BO)
    c = tl.arange(0, BR)
    n = tl.arange(0, BN)
    split = tl.arange(0, BS)
    owner = tl.load(owner_ptr + c, mask=c < R, other=-1).to(tl.int32)
    b = tl.load(
        b_ptr + column.to(tl.int64)[:, None] * b_stride + c[None, :],
        mask=(column < OUT)[:, None] & (c < R)[None, :], other=0.0,
    )  # fmt: skip
    y = tl.load(y_ptr + token * y_stride + column, mask=column < OUT, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    row = p_ptr + (split * T + token)[:, None] * SIBLINGS * C
    there = (split < splits)[:, None]
    parts = tl.zeros((BS, BN), tl.float32)
    for part in tl.static_range(PARTS):
        parts += tl.load(row + R + part * N + n[None, :], mask=there & (n < N)[None, :], other=0.0)
    columns = tl.sum(tl.load(row + c[None, :], mask=there & (c < R)[None, :], other=0.0), 0)
    keys = sort_keys(tl.sum(parts, 0)[None, :], n, N, ABSOLUTE)
    every, top = keys, tl.max(keys, 1)
    total = tl.zeros((1,), tl.float32)
    chosen = tl.zeros((1,), tl.float32)  # what the chosen exponentials add up to at temperature 1
    column_weight = tl.zeros((1, BR), tl.float32)
    for _ in tl.range(TOP_K, loop_unroll_factor=2):
        value, index, keys = largest(keys, n, BN)
        weight = tl.exp((value - top) * inverse_temperature)
        total += weight
        if UNSURE:
            chosen += tl.exp(value - top)
        column_weight += tl.where(owner[None, :] == index[:, None], weight[:, None], 0.0)
    if UNSURE:
        total = tl.where(unsure(chosen, every, top, least_share), float("inf"), total)  # so that all weights are zero
    column_weight /= total[:, None]
    s = tl.where(column_weight != 0, columns[None, :] * column_weight, 0.0)
    y += tl.sum(b.to(tl.float32) * s, 1)
    tl.store(y_ptr + token * y_stride + column, y.to(y_ptr.dtype.element_ty), mask=column < OUT)


def decode(
    ys: Sequence[Tensor], products: Tensor, Bs: Sequence[Tensor], column_adapter: Tensor, num_adapters: int,
    top_k: int, temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0, early: bool = True,
) -> None:  # fmt: skip
    """Route ``products`` as :func:`meteora.kernels.route.route` does, and add their expansion into the outputs.

    Args:
        ys: n outputs (T, out), their last dimensions dense.
        products: (splits, T * n, C), a token's n siblings in a row.
        Bs: n times (out, R), R at most :data:`MOST_COLUMNS`.
        early: no kernels but those that made ``products``, which may still run, were started after those of the ys.
    """
    n = len(ys)
    splits, rows, C = products.shape
    R = Bs[0].shape[1]
    outs = tuple(B.shape[0] for B in Bs)
    BO = 16
    _decode[(sum(cdiv(out, BO) for out in outs), rows // n)](
        tuple(ys), tuple(Bs), outs, tuple(y.stride(0) for y in ys), tuple(B.stride(0) for B in Bs),
        products, column_adapter, rows // n, R, num_adapters, C, splits, 1 / temperature, least_share,
        SIBLINGS=n, TOP_K=top_k, PARTS=gate_parts(Bs[0].dtype), ABSOLUTE=absolute, UNSURE=least_share > 0,
        BO=BO, BR=block(R, MOST_COLUMNS), BN=block(num_adapters, MOST_ADAPTERS), BS=block(splits, 64, 1), num_warps=1,
        **overlap_options(products, early),
    )  # fmt: skip
