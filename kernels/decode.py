"""decode: route and expand in one kernel, for the one to a few tokens of a decoding step.

A matrix unit would be mostly idle: each program sums one token's partial products, routes it and multiplies its own few
rows of B on ordinary cores. Routing is computed again by every program, which costs less than one more kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from meteora.kernels.expand import expand_ref
from meteora.kernels.launch import block, cdiv, overlap_options
from meteora.kernels.packing import gate_parts
from meteora.kernels.route import largest, route_ref, sort_keys

MOST_COLUMNS = 256  # R, of which a program holds its rows of B in registers
MOST_OUTPUTS = 2**14  # tokens * out: beyond it B is read too often


def fits(tokens: int, out_features: int, columns: int) -> bool:
    """Whether this kernel is the fast one (measured on an H100)."""
    return columns <= MOST_COLUMNS and tokens <= 8 and tokens * out_features <= MOST_OUTPUTS


def decode_ref(
    y: Tensor, products: Tensor, B: Tensor, column_adapter: Tensor, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False,
) -> Tensor:  # fmt: skip
    """What :func:`decode` computes, in plain torch."""
    parts = gate_parts(B.dtype)
    s = route_ref(products, column_adapter, num_adapters, top_k, temperature, absolute=absolute, parts=parts)[0]
    return expand_ref(y, s, B)


@triton.jit(do_not_specialize=["T", "splits"])
def _decode(
    y_ptr, p_ptr, b_ptr, owner_ptr, T, OUT, R, N, C, splits, y_stride, b_stride, inverse_temperature,
    TOP_K: tl.constexpr, PARTS: tl.constexpr, ABSOLUTE: tl.constexpr,
    BO: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BO + tl.arange(0, BO)
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
    row = p_ptr + (split * T + token)[:, None] * C
    there = (split < splits)[:, None]
    parts = tl.zeros((BS, BN), tl.float32)
    for part in tl.static_range(PARTS):
        parts += tl.load(row + R + part * N + n[None, :], mask=there & (n < N)[None, :], other=0.0)
    columns = tl.sum(tl.load(row + c[None, :], mask=there & (c < R)[None, :], other=0.0), 0)
    keys = sort_keys(tl.sum(parts, 0)[None, :], n, N, ABSOLUTE)
    top = tl.max(keys, 1)
    total = tl.zeros((1,), tl.float32)
    column_weight = tl.zeros((1, BR), tl.float32)
    for _ in tl.range(TOP_K, loop_unroll_factor=2):
        value, index, keys = largest(keys, n, BN)
        weight = tl.exp((value - top) * inverse_temperature)
        total += weight
        column_weight += tl.where(owner[None, :] == index[:, None], weight[:, None], 0.0)
    column_weight /= total[:, None]
    s = tl.where(column_weight != 0, columns[None, :] * column_weight, 0.0)
    y += tl.sum(b.to(tl.float32) * s, 1)
    tl.store(y_ptr + token * y_stride + column, y.to(y_ptr.dtype.element_ty), mask=column < OUT)


def decode(
    y: Tensor, products: Tensor, B: Tensor, column_adapter: Tensor, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False,
) -> Tensor:  # fmt: skip
    """Route ``products`` as :func:`meteora.kernels.route.route` does, and add their expansion into y (T, out).

    B (out, R), R at most :data:`MOST_COLUMNS`.
    """
    splits, T, C = products.shape
    OUT, R = B.shape
    BO = 16
    _decode[(cdiv(OUT, BO), T)](
        y, products, B, column_adapter, T, OUT, R, num_adapters, C, splits, y.stride(0), B.stride(0), 1 / temperature,
        TOP_K=top_k, PARTS=gate_parts(B.dtype), ABSOLUTE=absolute, BO=BO, BR=block(R, MOST_COLUMNS),
        BN=block(num_adapters, 1024), BS=block(splits, 64, 1), num_warps=1, **overlap_options(y),
    )  # fmt: skip
    return y


