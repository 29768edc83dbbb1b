"""sort: tokens in the order of their adapters, cut into tiles of one adapter each.

A counting sort for each of a token's k choices: tokens come in blocks, each block's tokens per adapter are counted
(:mod:`meteora.kernels.choose`), and every program finds from all counts where its own block's tokens go. The order is
that of the tokens within an adapter, without atomics, so it is the same each time; and the number of tiles has a bound
that the host knows, so nobody asks the GPU for a number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from meteora.kernels.launch import MOST_ADAPTERS, block, cdiv, overlap_options


class Tiles(NamedTuple):
    """The tokens of each choice j = 0 .. k-1 in tiles of up to ``height``, the M tiles of choice 0 first.

    Attributes:
        tokens: (k, M * height) int32; those of a tile in a row, what follows them in the tile is undefined.
        adapter: (k, M) int32, whose tile it is.
        rows: (k, M) int32, how many tokens are in it; 0 in the surplus tiles at each choice's end.
        height: of a tile.
    """

    tokens: Tensor
    adapter: Tensor
    rows: Tensor
    height: int

    @property
    def each(self) -> int:
        """M, the tiles of one choice."""
        return self.adapter.shape[1]


def tokens_per_block(adapters: int) -> int:
    """Tokens that are counted together: a block's one-hot matrix fits into registers."""
    return 64 if adapters <= 64 else 16


def most_tiles(tokens: int, adapters: int, height: int) -> int:
    """M, which no routing of the tokens exceeds: each adapter has less than one tile that is not full."""
    return cdiv(tokens, height) + adapters


def sort_ref(indices: Tensor, starts: Tensor, height: int, slots: Tensor | None = None) -> Tiles:
    """What :func:`sort` computes from indices (T, k), in plain torch; what it leaves undefined is -1."""
    (T, k), N = indices.shape, len(starts) - 1
    if slots is not None:
        listed = (slots > 0).repeat_interleave(tokens_per_block(N))[:T]
        indices = torch.where(listed.unsqueeze(1), -1, indices)
    M = most_tiles(T, N, height)
    tokens = torch.full((k, M * height), -1, dtype=torch.int32)
    adapter, rows = torch.full((k, M), -1, dtype=torch.int32), torch.zeros(k, M, dtype=torch.int32)
    for j in range(k):
        tile = 0
        for n in range(N):
            chosen = torch.nonzero(indices[:, j].cpu() == n).flatten() if starts[n] < starts[n + 1] else torch.empty(0)
            for piece in chosen.split(height):
                if len(piece):
                    tokens[j, tile * height : tile * height + len(piece)] = piece
                    adapter[j, tile], rows[j, tile] = n, len(piece)
                    tile += 1
    return Tiles(tokens, adapter, rows, height)


@triton.jit(do_not_specialize=["T", "blocks", "M"])
def _sort(
    index_ptr, count_ptr, slots_ptr, start_ptr, token_ptr, adapter_ptr, rows_ptr, T, N, M, blocks,
    LISTED: tl.constexpr, TOP_K: tl.constexpr, HEIGHT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    own, choice = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, BN)
    present = n < N
    rank = tl.load(start_ptr + n + 1, mask=present, other=0) - tl.load(start_ptr + n, mask=present, other=0)
    if OVERLAP:
        gdc_wait()
    total = tl.zeros((BN,), tl.int32)
    before = tl.zeros((BN,), tl.int32)
    for first in range(0, blocks, 32):
        row = first + tl.arange(0, 32)
        inside = (row < blocks)[:, None] & present[None, :]
        counts = tl.load(count_ptr + (choice * blocks + row)[:, None] * N + n[None, :], mask=inside, other=0)
        if LISTED:
            slots = tl.load(slots_ptr + row, mask=row < blocks, other=0)
            counts = tl.where((slots > 0)[:, None], 0, counts)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((row < own)[:, None], counts, 0), 0)
    # An adapter without columns adds nothing, so it gets no tiles.
    total = tl.where(rank > 0, total, 0)
    tiles = (total + HEIGHT - 1) // HEIGHT
    end = tl.cumsum(tiles, 0)
    begin = end - tiles

    token = own * BT + tl.arange(0, BT)
    index = tl.load(index_ptr + token.to(tl.int64) * TOP_K + choice, mask=token < T, other=-1).to(tl.int32)
    mine = (index[:, None] == n[None, :]) & (rank > 0)[None, :]
    if LISTED:
        mine = mine & (tl.load(slots_ptr + own) == 0)
    ones = mine.to(tl.int32)
    place = tl.cumsum(ones, 0) - 1 + (before + begin * HEIGHT)[None, :]
    place = tl.sum(tl.where(mine, place, 0), 1)
    tl.store(token_ptr + choice * M * HEIGHT + place, token, mask=tl.sum(ones, 1) > 0)

    # The programs of a choice share the work of describing its tiles.
    tile = own * BM + tl.arange(0, BM)
    adapter = tl.sum(((end[None, :] <= tile[:, None]) & present[None, :]).to(tl.int32), 1)
    left = tl.minimum(total[None, :] - (tile[:, None] - begin[None, :]) * HEIGHT, HEIGHT)
    rows = tl.sum(tl.where((adapter[:, None] == n[None, :]) & present[None, :], left, 0), 1)
    tl.store(adapter_ptr + choice * M + tile, adapter, mask=tile < M)
    tl.store(rows_ptr + choice * M + tile, rows, mask=tile < M)


def sort(indices: Tensor, counts: Tensor, starts: Tensor, height: int, slots: Tensor | None = None) -> Tiles:
    """Sort each choice's tokens by adapter, into tiles.

    Args:
        indices: (T, k), dense; an adapter of which ``starts`` knows nothing has no columns.
        counts: (k, blocks, N) int32, as :mod:`meteora.kernels.choose` counts them.
        starts: (N + 1,) int32, see :class:`meteora.kernels.segments.Segments`.
        height: tokens of a tile.
        slots: (blocks,) int32; tokens of blocks where it is not 0 are left out, as others care for them.
    """
    T, k = indices.shape
    _, blocks, N = counts.shape
    M = most_tiles(T, N, height)
    tokens = counts.new_empty(k, M * height)
    described = counts.new_empty(2, k, M)
    adapter, rows = described[0], described[1]
    _sort[(blocks, k)](
        indices, counts, counts if slots is None else slots, starts, tokens, adapter, rows, T, N, M, blocks,
        LISTED=slots is not None, TOP_K=k, HEIGHT=height, BT=tokens_per_block(N), BN=block(N, MOST_ADAPTERS),
        BM=block(cdiv(M, blocks), 4096, 1), num_warps=4, **overlap_options(counts),
    )  # fmt: skip
    return Tiles(tokens, adapter, rows, height)
