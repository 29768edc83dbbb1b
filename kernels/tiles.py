"""The two products of a tile of tokens that chose one adapter: shrink with its rows of A, expand with its columns of B.

A tile's tokens lie anywhere in x and y, whose rows are read and written where they are; s, the few numbers between the
two products, lies in the order of the tiles. Within one choice of adapters every token occurs once, so what is added
to its row of y by one launch is added by one program, and the choices' launches follow one another.

Many programs may have no tile. From `shrink_tiles` on they see that and end while the kernel ahead is still running:
what they read for it comes from `sort`, or for :mod:`meteora.kernels.listed` from `choose`, which have ended by then.
Such reads go past the first-level cache (`.cg`), which is sure to be fresh only once a kernel has waited.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from meteora.kernels.launch import block, cdiv, cut, overlap_options
from meteora.kernels.packing import padded
from meteora.kernels.segments import ALIGNED, Segments
from meteora.kernels.sort import Tiles

PROGRAMS = 400  # of shrink, which tiles are cut along the inner dimension not to exceed


def shrink_tiles_ref(x: Tensor, A: Tensor, weights: Tensor, tiles: Tiles, starts: Tensor, width: int) -> Tensor:
    """What :func:`shrink_tiles` computes, in plain torch and float32; zero in rows without a token."""
    s = torch.zeros(tiles.tokens.numel(), width, device=x.device)
    for choice, tile, tokens, rows in _filled(tiles):
        n = tiles.adapter[choice, tile]
        own = A[starts[n] : starts[n + 1]].float()
        product = x[tokens].float() @ own.t()
        weight = weights[tokens, choice].unsqueeze(1)
        s[rows, : len(own)] = torch.where(weight != 0, product * weight, 0)
    return s


def expand_tiles_ref(y: Tensor, s: Tensor, B: Tensor, tiles: Tiles, starts: Tensor) -> Tensor:
    """What :func:`expand_tiles` computes, in plain torch and float32 until the end."""
    total = y.float().clone()
    for choice, tile, tokens, rows in _filled(tiles):
        n = tiles.adapter[choice, tile]
        own = B[:, starts[n] : starts[n + 1]].float()
        total[tokens] += s[rows, : own.shape[1]].float() @ own.t()
    return total.to(y.dtype)


def _filled(tiles: Tiles):
    """(choice, tile, its tokens, their rows in s) of all tiles that have tokens."""
    for choice, counts in enumerate(tiles.rows.tolist()):
        for tile, count in enumerate(counts):
            first = tile * tiles.height
            if count:
                tokens = tiles.tokens[choice, first : first + count].long()
                yield choice, tile, tokens, choice * tiles.tokens.shape[1] + first + torch.arange(count)


@triton.jit
def segment(start_ptr, adapter, ALIGNED_BY: tl.constexpr):
    """An adapter's first column and its rank; a multiple that is known lets the compiler load 16 bytes at a time."""
    start = tl.load(start_ptr + adapter)
    rank = tl.load(start_ptr + adapter + 1) - start
    return tl.multiple_of(start, ALIGNED_BY), tl.multiple_of(rank, ALIGNED_BY)


@triton.jit
def leave(OVERLAP: tl.constexpr):
    """What a program does that ends at once, for want of work, before the kernel ahead of its own has ended.

    One of them waits, or the next kernel, which waits for this one alone, would not wait for the one ahead as well.
    """
    if OVERLAP:
        if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
            gdc_wait()


