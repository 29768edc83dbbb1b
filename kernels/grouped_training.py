"""grouped_training: gates trained over many columns, where computing all of them would be arithmetic in vain.

The adapters are frozen. What a token's two products are in the forward pass, they are in the backward pass as well,
with dy for x and the two matrices changing places: ds = dy B_n, then dx += w ds A_n. So tokens are sorted once, and
both passes go over the same tiles (:mod:`meteora.kernels.tiles`). Between them, the gradient of the weight that a token
gave an adapter is <ds, s>, r numbers each, from which the logits' gradients follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from meteora.kernels import grouped
from meteora.kernels.choose import choose, count
from meteora.kernels.launch import block, cdiv, dense_rows, on_its_device
from meteora.kernels.packing import gate_parts, padded
from meteora.kernels.segments import ALIGNED, Segments
from meteora.kernels.shrink import mm_float32, shrink
from meteora.kernels.sort import Tiles, sort
from meteora.kernels.tiles import expand_tiles, filled, segment, shrink_tiles


def fits(tokens: int, A: Tensor, B: Tensor, column_adapter: Tensor, top_k: int) -> Segments | None:
    """The columns' segments where this way is the fast one and A and B are frozen, else ``None``.

    A compiler's graph has the other way.
    """
    if torch.compiler.is_compiling() or tokens > grouped.MOST_TOKENS:  # a compiler would keep what is asked before
        return None
    if A.requires_grad or B.requires_grad:
        return None
    return grouped.fits(tokens, column_adapter, top_k)


@on_its_device
def gated(
    y: Tensor, x: Tensor, packed: Tensor, B: Tensor, gate: Tensor, found: Segments, top_k: int,
    temperature: float = 1.0, least_share: float = 0.0,
) -> Tensor:  # fmt: skip
    """y plus the mixture that the gate (N, in) float32 chooses, differentiable in y, x and gate.

    The other arguments are as in :func:`meteora.kernels.grouped.gated`; ``packed`` is what is computed with.
    """
    return _Gated.apply(y, x, gate, packed, B, found, top_k, temperature, least_share)


@on_its_device
def given(y: Tensor, x: Tensor, A: Tensor, B: Tensor, found: Segments, indices: Tensor, weights: Tensor) -> Tensor:
    """y plus the mixture of a routing, indices (T, k) and weights (T, k) float32; differentiable in y, x, weights."""
    return _Given.apply(y, x, weights, A, B, found, indices)


class _Saved(NamedTuple):
    """What a backward pass needs of its forward pass: x, the adapters, the routing, s, and the tiles.

    Made of ``ctx.saved_tensors`` once in each backward pass: activation checkpointing lets nobody ask twice.
    """

    x: Tensor
    A: Tensor
    B: Tensor
    indices: Tensor
    weights: Tensor
    s: Tensor
    tokens: Tensor
    adapter: Tensor
    rows: Tensor

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.tokens, self.adapter, self.rows, grouped.HEIGHT)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, gate, packed, B, found, top_k, temperature, least_share) -> Tensor:
        R, N = B.shape[1], len(gate)
        x, packed, B = dense_rows(x), dense_rows(packed), dense_rows(B)
        products = shrink(x, packed[R:])
        chosen = choose(products, gate_parts(x.dtype), N, found.count, top_k, temperature, least_share=least_share)
        out = _forward(ctx, y, x, packed, B, found, N, *chosen[:3])
        ctx.num_adapters, ctx.temperature = N, temperature
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy) -> tuple:
        needs_y, needs_x, needs_gate = ctx.needs_input_grad[:3]
        dx = dgate = None
        if needs_x or needs_gate:
            saved = _Saved(*ctx.saved_tensors)
            ds = _back_to_s(saved, dy, ctx.found)
            # A single choice has the weight 1 whatever its logit: nothing comes back to the gate.
            if saved.weights.shape[1] > 1:
                dx, dgate = _back_through_gate(ctx, saved, ds, needs_x, needs_gate)
            else:
                dx = _back_to_x(saved, ds, ctx.found, ctx.whole) if needs_x else None
                dgate = ds.new_zeros(ctx.num_adapters, saved.x.shape[1], dtype=torch.float32) if needs_gate else None
        return dy if needs_y else None, dx, dgate, None, None, None, None, None, None


def _back_through_gate(
    ctx, saved: _Saved, ds: Tensor, needs_x: bool, needs_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x (T, in), that through the adapters included, and of the gate (N, in) float32."""
    x, packed, R, N = saved.x, saved.A, saved.B.shape[1], ctx.num_adapters
    dx = dgate = None
    dweights = dot_tiles(saved.s, ds, len(x), saved.tiles, ctx.found)
    # As many columns as the product wants, zeros at the end, against whatever is packed behind the gate.
    width = min(padded(N), len(packed) - R)
    dlogits = choose_backward(dweights, saved.indices, saved.weights, width, ctx.temperature, dtype=x.dtype)
    if needs_x:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        gate = packed[R : R + width]
        if ctx.whole:
            _add(saved, dlogits, ds, dx, ctx.found, gate)
        else:
            _add(saved, torch.mm(dlogits, gate, out=dx), ds, dx, ctx.found)
    if needs_gate:
        dgate = mm_float32(dlogits[:, :N].t(), x)
    return dx, dgate


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, weights, A, B, found, indices) -> Tensor:
        x, A, B = dense_rows(x), dense_rows(A), dense_rows(B)
        indices, weights = indices.contiguous(), weights.contiguous()
        # Of how many adapters there are, more than those that have columns, nobody tells.
        return _forward(ctx, y, x, A, B, found, -1, indices, weights, count(indices, found.count)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy) -> tuple:
        needs_y, needs_x, needs_weights = ctx.needs_input_grad[:3]
        dx = dweights = None
        if needs_x or needs_weights:
            saved = _Saved(*ctx.saved_tensors)
            ds = _back_to_s(saved, dy, ctx.found)
            if needs_weights:
                dweights = dot_tiles(saved.s, ds, len(dy), saved.tiles, ctx.found)
            if needs_x:
                dx = _back_to_x(saved, ds, ctx.found, ctx.whole)
        return dy if needs_y else None, dx, dweights, None, None, None, None


