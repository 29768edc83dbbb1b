"""expand: y + s @ B^T, each element of y read once and written once whatever k is.

With R in the hundreds this is memory-bound on y, so a program's tile is small and wide enough that several are in
flight on a multiprocessor, one loading while another writes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from meteora.kernels.launch import cdiv, overlap_options

FEW_TOKENS = 64  # beyond them cuBLAS is faster, but it can only add into y itself
FEW_TILES = 264  # two for each multiprocessor of an H100


def expand_ref(y: Tensor, s: Tensor, B: Tensor) -> Tensor:
    """y (T, out) + s (T, R) @ B (out, R)^T, in float32."""
    return (y.float() + s.float() @ B.float().t()).to(y.dtype)


@triton.jit(do_not_specialize=["T"])
def _expand(
    y_ptr, out_ptr, s_ptr, b_ptr, T, OUT, R, y_stride, out_stride, s_stride, b_stride,
    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a group of rows of s and a block of B while these are in the cache.
    tiles_t, tiles_o = tl.cdiv(T, BT), tl.cdiv(OUT, BO)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_o)
    rows = tl.minimum(tiles_t - group * GROUP, GROUP)
    inner = program % (GROUP * tiles_o)
    token = ((group * GROUP + inner % rows) * BT + tl.arange(0, BT)).to(tl.int64)
    column = inner // rows * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    inside = (token < T)[:, None] & (column < OUT)[None, :]
    y = y_ptr + token[:, None] * y_stride + column[None, :]
    s = s_ptr + token[:, None] * s_stride + r[None, :]
    b = b_ptr + column.to(tl.int64)[None, :] * b_stride + r[:, None]
    # y and B were there before the kernels of this layer began, so they may be read before those have ended.
    if EARLY:
        total = tl.load(y, mask=inside, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((BT, BO), tl.float32)
    if OVERLAP:
        gdc_wait()
    for start in range(0, R, BR):
        present = start + r < R
        a = tl.load(s, mask=(token < T)[:, None] & present[None, :], other=0.0)
        total = tl.dot(a, tl.load(b, mask=(column < OUT)[None, :] & present[:, None], other=0.0), total,
                       input_precision="ieee")  # fmt: skip
        s += BR
        b += BR
    if not EARLY:
        total += tl.load(y, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + token[:, None] * out_stride + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def expand(y: Tensor, s: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """Write y (T, out) + s (T, >= R) @ B (out, R)^T to ``out`` (T, out), which may be y. Last dimensions are dense."""
    T, OUT = y.shape
    R = B.shape[1]
    if out is y and y.is_cuda and T > FEW_TOKENS:
        return y.addmm_(s[:, :R], B.t())
    if T <= 16:
        BT, BO, BR, group, warps, stages, early = 16, 32, 128, 1, 4, 2, True
    elif cdiv(T, 64) * cdiv(OUT, 128) < FEW_TILES:
        BT, BO, BR, group, warps, stages, early = 64, 64, 64, 8, 4, 3, False
    else:
        BT, BO, BR, group, warps, stages, early = 64, 128, 32, 8, 4, 4, False
    if B.element_size() == 4:  # float32 tiles take twice the shared memory
        BO, stages = min(BO, 64), 2
    _expand[(cdiv(T, BT) * cdiv(OUT, BO),)](
        y, out, s, B, T, OUT, R, y.stride(0), out.stride(0), s.stride(0), B.stride(0),
        BT, BO, BR, group, early, num_warps=warps, num_stages=stages, **overlap_options(y),
    )  # fmt: skip
    return out
