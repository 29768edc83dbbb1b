"""grouped: the mixture for many columns, where computing all of them for every token would be arithmetic in vain.

Tokens are sorted by adapter, and each tile of tokens meets its adapter's columns alone. That costs more launches, a
second pass over y for each further choice, and reading x once for each of them, so it pays for large ranks and many
tokens; :func:`fits` says when. Consecutive tokens that meet few adapters together need no sorting and no second pass.
Which these are is known on the GPU alone, so the kernels of both are started, and programs without work end at once.
"""

from __future__ import annotations

from torch import Tensor

from meteora.kernels.choose import Lists, choose, count
from meteora.kernels.listed import expand_listed, shrink_listed
from meteora.kernels.packing import gate_parts
from meteora.kernels.segments import Segments, segments
from meteora.kernels.shrink import shrink
from meteora.kernels.sort import sort
from meteora.kernels.tiles import expand_tiles, shrink_tiles

MOST_TOKENS = 2**15  # that are sorted at once
HEIGHT = 64  # tokens of a tile
# Where this way begins to pay. Below, the other one needs fewer launches, or tiles would be half empty.
LEAST_COLUMNS = 800  # R for each of the k choices
LEAST_TOKENS = 2048
LEAST_TOKENS_EACH = 64  # for each adapter


def fits(tokens: int, column_adapter: Tensor, top_k: int) -> Segments | None:
    """The columns' segments where this way is the fast one, else ``None``.

    The time of the other way grows with R, that of this one with k: measured on an H200 at R = 1792, they meet at R of
    700 to 950 for k = 1 and 870 to 1400 for k = 2, depending on the layer's shape and the tokens.
    """
    R = column_adapter.shape[0]
    if R < LEAST_COLUMNS * top_k or tokens < LEAST_TOKENS:
        return None
    found = segments(column_adapter)
    if found is None or tokens < LEAST_TOKENS_EACH * found.count or 4 * top_k * found.widest > R:
        return None
    return found


def gated(
    y: Tensor, x: Tensor, packed: Tensor, B: Tensor, found: Segments, num_adapters: int, top_k: int,
    temperature: float = 1.0, *, absolute: bool = False, least_share: float = 0.0,
) -> None:  # fmt: skip
    """Add the mixture that the gate chooses into y (T, out).

    Args:
        x: (T, in).  packed: (C, in), see :func:`meteora.kernels.packing.pack`.  B: (out, R).  Last dimensions dense.
        found: the segments of the R columns.
    """
    R = B.shape[1]
    for y, x in zip(y.split(MOST_TOKENS), x.split(MOST_TOKENS), strict=True):
        products = shrink(x, packed[R:])
        parts = gate_parts(x.dtype)
        options = {"absolute": absolute, "least_share": least_share}
        chosen = choose(products, parts, num_adapters, found.count, top_k, temperature, **options)
        _add(y, x, packed, B, found, *chosen)


def given(y: Tensor, x: Tensor, A: Tensor, B: Tensor, found: Segments, indices: Tensor, weights: Tensor) -> None:
    """Add the mixture of a given routing, indices (T, k) and weights (T, k) float32, into y (T, out); as `gated`."""
    pieces = (tensor.split(MOST_TOKENS) for tensor in (y, x, indices.contiguous(), weights.contiguous()))
    for y, x, indices, weights in zip(*pieces, strict=True):
        _add(y, x, A, B, found, indices, weights, *count(indices, found.count))


def _add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, found: Segments, indices: Tensor, weights: Tensor, counts: Tensor,
    lists: Lists,
) -> None:  # fmt: skip
    listed = lists.adapters.shape[1] > 0
    tiles = sort(indices, counts, found.starts, HEIGHT, lists.slots if listed else None)
    sorted_s = shrink_tiles(x, A, tiles, found)
    if listed:
        listed_s = shrink_listed(x, A, indices, weights, lists, found)
    expand_tiles(y, sorted_s, B, weights, tiles, found)
    if listed:
        expand_listed(y, listed_s, B, lists, found)
