"""The two products of a tile of tokens that chose one adapter: shrink with its rows of A, expand with its columns of B.

A tile's tokens lie anywhere in x and y, whose rows are read and written where they are; s, the few numbers between the
two products, lies in the order of the tiles. Within one choice of adapters every token occurs once, so what is added
to its row of y by one launch is added by one program, and the choices' launches follow one another.

The gradient of x is the same two products, of the gradient of y with B and then with A: so both take either, as the
other's transpose.

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


def shrink_tiles_ref(x: Tensor, A: Tensor, tiles: Tiles, starts: Tensor, width: int) -> Tensor:
    """What :func:`shrink_tiles` computes, in plain torch and float32; zero in rows without a token."""
    s = torch.zeros(tiles.tokens.numel(), width, device=x.device)
    for choice, tile, tokens, rows in filled(tiles):
        n = tiles.adapter[choice, tile]
        own = A[starts[n] : starts[n + 1]].float()
        s[rows, : len(own)] = x[tokens].float() @ own.t()
    return s


def expand_tiles_ref(
    y: Tensor, s: Tensor, B: Tensor, weights: Tensor, tiles: Tiles, starts: Tensor, gate: Tensor | None = None
) -> Tensor:
    """What :func:`expand_tiles` computes, in plain torch and float32 until the end."""
    total = y.float().clone() if gate is None else y.float() @ gate.float()
    for choice, tile, tokens, rows in filled(tiles):
        n = tiles.adapter[choice, tile]
        own = B[:, starts[n] : starts[n + 1]].float()
        weight = weights[tokens, choice].unsqueeze(1)
        total[tokens] += torch.where(weight != 0, s[rows, : own.shape[1]].float() @ own.t() * weight, 0)
    return total.to(y.dtype)


def filled(tiles: Tiles):
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


@triton.jit
def _shrink_tiles(
    x_ptr, a_ptr, s_ptr, token_ptr, adapter_ptr, rows_ptr, start_ptr, K, x_stride, a_stride, a_step, piece, width,
    split_stride,
    ALIGNED_BY: tl.constexpr, HEIGHT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        # In this order, so that choose and sort have ended when any of the kernels that follow begins.
        gdc_wait()
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(2)
    rows = tl.load(rows_ptr + tile)
    if rows == 0:
        return
    start, rank = segment(start_ptr, tl.load(adapter_ptr + tile), ALIGNED_BY)
    column = tl.program_id(1) * BR
    if column >= rank:
        return
    row = tl.arange(0, HEIGHT)
    c = column + tl.arange(0, BR)
    k = tl.arange(0, BK)
    # Rows beyond the end repeat the last one instead of being masked. So do columns, unless they lie side by side in
    # memory: what lies there in a row is loaded 16 bytes at a time, if it is one.
    token = tl.load(token_ptr + tile * HEIGHT + tl.minimum(row, rows - 1)).to(tl.int64)
    own = start + (c if SIDE_BY_SIDE else tl.minimum(c, rank - 1))
    present = c < rank if SIDE_BY_SIDE else c >= 0
    first = split.to(tl.int64) * piece
    x = x_ptr + token[:, None] * x_stride + first + k[None, :]
    a = a_ptr + own.to(tl.int64)[None, :] * a_stride + (first + k)[:, None] * a_step
    total = tl.zeros((HEIGHT, BR), tl.float32)
    for begin in range(first, tl.minimum(first + piece, K), BK):
        if EVEN:
            left = tl.load(x)
            right = tl.load(a, mask=present[None, :], other=0.0) if SIDE_BY_SIDE else tl.load(a)
        else:
            left = tl.load(x, mask=(begin + k)[None, :] < K, other=0.0)
            right = tl.load(a, mask=present[None, :] & ((begin + k)[:, None] < K), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        x += BK
        a += BK * a_step
    s = s_ptr + split.to(tl.int64) * split_stride + (tile * HEIGHT + row).to(tl.int64)[:, None] * width
    tl.store(s + c[None, :], total.to(s_ptr.dtype.element_ty), mask=(c < width)[None, :])


@triton.jit
def _sum_splits(
    partial_ptr, s_ptr, rows_ptr, width, split_stride,
    SPLITS: tl.constexpr, HEIGHT: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, OVERLAP: tl.constexpr,
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
    c = tl.program_id(2) * BR + tl.arange(0, BR)
    there = (tile * HEIGHT + row).to(tl.int64)[:, None] * width + c[None, :]
    total = tl.zeros((BT, BR), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + there, mask=(c < width)[None, :], other=0.0)
        partial_ptr += split_stride
    tl.store(s_ptr + there, total.to(s_ptr.dtype.element_ty), mask=(c < width)[None, :])


def shrink_tiles(x: Tensor, A: Tensor, tiles: Tiles, segments: Segments) -> Tensor:
    """Each token times its adapter's rows of A.

    Args:
        x: (T, in), last dimension dense.  A: (R, in), either dimension dense.  One dtype.

    Returns:
        s (k * M * height, W) of x's dtype, W being the largest rank padded to a multiple of 16: the tiles' rows in
        their order. Columns beyond the adapter's rank and rows without a token are undefined. In float16 what is
        beyond 65,504 is infinite, as in PEFT.
    """
    K, count, height = x.shape[1], tiles.adapter.numel(), tiles.height
    width = padded(segments.widest)
    BR = block(width, 64 if x.element_size() == 4 else 128)
    BK, stages = (32, 2) if x.element_size() == 4 else (64, 4)
    chunks = cdiv(width, BR)
    piece, splits = cut(K, max(1, min(8, PROGRAMS // (count * chunks), K // 512)), BK)
    s = x.new_empty(count * height, width)
    out = s if splits == 1 else x.new_empty(splits, count * height, width, dtype=torch.float32)
    options = {"HEIGHT": height, **overlap_options(x)}
    # An A whose rows are dense is read row by row, where it makes no difference what multiple a row's number is.
    side_by_side = A.stride(1) != 1
    _shrink_tiles[(count, chunks, splits)](
        x, A, out, tiles.tokens, tiles.adapter, tiles.rows, segments.starts, K, x.stride(0), *A.stride(), piece, width,
        s.numel(),
        ALIGNED_BY=ALIGNED if side_by_side and segments.aligned else 1, BR=BR, BK=BK, EVEN=K % BK == 0,
        SIDE_BY_SIDE=side_by_side, num_warps=4, num_stages=stages, **options,
    )  # fmt: skip
    if splits > 1:
        _sum_splits[(count, cdiv(height, 16), chunks)](
            out, s, tiles.rows, width, s.numel(), SPLITS=splits, BT=16, BR=BR, num_warps=4, **options
        )
    return s


@triton.jit(do_not_specialize=["choice", "first_tile"])
def _expand_tiles(
    y_ptr, out_ptr, s_ptr, b_ptr, weight_ptr, token_ptr, adapter_ptr, rows_ptr, start_ptr, gate_ptr, choice, first_tile,
    OUT, y_stride, out_stride, b_stride, b_step, width, gate_stride,
    TOP_K: tl.constexpr, FIRST: tl.constexpr, GATES: tl.constexpr, ALIGNED_BY: tl.constexpr, HEIGHT: tl.constexpr,
    BO: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
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
    weight = tl.load(weight_ptr + token * TOP_K + choice, cache_modifier=".cg")[:, None]
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    if GATES > 0:
        n = tl.arange(0, BN)
        before = tl.zeros((HEIGHT, BO), tl.float32)
        for begin in range(0, GATES, BN):
            real = begin + n < GATES
            left = tl.load(y_ptr + token[:, None] * y_stride + (begin + n)[None, :], mask=real[None, :], other=0.0)
            right = gate_ptr + (begin + n).to(tl.int64)[:, None] * gate_stride + column[None, :]
            right = tl.load(right, mask=real[:, None] & (column < OUT)[None, :], other=0.0)
            before = tl.dot(left, right, before, input_precision="ieee")
    else:
        before = tl.load(y_ptr + token[:, None] * y_stride + column[None, :], mask=inside, other=0.0)
    if OVERLAP and FIRST:
        gdc_wait()
    s = s_ptr + (tile * HEIGHT + row).to(tl.int64)[:, None] * width + r[None, :]
    b = b_ptr + column.to(tl.int64)[None, :] * b_stride + (start + r).to(tl.int64)[:, None] * b_step
    total = tl.zeros((HEIGHT, BO), tl.float32)
    for begin in range(0, rank, BR):
        own = begin + r < rank
        left = tl.load(s, mask=own[None, :], other=0.0)
        right = tl.load(b, mask=own[:, None] & (column < OUT)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        s += BR
        b += BR * b_step
    # As in route: an adapter of weight zero adds nothing, even where its product is infinite.
    total = before.to(tl.float32) + tl.where(weight != 0, total * weight, 0.0)
    out = out_ptr + token[:, None] * out_stride + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def expand_tiles(
    y: Tensor, s: Tensor, B: Tensor, weights: Tensor, tiles: Tiles, segments: Segments, out: Tensor | None = None, *,
    gate: Tensor | None = None, early: bool = True,
) -> Tensor:  # fmt: skip
    """Add each tile's rows of s times its adapter's columns of B, times the weights, to its tokens' rows of y.

    Args:
        y: (T, out), last dimension dense.  s: as :func:`shrink_tiles` gives it.  B: (out, R), either dimension dense.
        weights: (T, k) float32, dense.
        out: as y, where the sums go, of the tokens that are in a tile of the first choice; by default to y itself.
        gate: (W, out), last dimension dense; then y is (T, W), and it is y @ gate that is added to.
        early: no kernels but :func:`shrink_tiles` were started since those that made y.
    """
    out = y if out is None else out
    OUT = out.shape[1]
    BO = 64 if y.element_size() == 4 else 128
    for choice in range(len(tiles.tokens)):
        _expand_tiles[(tiles.each * cdiv(OUT, BO),)](
            y, out, s, B, weights, tiles.tokens, tiles.adapter, tiles.rows, segments.starts, gate, choice,
            choice * tiles.each, OUT, y.stride(0), out.stride(0), *B.stride(), s.shape[1],
            0 if gate is None else gate.stride(0),
            TOP_K=weights.shape[1], FIRST=choice == 0, GATES=0 if gate is None else len(gate),
            ALIGNED_BY=ALIGNED if segments.aligned else 1, HEIGHT=tiles.height, BO=BO, BR=block(s.shape[1], 64),
            BN=16 if gate is None else block(len(gate), 64), num_warps=4, num_stages=2,
            **overlap_options(y, early or choice > 0),
        )  # fmt: skip
        y, gate = out, None
    return out
