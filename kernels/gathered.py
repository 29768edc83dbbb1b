"""gathered: the mixture for few tokens and many columns, where reading all adapters' A and B would be bytes in vain.

A decoding step of one token that chooses two of 28 adapters needs a fourteenth of their weights. So the gate is
computed first, on its own, and what is read of A and B then is what the tokens chose: three kernels on ordinary cores,
as a matrix unit would be mostly idle. Nobody writes down what was chosen: each program of the two kernels that need it
finds it anew from the logits of its one token, a few hundred bytes. That costs less than it brings: the third kernel
knows its columns of B before the second has ended, and reads them meanwhile.

One launch does for several layers of one input ("siblings"): to the first two kernels a token's siblings are tokens in
a row, and each program of the third belongs to one layer. What order sums are added in depends on none of the siblings.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from meteora.kernels.launch import MOST_ADAPTERS, block, cdiv, cut, overlap_options, overlaps
from meteora.kernels.packing import gate_parts
from meteora.kernels.segments import ALIGNED, Segments, segments

# Where this way is the fast one, measured on an H100 in CUDA graphs.
MOST_CHOICES = 32  # tokens times k
LEAST_COLUMNS = 100  # R, for up to HELD choices
LEAST_COLUMNS_OF_MANY = 800  # R, for more choices, whose columns of B are not held
MOST_CHOSEN = 0.5  # of R, what one token chooses
MOST_READ = 1.25  # of R, what all tokens choose together; the other way reads R
MOST_RANK = 256  # of which a program holds its rows of B in registers

SIZES = 1024  # of calls, for which how the kernels are started is kept

STEP = 256  # inner columns that a warp takes at a time, 16 bytes a thread: so the tiles of x and of weights lie alike
MOST_SPLITS = 8  # of the inner dimension of A, if it is no giant: each program of the last kernel adds them up
MOST_STEPS = 16  # that a program of A takes for each of its pieces
HELD = 2  # choices whose columns of B are held in registers while s is being computed


@dataclass(frozen=True)
class Choice:
    """What the kernels find out each row's adapters and weights from: logits, or a routing that is given.

    A row is a token, or of siblings a token's layer, which follow one another.

    Attributes:
        logits: (splits, rows, N) float32, whose sum over splits they are.
        indices, weights: (rows, k) dense, weights in float32.
    """

    top_k: int
    logits: Tensor | None = None
    temperature: float = 1.0
    absolute: bool = False
    least_share: float = 0.0
    indices: Tensor | None = None
    weights: Tensor | None = None

    @property
    def given(self) -> bool:
        return self.indices is not None

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """logits, indices, weights; those that are not read stand for one another."""
        return (self.weights, self.indices, self.weights) if self.given else (self.logits, self.logits, self.logits)

    def options(self, found: Segments) -> dict:
        """What the kernels want to know of it, by their arguments' names."""
        splits, _, N = (1, 0, 1) if self.given else self.logits.shape
        return {
            "N": N, "COUNT": found.count, "GIVEN": self.given, "TOP_K": self.top_k, "GATE_SPLITS": splits,
            "ABSOLUTE": self.absolute, "BN": block(max(N, found.count), MOST_ADAPTERS),
        }  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """What :func:`choose` leaves to :func:`add`: partial (rows, k, splits, widest rank) float32, and whose it is."""

    partial: Tensor
    choice: Choice
    found: Segments


def fits(tokens: int, column_adapter: Tensor, top_k: int) -> Segments | None:
    """The columns' segments where this way is the fast one, else ``None``."""
    R = column_adapter.shape[0]
    if tokens * top_k > MOST_CHOICES or R < (LEAST_COLUMNS if top_k <= HELD else LEAST_COLUMNS_OF_MANY):
        return None
    found = segments(column_adapter)
    if found is None or found.widest > MOST_RANK:
        return None
    read = top_k * found.widest  # columns, for each token
    return found if read <= MOST_CHOSEN * R and tokens * read <= MOST_READ * R else None


def gated(
    y: Tensor, x: Tensor, packed: Tensor, B: Tensor, found: Segments, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0,
) -> None:  # fmt: skip
    """Add the mixture that the gate chooses into y (T, out); arguments as in :func:`meteora.kernels.grouped.gated`."""
    options = {"absolute": absolute, "least_share": least_share}
    chosen = choose(x, packed, 1, B.shape[1], found, num_adapters, top_k, temperature, **options)
    add([y], chosen, [B])