def _forward(
    ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, found: Segments, num_adapters: int, indices: Tensor,
    weights: Tensor, counts: Tensor,
) -> Tensor:  # fmt: skip
    """What both have in common: the mixture from the sorting on."""
    y = dense_rows(y)
    # If every token is in a tile of its first choice, its sum goes to its place at once.
    whole = found.least > 0 and found.count == num_adapters
    out = torch.empty_like(y, memory_format=torch.contiguous_format) if whole else y.clone()
    tiles = sort(indices, counts, found.starts, grouped.HEIGHT)
    s = shrink_tiles(x, A, tiles, found)
    expand_tiles(y if whole else out, s, B, weights, tiles, found, out)
    ctx.save_for_backward(x, A, B, indices, weights, s, *tiles[:3])
    ctx.found, ctx.whole = found, whole
    return out


def _back_to_s(saved: _Saved, dy: Tensor, found: Segments) -> Tensor:
    """ds in the order of the tiles, before the weights."""
    return shrink_tiles(dense_rows(dy), saved.B.t(), saved.tiles, found)


def _back_to_x(saved: _Saved, ds: Tensor, found: Segments, whole: bool) -> Tensor:
    """The gradient of x (T, in) through the adapters alone."""
    if not whole:
        dx = torch.zeros_like(saved.x, memory_format=torch.contiguous_format)
        _add(saved, dx, ds, dx, found)
        return dx
    dx = torch.empty_like(saved.x, memory_format=torch.contiguous_format)
    _add(saved, dx.new_zeros(1, dx.shape[1]).expand_as(dx), ds, dx, found)  # one row of zeros is there for all
    return dx


def _add(
    saved: _Saved, before: Tensor, ds: Tensor, dx: Tensor, found: Segments, gate: Tensor | None = None
) -> None:  # fmt: skip
    """Leave in dx (T, in) what comes back through the adapters and ``before``, or ``before @ gate``."""
    A = saved.A[: saved.B.shape[1]]
    expand_tiles(before, ds, A.t(), saved.weights, saved.tiles, found, dx, gate=gate, early=False)


# The weights' gradients, and the logits' ------------------------------------------------------------------------------


def dot_tiles_ref(a: Tensor, b: Tensor, tokens: int, tiles: Tiles, starts: Tensor) -> Tensor:
    """What :func:`dot_tiles` computes, in plain torch."""
    dots = torch.zeros(tokens, len(tiles.tokens), device=a.device)
    for choice, tile, own, rows in filled(tiles):
        n = tiles.adapter[choice, tile]
        rank = starts[n + 1] - starts[n]
        dots[own, choice] = (a[rows, :rank].float() * b[rows, :rank].float()).sum(1)
    return dots


