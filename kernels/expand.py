"""expand: y + s @ B^T, each element of y read once and written once whatever k is.

With R in the hundreds this is memory-bound on y, so a program's tile is small and wide enough that several are in
flight on a multiprocessor, one loading while another writes.

One launch does for several layers of one input ("siblings"), whose outputs lie apart: a program belongs to one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from meteora.kernels.launch import cdiv, overlap_options

FEW_TOKENS = 64  # beyond them cuBLAS is faster, but it can only add into y itself
WIDE = 8192  # columns of y, beyond which there are programs enough, each of which reads all of s
FEW_TILES = 264  # two for each multiprocessor of an H100


def expand_ref(y: Tensor, s: Tensor, B: Tensor) -> Tensor:
    """y (T, out) + s (T, R) @ B (out, R)^T, in float32."""
    return (y.float() + s.float() @ B.float().t()).to(y.dtype)


@triton.jit(do_not_specialize=["T"])
def _expand(
    ys, results, bs, outs, y_strides, out_strides, b_strides, s_ptr, T, R, s_stride, SIBLINGS: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    program, tiles_t = tl.program_id(0), tl.cdiv(T, BT)
    y_ptr, out_ptr, b_ptr, OUT = ys[0], results[0], bs[0], outs[0]
    y_stride, out_stride, b_stride = y_strides[0], out_strides[0], b_strides[0]
    for i in tl.static_range(1, SIBLINGS):
        before = tiles_t * tl.cdiv(OUT, BO)
        later = program >= before
        program = tl.where(later, program - before, program)
        s_ptr = tl.where(later, s_ptr + s_stride, s_ptr)
        y_ptr, out_ptr = tl.where(later, ys[i], y_ptr), tl.where(later, results[i], out_ptr)
        b_ptr, OUT = tl.where(later, bs[i], b_ptr), tl.where(later, outs[i], OUT)
        y_stride, out_stride = tl.where(later, y_strides[i], y_stride), tl.where(later, out_strides[i], out_stride)
        b_stride = tl.where(later, b_strides[i], b_stride)
    # Neighbouring programs share a group of rows of s and a block of B while these are in the cache.
    tiles_o = tl.cdiv(OUT, BO)
    group = program // (GROUP * tiles_o)
    rows = tl.minimum(tiles_t - group * GROUP, GROUP)
    inner = program % (GROUP * tiles_o)
    token = ((group * GROUP + inner % rows) * BT + tl.arange(0, BT)).to(tl.int64)
    column = inner // rows * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    inside = (token < T)[:, None] & (column < OUT)[None, :]
    y = y_ptr + token[:, None] * y_stride + column[None, :]
    s = s_ptr + token[:, None] * SIBLINGS * s_stride + r[None, :]
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


def expand(
    ys: Sequence[Tensor], s: Tensor, Bs: Sequence[Tensor], results: Sequence[Tensor] | None = None, *,
    early: bool = True, widest: int = 0,
) -> None:  # fmt: skip
    """Write y + s B^T of each of n siblings to its result, by default y itself.

    Args:
        ys, results: n times (T, out).  Bs: n times (out, R).
        s: (T * n, >= R), a token's n siblings in a row.  Last dimensions are dense.
        early: no kernels but those that made s, which may still run, were started after those of the ys.
        widest: the largest out of the layers that get one input, also where each is here alone: up to FEW_TOKENS it gets,
            to the bit, what it would get with the others.
    """
    n, T, R = len(ys), ys[0].shape[0], Bs[0].shape[1]
    outs = tuple(B.shape[0] for B in Bs)
    if results is None and s.is_cuda and T > FEW_TOKENS:
        for i, (y, B) in enumerate(zip(ys, Bs, strict=True)):
            y.addmm_(s[i::n, :R], B.t())
        return
    if T <= 16:
        BT, BO, BR, group, warps, stages, y_first = 16, 32, 128, 1, 4, 2, True
    elif T <= FEW_TOKENS and max(widest, *outs) <= WIDE:
        BT, BO, BR, group, warps, stages, y_first = 64, 16, 128, 1, 4, 4, True
    elif T <= FEW_TOKENS:
        BT, BO, BR, group, warps, stages, y_first = 64, 32, 64, 1, 4, 4, True
    elif cdiv(T, 64) * cdiv(max(outs), 128) < FEW_TILES:
        BT, BO, BR, group, warps, stages, y_first = 64, 64, 64, 8, 4, 3, False
    else:
        BT, BO, BR, group, warps, stages, y_first = 64, 128, 32, 8, 4, 4, False
    if s.element_size() == 4:  # float32 tiles take twice the shared memory
        BO, stages = min(BO, 64), 2
    results = results or ys
    _expand[(cdiv(T, BT) * sum(cdiv(out, BO) for out in outs),)](
        tuple(ys), tuple(results), tuple(Bs), outs, *(tuple(t.stride(0) for t in ts) for ts in (ys, results, Bs)),
        s, T, R, s.stride(0), n,
        BT, BO, BR, group, y_first, num_warps=warps, num_stages=stages, **overlap_options(s, early),
    )  # fmt: skip