def given(y: Tensor, x: Tensor, A: Tensor, B: Tensor, found: Segments, indices: Tensor, weights: Tensor) -> None:
    """Add the mixture of a given routing, indices (T, k) and weights (T, k) float32, into y (T, out)."""
    choice = Choice(indices.shape[1], indices=indices.contiguous(), weights=weights.contiguous())
    add([y], Chosen(shrink_chosen(x, A, 1, choice, found), choice, found), [B])


def choose(
    x: Tensor, packed: Tensor, n: int, columns: int, found: Segments, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0,
) -> Chosen:  # fmt: skip
    """What n layers that get one input need of it: all of the mixture that is done before their outputs are there.

    Args:
        x: (T, in), T > 0, dense rows.  packed: (n * C, in), the layers' packed weights one below the other.
        columns: R, of each.  found: the segments of the R columns, the same in all layers.
    """
    logits = gate(x, packed, n, columns, num_adapters)
    choice = Choice(top_k, logits, temperature, absolute, least_share)
    return Chosen(shrink_chosen(x, packed, n, choice, found), choice, found)


def add(ys: Sequence[Tensor], chosen: Chosen, Bs: Sequence[Tensor], *, early: bool = True) -> None:
    """Add the mixtures into the layers' outputs, n times (T, out), after :func:`choose`.

    ``early``: no kernels but those of `choose` were started since those that made the outputs.
    """
    expand_chosen(ys, chosen.partial, Bs, chosen.choice, chosen.found, early=early)


# The gate ------------------------------------------------------------------------------------------------------------


def gate_ref(x: Tensor, packed: Tensor, layers: int, columns: int, num_adapters: int) -> Tensor:
    """What :func:`gate` computes, in plain torch, as one split."""
    parts = gate_parts(x.dtype)
    rows = packed.unflatten(0, (layers, -1))[:, columns : columns + parts * num_adapters]
    weights = rows.float().unflatten(1, (parts, num_adapters)).sum(1)  # (n, N, in)
    return torch.einsum("ti,lni->tln", x.float(), weights).flatten(0, 1).unsqueeze(0)


def _gate_blocks(tokens: int) -> tuple[int, int, int]:
    """Tokens of a program, splits, warps."""
    return min(4, block(tokens, 4, 1)), 4, 4


@triton.jit(do_not_specialize=["T"])
def _gate(
    x_ptr, w_ptr, out_ptr, T, layers, K, N, x_stride, w_stride, first_row, layer_rows,
    PARTS: tl.constexpr, STEPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    n, split, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2) % layers
    token = tl.program_id(2) // layers * BT + tl.arange(0, BT)
    k = split * (STEPS * BK) + tl.arange(0, BK)
    x = x_ptr + tl.minimum(token, T - 1).to(tl.int64)[:, None] * x_stride  # those beyond the end repeat the last one
    row = (layer * layer_rows + first_row + n).to(tl.int64)
    total = tl.zeros((BT, BK), tl.float32)
    for step in tl.static_range(STEPS):
        own = k + step * BK
        weight = tl.zeros((BK,), tl.float32)
        for part in tl.static_range(PARTS):
            w = w_ptr + (row + part * N) * w_stride + own
            weight += (tl.load(w) if EVEN else tl.load(w, mask=own < K, other=0.0)).to(tl.float32)
        there = x + own[None, :]
        tokens = tl.load(there) if EVEN else tl.load(there, mask=(own < K)[None, :], other=0.0)
        total += tokens.to(tl.float32) * weight[None, :]
    out = out_ptr + ((split.to(tl.int64) * T + token) * layers + layer) * N + n
    tl.store(out, tl.sum(total, 1), mask=token < T)


def gate(x: Tensor, packed: Tensor, layers: int, columns: int, num_adapters: int) -> Tensor:
    """The gates' logits alone: partial sums (splits, T * n, N) float32, the parts of a weight added up.

    Args:
        x: (T, in).  packed: (n * C, in), n layers' A (R, in) and gate, see :func:`meteora.kernels.packing.pack`.
        columns: R.
    """
    T, K = x.shape
    splits, grid, options = _gate_launch(T, K, layers, num_adapters, gate_parts(x.dtype), overlaps(x))
    out = x.new_empty((splits, T * layers, num_adapters), dtype=torch.float32)
    _gate[grid](
        x, packed, out, T, layers, K, num_adapters, x.stride(0), packed.stride(0), columns, packed.shape[0] // layers,
        **options,
    )  # fmt: skip
    return out