@triton.jit(do_not_specialize=["M"])
def _shrink_tiles(
    x_ptr, a_ptr, weight_ptr, s_ptr, token_ptr, adapter_ptr, rows_ptr, start_ptr, K, M, x_stride, a_stride, piece,
    width, split_stride,
    TOP_K: tl.constexpr, SPLIT: tl.constexpr, HEIGHT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        # In this order, so that choose and sort have ended when any of the kernels that follow begins.
        gdc_wait()
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(2)
    rows = tl.load(rows_ptr + tile)
    if rows == 0:
        return
    start, rank = segment(start_ptr, tl.load(adapter_ptr + tile), 1)
    column = tl.program_id(1) * BR
    if column >= rank:
        return
    row = tl.arange(0, HEIGHT)
    c = column + tl.arange(0, BR)
    k = tl.arange(0, BK)
    # Rows and columns beyond the end repeat the last one instead of being masked.
    token = tl.load(token_ptr + tile * HEIGHT + tl.minimum(row, rows - 1)).to(tl.int64)
    first = split.to(tl.int64) * piece
    x = x_ptr + token[:, None] * x_stride + first + k[None, :]
    a = a_ptr + (start + tl.minimum(c, rank - 1)).to(tl.int64)[None, :] * a_stride + first + k[:, None]
    total = tl.zeros((HEIGHT, BR), tl.float32)
    for begin in range(first, tl.minimum(first + piece, K), BK):
        if EVEN:
            left, right = tl.load(x), tl.load(a)
        else:
            left = tl.load(x, mask=(begin + k)[None, :] < K, other=0.0)
            right = tl.load(a, mask=(begin + k)[:, None] < K, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        x += BK
        a += BK
    if not SPLIT:
        # As in route: an adapter of weight zero adds nothing, even where its product is infinite.
        weight = tl.load(weight_ptr + token * TOP_K + tile // M)[:, None]
        total = tl.where(weight != 0, total * weight, 0.0)
    s = s_ptr + split.to(tl.int64) * split_stride + (tile * HEIGHT + row).to(tl.int64)[:, None] * width
    tl.store(s + c[None, :], total.to(s_ptr.dtype.element_ty), mask=(c < width)[None, :])


@triton.jit(do_not_specialize=["M"])
def _sum_splits(
    partial_ptr, weight_ptr, s_ptr, token_ptr, rows_ptr, M, width, split_stride,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, HEIGHT: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    rows = tl.load(rows_ptr + tile, cache_modifier=".cg")
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    if tl.program_id(1) * BT >= rows:
        leave(OVERLAP)
        return
    if OVERLAP:
        gdc_wait()
    token = tl.load(token_ptr + tile * HEIGHT + tl.minimum(row, rows - 1)).to(tl.int64)
    weight = tl.load(weight_ptr + token * TOP_K + tile // M)[:, None]
    c = tl.program_id(2) * BR + tl.arange(0, BR)
    there = (tile * HEIGHT + row).to(tl.int64)[:, None] * width + c[None, :]
    total = tl.zeros((BT, BR), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + there, mask=(c < width)[None, :], other=0.0)
        partial_ptr += split_stride
    total = tl.where(weight != 0, total * weight, 0.0)
    tl.store(s_ptr + there, total.to(s_ptr.dtype.element_ty), mask=(c < width)[None, :])


def shrink_tiles(x: Tensor, A: Tensor, weights: Tensor, tiles: Tiles, segments: Segments) -> Tensor:
    """Each token times its adapter's rows of A, times the adapter's weight.

    Args:
        x: (T, in).  A: (R, in).  One dtype, last dimensions dense.
        weights: (T, k) float32, dense.

    Returns:
        s (k * M * height, W) of x's dtype, W being the largest rank padded to a multiple of 16: the tiles' rows in
        their order. Columns beyond the adapter's rank and rows without a token are undefined.
    """
    K, count, height = x.shape[1], tiles.adapter.numel(), tiles.height
    width = padded(segments.widest)
    BR = block(width, 64 if x.element_size() == 4 else 128)
    BK, stages = (32, 2) if x.element_size() == 4 else (64, 4)
    chunks = cdiv(width, BR)
    piece, splits = cut(K, max(1, min(8, PROGRAMS // (count * chunks), K // 512)), BK)
    s = x.new_empty(count * height, width)
    out = s if splits == 1 else x.new_empty(splits, count * height, width, dtype=torch.float32)
    described = (tiles.tokens, tiles.adapter, tiles.rows, segments.starts)
    options = {"TOP_K": tiles.tokens.shape[0], "HEIGHT": height, **overlap_options(x)}
    _shrink_tiles[(count, chunks, splits)](
        x, A, weights, out, *described, K, tiles.each, x.stride(0), A.stride(0), piece, width, s.numel(),
        SPLIT=splits > 1, BR=BR, BK=BK, EVEN=K % BK == 0, num_warps=4, num_stages=stages, **options,
    )  # fmt: skip
    if splits > 1:
        _sum_splits[(count, cdiv(height, 16), chunks)](
            out, weights, s, tiles.tokens, tiles.rows, tiles.each, width, s.numel(),
            SPLITS=splits, BT=16, BR=BR, num_warps=4, **options,
        )  # fmt: skip
    return s


@triton.jit(do_not_specialize=["first_tile"])
def _expand_tiles(
    y_ptr, s_ptr, b_ptr, token_ptr, adapter_ptr, rows_ptr, start_ptr, first_tile, OUT, y_stride, b_stride, width,
    FIRST: tl.constexpr, ALIGNED_BY: tl.constexpr, HEIGHT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    blocks = tl.cdiv(OUT, BO)
    tile = first_tile + tl.program_id(0) // blocks
    rows = tl.load(rows_ptr + tile, cache_modifier=".cg")
    if rows == 0:
        leave(OVERLAP)
        return
    # Before the first choice nobody has written to these rows of y, so they may be read while s is being computed.
    if OVERLAP and not FIRST:
        gdc_wait()
    start, rank = segment(start_ptr, tl.load(adapter_ptr + tile, cache_modifier=".cg"), ALIGNED_BY)
    row = tl.arange(0, HEIGHT)
    column = tl.program_id(0) % blocks * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    token = tl.load(token_ptr + tile * HEIGHT + row, mask=row < rows, other=0, cache_modifier=".cg").to(tl.int64)
    y = y_ptr + token[:, None] * y_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    before = tl.load(y, mask=inside, other=0.0)
    if OVERLAP and FIRST:
        gdc_wait()
    s = s_ptr + (tile * HEIGHT + row).to(tl.int64)[:, None] * width + r[None, :]
    b = b_ptr + column.to(tl.int64)[None, :] * b_stride + start + r[:, None]
    total = tl.zeros((HEIGHT, BO), tl.float32)
    for begin in range(0, rank, BR):
        own = begin + r < rank
        left = tl.load(s, mask=own[None, :], other=0.0)
        right = tl.load(b, mask=own[:, None] & (column < OUT)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        s += BR
        b += BR
    total += before.to(tl.float32)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


def expand_tiles(y: Tensor, s: Tensor, B: Tensor, tiles: Tiles, segments: Segments) -> Tensor:
    """Add each tile's rows of s times its adapter's columns of B into its tokens' rows of y.

    Args:
        y: (T, out), added into.  s: as :func:`shrink_tiles` gives it.  B: (out, R). Last dimensions are dense.
    """
    OUT = y.shape[1]
    BO = 64 if y.element_size() == 4 else 128
    for choice in range(len(tiles.tokens)):
        _expand_tiles[(tiles.each * cdiv(OUT, BO),)](
            y, s, B, tiles.tokens, tiles.adapter, tiles.rows, segments.starts, choice * tiles.each, OUT,
            y.stride(0), B.stride(0), s.shape[1],
            FIRST=choice == 0, ALIGNED_BY=ALIGNED if segments.aligned else 1, HEIGHT=tiles.height, BO=BO,
            BR=block(s.shape[1], 64), num_warps=4, num_stages=2, **overlap_options(y),
        )  # fmt: skip
    return y