@triton.jit(do_not_specialize=["M"])
def _dot_tiles(
    a_ptr, b_ptr, dot_ptr, token_ptr, adapter_ptr, rows_ptr, start_ptr, M, width,
    TOP_K: tl.constexpr, ALIGNED_BY: tl.constexpr, HEIGHT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    rows = tl.load(rows_ptr + tile)
    if rows == 0:
        return
    _, rank = segment(start_ptr, tl.load(adapter_ptr + tile), ALIGNED_BY)
    row = tl.arange(0, HEIGHT)
    r = tl.arange(0, BR)
    token = tl.load(token_ptr + tile * HEIGHT + row, mask=row < rows, other=0).to(tl.int64)
    there = (tile * HEIGHT + row).to(tl.int64)[:, None] * width + r[None, :]
    dots = tl.zeros((HEIGHT,), tl.float32)
    for begin in range(0, rank, BR):
        inside = (row < rows)[:, None] & (begin + r < rank)[None, :]
        a = tl.load(a_ptr + there + begin, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + there + begin, mask=inside, other=0.0).to(tl.float32)
        dots += tl.sum(a * b, 1)
    tl.store(dot_ptr + token * TOP_K + tile // M, dots, mask=row < rows)


def dot_tiles(a: Tensor, b: Tensor, tokens: int, tiles: Tiles, segments: Segments) -> Tensor:
    """For each token and choice, the product of what lies in a and in b for them, as :func:`shrink_tiles` returns it.

    Returns:
        (T, k) float32; zero for adapters without columns.
    """
    k = len(tiles.tokens)
    dots = a.new_zeros(tokens, k, dtype=torch.float32)
    _dot_tiles[(tiles.adapter.numel(),)](
        a, b, dots, tiles.tokens, tiles.adapter, tiles.rows, segments.starts, tiles.each, a.shape[1],
        TOP_K=k, ALIGNED_BY=ALIGNED if segments.aligned else 1, HEIGHT=tiles.height, BR=block(a.shape[1], 64),
        num_warps=4,
    )  # fmt: skip
    return dots


def choose_backward_ref(
    dweights: Tensor, indices: Tensor, weights: Tensor, width: int, temperature: float = 1.0
) -> Tensor:
    """What :func:`choose_backward` computes, in plain torch and float32."""
    inner = dweights - (weights * dweights).sum(-1, keepdim=True)
    return dweights.new_zeros(len(dweights), width).scatter(1, indices.long(), weights * inner / temperature)


@triton.jit(do_not_specialize=["T"])
def _choose_backward(
    dweight_ptr, index_ptr, weight_ptr, out_ptr, T, width, inverse_temperature,
    TOP_K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = token < T
    n = tl.arange(0, BN)
    mean = tl.zeros((BT,), tl.float32)
    for j in tl.range(TOP_K):
        weight = tl.load(weight_ptr + token * TOP_K + j, mask=live, other=0.0)
        mean += weight * tl.load(dweight_ptr + token * TOP_K + j, mask=live, other=0.0)
    gradient = tl.zeros((BT, BN), tl.float32)
    for j in tl.range(TOP_K):
        index = tl.load(index_ptr + token * TOP_K + j, mask=live, other=-1).to(tl.int32)
        weight = tl.load(weight_ptr + token * TOP_K + j, mask=live, other=0.0)
        own = weight * (tl.load(dweight_ptr + token * TOP_K + j, mask=live, other=0.0) - mean) * inverse_temperature
        gradient += tl.where(n[None, :] == index[:, None], own[:, None], 0.0)
    out = out_ptr + token[:, None] * width + n[None, :]
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=live[:, None] & (n < width)[None, :])


def choose_backward(
    dweights: Tensor, indices: Tensor, weights: Tensor, width: int, temperature: float = 1.0, *, dtype: torch.dtype
) -> Tensor:
    """The gradients of the logits from those of the weights, both (T, k) float32, dense, and the choice (T, k).

    Returns:
        (T, width) of ``dtype``, width being N or more; zero for adapters that were not chosen.
    """
    T, k = dweights.shape
    out = dweights.new_empty(T, width, dtype=dtype)
    BN = block(width, 1024)
    BT = max(1, 2048 // BN)
    _choose_backward[(cdiv(T, BT),)](
        dweights, indices, weights, out, T, width, 1 / temperature, TOP_K=k, BT=BT, BN=BN, num_warps=4
    )
    return out