@functools.lru_cache(SIZES)
def _gate_launch(T: int, K: int, layers: int, N: int, parts: int, overlap: bool) -> tuple[int, tuple, dict]:
    """Splits, grid and options, which depend on the sizes alone; to find them takes longer than to look them up."""
    BT, pieces, warps = _gate_blocks(T)
    BK = block(K, STEP * warps)
    piece, splits = cut(K, pieces, BK)
    options = {"PARTS": parts, "STEPS": piece // BK, "BT": BT, "BK": BK, "EVEN": K == piece * splits, "OVERLAP": overlap}
    return splits, (N, splits, cdiv(T, BT) * layers), options | {"num_warps": warps}


# What was chosen -----------------------------------------------------------------------------------------------------


@triton.jit
def _keys(logit_ptr, row, rows, N, SPLITS: tl.constexpr, ABSOLUTE: tl.constexpr, BN: tl.constexpr):
    """What the top-k of a row compares (BN,), as in :func:`meteora.kernels.route.sort_keys`.

    Logits are read past the first-level cache, which is sure to be fresh only once a kernel has waited.
    """
    n = tl.arange(0, BN)
    logits = tl.zeros((BN,), tl.float32)
    for split in tl.static_range(SPLITS):
        there = logit_ptr + (split * rows + row) * N + n
        logits += tl.load(there, mask=n < N, other=0.0, cache_modifier=".cg")
    if ABSOLUTE:
        logits = tl.abs(logits)
    keys = tl.where(logits == logits, logits, float("inf"))
    return tl.where(n < N, keys, float("-inf"))


@triton.jit
def _largest(keys, BN: tl.constexpr):
    """The largest and its index, the lowest one in a tie; and the keys without it."""
    n = tl.arange(0, BN)
    value = tl.max(keys, 0)
    index = tl.min(tl.where(keys == value, n, BN), 0)
    return value, index, tl.where(n == index, float("-inf"), keys)


@triton.jit
def _bounds(start_ptr, COUNT, BN: tl.constexpr):
    """Where the adapters' columns begin and end, (BN,) each. Those beyond COUNT have none."""
    n = tl.arange(0, BN)
    return tl.load(start_ptr + tl.minimum(n, COUNT)), tl.load(start_ptr + tl.minimum(n + 1, COUNT))


@triton.jit
def _segment(index, starts, ends, ALIGNED_BY: tl.constexpr, BN: tl.constexpr):
    """An adapter's first column and its rank, without a load that waits for the index.

    A multiple that is seen lets the compiler load 16 bytes at a time.
    """
    own = tl.arange(0, BN) == index
    start = tl.sum(tl.where(own, starts, 0), 0)
    rank = tl.sum(tl.where(own, ends - starts, 0), 0)
    return start // ALIGNED_BY * ALIGNED_BY, rank // ALIGNED_BY * ALIGNED_BY


# Its rows of A -------------------------------------------------------------------------------------------------------


def shrink_chosen_ref(x: Tensor, A: Tensor, layers: int, indices: Tensor, found: Segments) -> Tensor:
    """What :func:`shrink_chosen` computes of indices (rows, k), in plain torch, as one split; else zeros."""
    partial = torch.zeros(*indices.shape, 1, found.widest)
    starts, As = found.starts.tolist(), A.unflatten(0, (layers, -1)).float()
    for row, chosen in enumerate(indices.tolist()):
        for j, n in enumerate(chosen):
            if n < found.count:
                own = As[row % layers, starts[n] : starts[n + 1]]
                partial[row, j, 0, : len(own)] = own @ x[row // layers].float()
    return partial


def _shrink_blocks(choices: int) -> tuple[int, int, int]:
    """Rows of a program, inner columns of it (more if there would be too many splits), warps."""
    return 4, 1024 if choices <= 16 else 2048, 4


@triton.jit(do_not_specialize=["rows"])
def _shrink_chosen(
    x_ptr, a_ptr, logit_ptr, index_ptr, partial_ptr, start_ptr, rows, layers, K, N, COUNT, x_stride, a_stride,
    layer_rows, width,
    GIVEN: tl.constexpr, TOP_K: tl.constexpr, GATE_SPLITS: tl.constexpr, ABSOLUTE: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    starts, ends = _bounds(start_ptr, COUNT, BN)
    if OVERLAP:
        # In this order, so that the gate's kernel has ended when the one that follows begins: it reads the logits, too.
        gdc_wait()
        gdc_launch_dependents()
    split, first = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS * BR
    j, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if GIVEN:
        index = tl.load(index_ptr + row * TOP_K + j).to(tl.int32)
    else:
        keys = _keys(logit_ptr, row, rows, N, GATE_SPLITS, ABSOLUTE, BN)
        _, index, keys = _largest(keys, BN)
        for _ in range(j):
            _, index, keys = _largest(keys, BN)
    start, rank = _segment(index, starts, ends, 1, BN)
    if first >= rank:
        return
    r = first + tl.arange(0, BR)
    k = split * (STEPS * BK) + tl.arange(0, BK)
    x = x_ptr + row // layers * x_stride
    # Rows beyond the end repeat the last one instead of being masked.
    a = a_ptr + ((row % layers * layer_rows + start) + tl.minimum(r, rank - 1)).to(tl.int64)[:, None] * a_stride
    total = tl.zeros((BR, BK), tl.float32)
    for step in tl.static_range(STEPS):
        own = k + step * BK
        if EVEN:
            left, right = tl.load(x + own), tl.load(a + own[None, :])
        else:
            left = tl.load(x + own, mask=own < K, other=0.0)
            right = tl.load(a + own[None, :], mask=(own < K)[None, :], other=0.0)
        total += right.to(tl.float32) * left.to(tl.float32)[None, :]
    partial = partial_ptr + ((row * TOP_K + j) * SPLITS + split) * width + r
    tl.store(partial, tl.sum(total, 1), mask=r < rank)


def shrink_chosen(x: Tensor, A: Tensor, layers: int, choice: Choice, found: Segments) -> Tensor:
    """Each row's token times the rows of A of the adapters that it chose.

    Args:
        x: (T, in).  A: (n * C, in), n layers' A (R, in), each followed by anything. One dtype, last dimensions dense.

    Returns:
        Partial sums (T * n, k, splits, widest rank) float32. Columns beyond an adapter's rank are undefined.
    """
    T, K = x.shape
    rows, k = T * layers, choice.top_k
    splits, grid, options = _shrink_launch(T, K, layers, k, found.widest)
    partial = x.new_empty((rows, k, splits, found.widest), dtype=torch.float32)
    # A given routing has no kernel ahead that would let this one begin.
    overlap = {"OVERLAP": overlaps(x)} if choice.given else overlap_options(x)
    _shrink_chosen[grid](
        x, A, *choice.pointers()[:2], partial, found.starts, rows=rows, layers=layers, K=K, x_stride=x.stride(0),
        a_stride=A.stride(0), layer_rows=A.shape[0] // layers, width=found.widest, **options,
        **choice.options(found), **overlap,
    )  # fmt: skip
    return partial


@functools.lru_cache(SIZES)
def _shrink_launch(T: int, K: int, layers: int, k: int, widest: int) -> tuple[int, tuple, dict]:
    """Splits, grid and options."""
    BR, piece, warps = _shrink_blocks(T * k)
    BR, BK = min(BR, block(widest, BR, 1)), block(K, STEP * warps)
    steps = max(1, min(piece, block(K, piece)) // BK)
    while cdiv(K, steps * BK) > MOST_SPLITS and steps < MOST_STEPS:
        steps *= 2
    splits = cdiv(K, steps * BK)
    options = {"SPLITS": splits, "STEPS": steps, "BR": BR, "BK": BK, "EVEN": K == splits * steps * BK}
    return splits, (cdiv(widest, BR) * splits, k, T * layers), options | {"num_warps": warps}


# Its columns of B ----------------------------------------------------------------------------------------------------


def expand_chosen_ref(
    ys: Sequence[Tensor], partial: Tensor, Bs: Sequence[Tensor], indices: Tensor, weights: Tensor, found: Segments
) -> list[Tensor]:
    """What :func:`expand_chosen` makes of the ys for a routing (rows, k), in plain torch and float32 until the end."""
    results, starts, s = [y.float().clone() for y in ys], found.starts.tolist(), partial.sum(2)
    for row, chosen in enumerate(indices.tolist()):
        for j, n in enumerate(chosen):
            if n < found.count and weights[row, j] != 0:
                own = Bs[row % len(ys)][:, starts[n] : starts[n + 1]].float()
                results[row % len(ys)][row // len(ys)] += own @ (s[row, j, : own.shape[1]] * weights[row, j])
    return [result.to(y.dtype) for result, y in zip(results, ys, strict=True)]


def _expand_blocks(BR: int) -> tuple[int, int]:
    """Columns of y of a program, warps."""
    return min(128, 4096 // BR), 2


@triton.jit
def _weighed(partial_ptr, j, rank, weight, row, width, TOP_K: tl.constexpr, SPLITS: tl.constexpr, BR: tl.constexpr):
    """s of the j-th choice (BR,): its partial sums added up, times the weight."""
    r = tl.arange(0, BR)
    total = tl.zeros((BR,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + ((row * TOP_K + j) * SPLITS + split) * width + r, mask=r < rank, other=0.0)
    # As in route: an adapter of weight zero adds nothing, even where its product is infinite; nor does one of no rank.
    own = tl.where(r < rank, weight, 0.0)
    return tl.where(own != 0, total * own, 0.0)


@triton.jit(do_not_specialize=["T"])
def _expand_chosen(
    ys, bs, outs, y_strides, b_strides, logit_ptr, index_ptr, weight_ptr, partial_ptr, start_ptr, T, N, COUNT, width,
    inverse_temperature, least_share,
    SIBLINGS: tl.constexpr, GIVEN: tl.constexpr, TOP_K: tl.constexpr, GATE_SPLITS: tl.constexpr,
    ABSOLUTE: tl.constexpr, UNSURE: tl.constexpr, SPLITS: tl.constexpr, HOLD: tl.constexpr,
    ALIGNED_BY: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # The tokens' programs of one block of columns follow one another: what they read of B may be the same.
    token, tile = (tl.program_id(0) % T).to(tl.int64), tl.program_id(0) // T
    y_ptr, b_ptr, OUT, y_stride, b_stride = ys[0], bs[0], outs[0], y_strides[0], b_strides[0]
    row = token * SIBLINGS
    for i in tl.static_range(1, SIBLINGS):
        before = tl.cdiv(OUT, BO)
        later = tile >= before
        tile = tl.where(later, tile - before, tile)
        row = tl.where(later, row + 1, row)
        y_ptr, b_ptr = tl.where(later, ys[i], y_ptr), tl.where(later, bs[i], b_ptr)
        OUT = tl.where(later, outs[i], OUT)
        y_stride, b_stride = tl.where(later, y_strides[i], y_stride), tl.where(later, b_strides[i], b_stride)
    column = tile * BO + tl.arange(0, BO)
    inside = column < OUT
    r = tl.arange(0, BR)
    y = y_ptr + token * y_stride + column
    b = b_ptr + column.to(tl.int64)[:, None] * b_stride + r[None, :]
    # y and B were there before the kernels of this layer began, and the gate's had ended before this one began.
    total = tl.load(y, mask=inside, other=0.0).to(tl.float32)
    starts, ends = _bounds(start_ptr, COUNT, BN)
    if not GIVEN:
        keys = _keys(logit_ptr, row, T * SIBLINGS, N, GATE_SPLITS, ABSOLUTE, BN)
        if UNSURE:
            least = least_share * tl.sum(tl.exp(keys - tl.max(keys, 0)), 0)  # of the chosen exponentials at temperature 1
    if HOLD:
        weight, other_weight = 1.0, 0.0
        if GIVEN:
            index = tl.load(index_ptr + row * TOP_K).to(tl.int32)
            weight = tl.load(weight_ptr + row * TOP_K)
        else:
            value, index, keys = _largest(keys, BN)
            weight = tl.exp((value - value) * inverse_temperature)  # 1, or NaN
            chosen = weight
        start, rank = _segment(index, starts, ends, ALIGNED_BY, BN)
        held = tl.load(b + start, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
        if TOP_K == 2:
            if GIVEN:
                index = tl.load(index_ptr + row * TOP_K + 1).to(tl.int32)
                other_weight = tl.load(weight_ptr + row * TOP_K + 1)
            else:
                other_value, index, keys = _largest(keys, BN)
                other_weight = tl.exp((other_value - value) * inverse_temperature)
                if UNSURE:
                    chosen += tl.exp(other_value - value)
                sum_of_both = weight + other_weight
                weight, other_weight = weight / sum_of_both, other_weight / sum_of_both
            start, other_rank = _segment(index, starts, ends, ALIGNED_BY, BN)
            other_held = tl.load(b + start, mask=inside[:, None] & (r < other_rank)[None, :], other=0.0)
        if UNSURE:
            weight, other_weight = tl.where(chosen < least, 0.0, weight), tl.where(chosen < least, 0.0, other_weight)
        if OVERLAP:
            gdc_wait()
        products = held.to(tl.float32) * _weighed(partial_ptr, 0, rank, weight, row, width, TOP_K, SPLITS, BR)[None, :]
        if TOP_K == 2:
            s = _weighed(partial_ptr, 1, other_rank, other_weight, row, width, TOP_K, SPLITS, BR)
            products += other_held.to(tl.float32) * s[None, :]
        total += tl.sum(products, 1)
    else:
        if not GIVEN:
            left, top = keys, tl.max(keys, 0)
            sum_of_all, chosen = 0.0, 0.0
            for _ in range(TOP_K):
                value, index, left = _largest(left, BN)
                sum_of_all += tl.exp((value - top) * inverse_temperature)
                if UNSURE:
                    chosen += tl.exp(value - top)
            if UNSURE:
                sum_of_all = tl.where(chosen < least, float("inf"), sum_of_all)  # so that all weights are zero
        if OVERLAP:
            gdc_wait()
        for j in range(TOP_K):
            if GIVEN:
                index = tl.load(index_ptr + row * TOP_K + j).to(tl.int32)
                weight = tl.load(weight_ptr + row * TOP_K + j)
            else:
                value, index, keys = _largest(keys, BN)
                weight = tl.exp((value - top) * inverse_temperature) / sum_of_all
            start, rank = _segment(index, starts, ends, ALIGNED_BY, BN)
            own = tl.load(b + start, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
            s = _weighed(partial_ptr, j, rank, weight, row, width, TOP_K, SPLITS, BR)
            total += tl.sum(own.to(tl.float32) * s[None, :], 1)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


def expand_chosen(
    ys: Sequence[Tensor], partial: Tensor, Bs: Sequence[Tensor], choice: Choice, found: Segments, *, early: bool = True
) -> None:
    """Add the chosen columns of B times the weighed sums into the outputs.

    Args:
        ys: n outputs (T, out), their last dimensions dense.  Bs: n times (out, R).
        partial: (T * n, k, splits, widest rank), a token's n siblings in a row, as :func:`shrink_chosen` gives it.
        early: no kernels but those that made ``partial``, which may still run, were started after those of the ys.
    """
    T, outs, k = ys[0].shape[0], tuple(B.shape[0] for B in Bs), choice.top_k
    grid, options = _expand_launch(T, outs, k, found.widest, found.aligned)
    _expand_chosen[grid](
        tuple(ys), tuple(Bs), outs, tuple(y.stride(0) for y in ys), tuple(B.stride(0) for B in Bs),
        *choice.pointers(), partial, found.starts, T=T, width=found.widest, inverse_temperature=1 / choice.temperature,
        least_share=choice.least_share, UNSURE=choice.least_share > 0, SPLITS=partial.shape[2], **options,
        **choice.options(found), **overlap_options(partial, early),
    )  # fmt: skip


@functools.lru_cache(SIZES)
def _expand_launch(T: int, outs: tuple[int, ...], k: int, widest: int, aligned: bool) -> tuple[tuple, dict]:
    """Grid and options."""
    BR = block(widest, MOST_RANK, 8)
    BO, warps = _expand_blocks(BR)
    options = {"SIBLINGS": len(outs), "HOLD": k <= HELD, "ALIGNED_BY": ALIGNED if aligned else 1, "BO": BO, "BR": BR}
    return (sum(cdiv(out, BO) for out in outs) * T,), options | {"num_warps": warps}
