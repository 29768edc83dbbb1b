"""The two products of a tile of consecutive tokens that meet few adapters: shrink and expand with all of them.

Where routing comes in runs, as when prompts of one task follow one another, 64 consecutive tokens meet a few adapters
(:class:`meteora.kernels.choose.Lists`). Nothing has to be sorted or gathered then: x is multiplied with all the listed
adapters' rows of A, weighted by what each token gave them, zero for most; and y is read once and written once,
whatever k is. A tile without a list is left to :mod:`meteora.kernels.sort`, which leaves out those that have one, so
that each token is cared for by exactly one of the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from meteora.kernels.choose import Lists
from meteora.kernels.launch import block, cdiv, cut, overlap_options
from meteora.kernels.packing import padded
from meteora.kernels.segments import ALIGNED, Segments
from meteora.kernels.tiles import leave, segment

COLUMNS = 128  # of s, which one program of shrink computes: two adapters of rank 64
PROGRAMS = 200  # of shrink, if all lists are full, which tiles are cut along the inner dimension not to exceed
LONG, LONG_PROGRAMS = 8192, 256  # the inner dimension from which more pieces, and one more launch, paid (measured: 14336)
LEAST_INNER = 512  # that a piece of it has


def shrink_listed_ref(
    x: Tensor, A: Tensor, indices: Tensor, weights: Tensor, lists: Lists, starts: Tensor, width: int
) -> Tensor:
    """What :func:`shrink_listed` computes, in plain torch and float32; zero where that is undefined."""
    blocks, most = lists.adapters.shape
    s = torch.zeros(blocks * lists.height, most, width, device=x.device)
    for tokens, slot, n in _listed(lists, len(x)):
        own = A[starts[n] : starts[n + 1]].float()
        weight = ((indices[tokens] == n) * weights[tokens]).sum(1, keepdim=True)
        s[tokens, slot, : len(own)] = torch.where(weight != 0, x[tokens].float() @ own.t() * weight, 0)
    return s.flatten(1)


def expand_listed_ref(y: Tensor, s: Tensor, B: Tensor, lists: Lists, starts: Tensor) -> Tensor:
    """What :func:`expand_listed` computes, in plain torch and float32 until the end."""
    total, s = y.float().clone(), s.float().unflatten(1, (lists.adapters.shape[1], -1))
    for tokens, slot, n in _listed(lists, len(y)):
        own = B[:, starts[n] : starts[n + 1]].float()
        total[tokens] += s[tokens, slot, : own.shape[1]] @ own.t()
    return total.to(y.dtype)


def _listed(lists: Lists, tokens: int):
    """(a tile's tokens, slot, adapter) of all that is listed."""
    for tile, slots in enumerate(lists.slots.tolist()):
        first = tile * lists.height
        for slot in range(slots):
            yield slice(first, min(first + lists.height, tokens)), slot, int(lists.adapters[tile, slot])


@triton.jit(do_not_specialize=["T"])
def _shrink_listed(
    x_ptr, a_ptr, index_ptr, weight_ptr, out_ptr, slots_ptr, listed_ptr, start_ptr, T, K, x_stride, a_stride, piece,
    width, s_stride, split_stride,
    MOST: tl.constexpr, TOP_K: tl.constexpr, HEIGHT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    tile, split = tl.program_id(1), tl.program_id(2)
    columns = tl.load(slots_ptr + tile, cache_modifier=".cg") * width
    if tl.program_id(0) * BC >= columns:
        leave(OVERLAP)
        return
    # Adapter, and row of A, of each column of s.
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    slot = column // width
    n = tl.load(listed_ptr + tile * MOST + slot, mask=column < columns, other=-1, cache_modifier=".cg")
    start = tl.load(start_ptr + n, mask=n >= 0, other=0)
    own = start + column % width
    present = own < tl.load(start_ptr + n + 1, mask=n >= 0, other=0)
    k = tl.arange(0, BK)
    token = (tile * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    first = split.to(tl.int64) * piece
    # Rows beyond the last token repeat it, and have no weight.
    x = x_ptr + tl.minimum(token, T - 1)[:, None] * x_stride + first + k[None, :]
    a = a_ptr + own.to(tl.int64)[None, :] * a_stride + first + k[:, None]
    total = tl.zeros((HEIGHT, BC), tl.float32)
    for begin in range(first, tl.minimum(first + piece, K), BK):
        if EVEN:
            left = tl.load(x)
            right = tl.load(a, mask=present[None, :], other=0.0)
        else:
            left = tl.load(x, mask=(begin + k)[None, :] < K, other=0.0)
            right = tl.load(a, mask=present[None, :] & ((begin + k)[:, None] < K), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        x += BK
        a += BK
    weight = tl.zeros((HEIGHT, BC), tl.float32)
    for j in tl.static_range(TOP_K):
        choice = token * TOP_K + j
        index = tl.load(index_ptr + choice, mask=token < T, other=-2, cache_modifier=".cg").to(tl.int32)
        given = tl.load(weight_ptr + choice, mask=token < T, other=0.0, cache_modifier=".cg")
        weight += tl.where(index[:, None] == n[None, :], given[:, None], 0.0)
    # As in route: an adapter that a token did not choose adds nothing to it, even where its product is infinite.
    total = tl.where(weight != 0, total * weight, 0.0)
    if OVERLAP:
        # All of the above needs nothing but what choose wrote; what is written may be memory still in use until now.
        gdc_wait()
    out = out_ptr + split.to(tl.int64) * split_stride + token[:, None] * s_stride + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(column < columns)[None, :])


@triton.jit
def _sum_listed(
    partial_ptr, s_ptr, slots_ptr, width, s_stride, split_stride,
    SPLITS: tl.constexpr, HEIGHT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    tile = tl.program_id(1)
    columns = tl.load(slots_ptr + tile, cache_modifier=".cg") * width
    if tl.program_id(0) * BC >= columns:
        leave(OVERLAP)
        return
    if OVERLAP:
        gdc_wait()
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    row = (tile * HEIGHT + tl.program_id(2) * BT + tl.arange(0, BT)).to(tl.int64)
    there = row[:, None] * s_stride + column[None, :]
    total = tl.zeros((BT, BC), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + there, mask=(column < columns)[None, :], other=0.0)
        partial_ptr += split_stride
    tl.store(s_ptr + there, total.to(s_ptr.dtype.element_ty), mask=(column < columns)[None, :])


def shrink_listed(
    x: Tensor, A: Tensor, indices: Tensor, weights: Tensor, lists: Lists, segments: Segments
) -> Tensor:
    """Each token times the rows of A of all adapters that its tile lists, times the weights it gave them.

    Args:
        x: (T, in).  A: (R, in).  One dtype, last dimensions dense.
        indices, weights: (T, k), dense; weights float32.

    Returns:
        s (blocks * height, L * W) of x's dtype, W being the largest rank padded to a multiple of 16: W columns for each
        listed adapter, zero beyond its rank and for tokens that did not choose it. What no tile lists is undefined.
    """
    T, K = x.shape
    blocks, most = lists.adapters.shape
    width = padded(segments.widest)
    wide = x.element_size() == 4
    BC = block(most * width, 64 if wide else COLUMNS)
    BK, stages = (32, 2) if wide else (64, 4)
    chunks = cdiv(most * width, BC)
    programs = LONG_PROGRAMS if K >= LONG else PROGRAMS
    piece, splits = cut(K, max(1, min(8, programs // (blocks * chunks), K // LEAST_INNER)), BK)
    s = x.new_empty(blocks * lists.height, most * width)
    out = s if splits == 1 else x.new_empty(splits, *s.shape, dtype=torch.float32)
    options = {"HEIGHT": lists.height, "BC": BC, "num_warps": 4, **overlap_options(x)}
    _shrink_listed[(chunks, blocks, splits)](
        x, A, indices, weights, out, lists.slots, lists.adapters, segments.starts, T, K, x.stride(0), A.stride(0),
        piece, width, most * width, s.numel(),
        MOST=most, TOP_K=indices.shape[1], BK=BK, EVEN=K % BK == 0, num_stages=stages, **options,
    )  # fmt: skip
    if splits > 1:
        BT = 16
        _sum_listed[(chunks, blocks, lists.height // BT)](
            out, s, lists.slots, width, most * width, s.numel(), SPLITS=splits, BT=BT, **options
        )
    return s


@triton.jit(do_not_specialize=["T"])
def _expand_listed(
    y_ptr, s_ptr, b_ptr, slots_ptr, listed_ptr, start_ptr, T, OUT, y_stride, b_stride, width,
    MOST: tl.constexpr, CHUNKS: tl.constexpr, ALIGNED_BY: tl.constexpr, HEIGHT: tl.constexpr, BO: tl.constexpr,
    BR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    blocks = tl.cdiv(OUT, BO)
    tile = tl.program_id(0) // blocks
    slots = tl.load(slots_ptr + tile, cache_modifier=".cg")
    if slots == 0:
        leave(OVERLAP)
        return
    token = (tile * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    column = tl.program_id(0) % blocks * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    y = y_ptr + token[:, None] * y_stride + column[None, :]
    inside = (token < T)[:, None] & (column < OUT)[None, :]
    # Nobody else writes to these rows of y, so they may be read before the kernel ahead has ended.
    before = tl.load(y, mask=inside, other=0.0)
    if OVERLAP:
        gdc_wait()
    s = s_ptr + token[:, None] * (MOST * width) + r[None, :]
    b = b_ptr + column.to(tl.int64)[None, :] * b_stride + r[:, None]
    total = tl.zeros((HEIGHT, BO), tl.float32)
    # One loop over all adapters' chunks of columns, so that the next one's are loaded while one is multiplied.
    for chunk in range(slots * CHUNKS):
        slot, begin = chunk // CHUNKS, chunk % CHUNKS * BR
        start, rank = segment(start_ptr, tl.load(listed_ptr + tile * MOST + slot), ALIGNED_BY)
        own = begin + r < rank
        left = tl.load(s + slot * width + begin, mask=own[None, :], other=0.0)
        right = tl.load(b + start + begin, mask=own[:, None] & (column < OUT)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    total += before.to(tl.float32)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


def expand_listed(y: Tensor, s: Tensor, B: Tensor, lists: Lists, segments: Segments) -> Tensor:
    """Add each listed tile's s times its adapters' columns of B into its tokens' rows of y.

    Args:
        y: (T, out), added into.  s: as :func:`shrink_listed` gives it.  B: (out, R). Last dimensions are dense.
    """
    T, OUT = y.shape
    blocks, most = lists.adapters.shape
    width = padded(segments.widest)
    BO, BR = 64 if y.element_size() == 4 else 128, block(width, 64)
    _expand_listed[(blocks * cdiv(OUT, BO),)](
        y, s, B, lists.slots, lists.adapters, segments.starts, T, OUT, y.stride(0), B.stride(0), width,
        MOST=most, CHUNKS=cdiv(width, BR), ALIGNED_BY=ALIGNED if segments.aligned else 1, HEIGHT=lists.height,
        BO=BO, BR=BR, num_warps=4, num_stages=2, **overlap_options(y),
    )  # fmt: skip
    return y
