"""choose: each token's adapters and their weights, and which adapters a block of tokens meets, and how often.

The counts are what :mod:`meteora.kernels.sort` needs, the lists what :mod:`meteora.kernels.listed` does;
:func:`count` gives both for a routing that is there already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from meteora.kernels.launch import MOST_ADAPTERS, block, cdiv, overlap_options
from meteora.kernels.route import choose_of_ref, largest, sort_keys, unsure
from meteora.kernels.sort import tokens_per_block

LEAST_TILE = 64  # tokens of a block, below which its adapters are not listed: their weights would be read too often
LISTED_EACH = 2  # adapters a list has room for, for each of the k choices


class Lists(NamedTuple):
    """Which adapters the tokens of each block meet, where these are few: such a block is a tile of its own.

    Attributes:
        slots: (blocks,) int32, how many adapters are listed; 0 where they are too many, or none has columns.
        adapters: (blocks, L) int32, the listed ones in ascending order, then undefined.
        height: tokens of a block.
    """

    slots: Tensor
    adapters: Tensor
    height: int


def most_listed(adapters: int, top_k: int) -> int:
    """L, the room of a list; 0 where none is made. A run of tokens meets k adapters, a tile at its end 2 k.

    For one choice none is made: the sorted way, too, then writes y once, and was as fast or faster (measured).
    """
    return LISTED_EACH * top_k if top_k > 1 and tokens_per_block(adapters) >= LEAST_TILE else 0


def choose_ref(
    products: Tensor, parts: int, num_adapters: int, top_k: int, temperature: float = 1.0, *,
    absolute: bool = False, least_share: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The indices and weights of :func:`choose`, in plain torch."""
    logits = products.sum(0)[:, : parts * num_adapters].unflatten(1, (parts, num_adapters)).sum(1)
    return choose_of_ref(logits, top_k, temperature, absolute=absolute, least_share=least_share)


def count_ref(indices: Tensor, adapters: int) -> Tensor:
    """What :func:`count` computes, in plain torch."""
    chosen = indices.unsqueeze(-1) == torch.arange(adapters, device=indices.device)  # (T, k, N)
    blocks = chosen.split(tokens_per_block(adapters))
    return torch.stack([chosen.sum(0) for chosen in blocks], 1).int()


def list_ref(counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The slots and adapters of :class:`Lists` from counts (k, blocks, N), in plain torch; -1 is what is undefined."""
    met = counts.sum(0) > 0
    slots = met.sum(1)
    slots = torch.where(slots <= most, slots, 0)
    adapters = torch.full((len(slots), most), -1)
    for own, number in enumerate(slots.tolist()):
        adapters[own, :number] = met[own].nonzero().flatten()[:number]
    return slots.int(), adapters.int()


@triton.jit
def _in_block(index, live, n):
    """How often each n occurs in ``index`` (BT,) where it is live."""
    return tl.sum(((index[:, None] == n[None, :]) & live[:, None]).to(tl.int32), 0)


@triton.jit
def _list(met, n, columned, own, slots_ptr, listed_ptr, MOST: tl.constexpr):
    """Write a block's list: the adapters n that are met (BN,) more than 0 times."""
    there = ((met > 0) & (n < columned)).to(tl.int32)
    slots = tl.sum(there, 0)
    slots = tl.where(slots <= MOST, slots, 0)
    tl.store(slots_ptr + own, slots)
    tl.store(listed_ptr + own * MOST + tl.cumsum(there, 0) - 1, n, mask=(there > 0) & (slots > 0))


@triton.jit(do_not_specialize=["T", "blocks"])
def _choose(
    p_ptr, index_ptr, weight_ptr, count_ptr, slots_ptr, listed_ptr, T, N, C, columned, blocks,
    inverse_temperature, least_share,
    MOST: tl.constexpr, SPLITS: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, ABSOLUTE: tl.constexpr,
    UNSURE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    own = tl.program_id(0)
    token = (own * BT + tl.arange(0, BT)).to(tl.int64)
    live = token < T
    n = tl.arange(0, BN)
    slot = tl.arange(0, BK)
    if OVERLAP:
        gdc_wait()
    logits = tl.zeros((BT, BN), tl.float32)
    row = p_ptr + token[:, None] * C + n[None, :]
    inside = live[:, None] & (n < N)[None, :]
    for _ in tl.static_range(SPLITS):
        for part in tl.static_range(PARTS):
            logits += tl.load(row + part * N, mask=inside, other=0.0)
        row += T.to(tl.int64) * C
    keys = sort_keys(logits, n, N, ABSOLUTE)
    every, top = keys, tl.max(keys, 1)
    total = tl.zeros((BT,), tl.float32)
    chosen = tl.zeros((BT,), tl.float32)  # what the chosen exponentials add up to at temperature 1
    indices = tl.zeros((BT, BK), tl.int32)
    weights = tl.zeros((BT, BK), tl.float32)
    met = tl.zeros((BN,), tl.int32)
    for j in tl.range(TOP_K):
        value, index, keys = largest(keys, n, BN)
        weight = tl.exp((value - top) * inverse_temperature)
        total += weight
        if UNSURE:
            chosen += tl.exp(value - top)
        indices = tl.where(slot[None, :] == j, index[:, None], indices)
        weights = tl.where(slot[None, :] == j, weight[:, None], weights)
        counts = _in_block(index, live, n)
        met += counts
        tl.store(count_ptr + (j * blocks + own) * columned + n, counts, mask=n < columned)
    if MOST:
        _list(met, n, columned, own, slots_ptr, listed_ptr, MOST)
    if UNSURE:
        total = tl.where(unsure(chosen, every, top, least_share), float("inf"), total)  # so that all weights are zero
    weights /= total[:, None]
    there = live[:, None] & (slot < TOP_K)[None, :]
    tl.store(index_ptr + token[:, None] * TOP_K + slot[None, :], indices, mask=there)
    tl.store(weight_ptr + token[:, None] * TOP_K + slot[None, :], weights, mask=there)


def _empty(indices: Tensor, columned: int) -> tuple[Tensor, Lists]:
    """Room for the counts of indices (T, k), and for their lists."""
    T, k = indices.shape
    height = tokens_per_block(columned)
    blocks, most = cdiv(T, height), most_listed(columned, k)
    counts = indices.new_empty(k, blocks, columned, dtype=torch.int32)
    return counts, Lists(counts.new_empty(blocks), counts.new_empty(blocks, most), height)


def choose(
    products: Tensor, parts: int, num_adapters: int, columned: int, top_k: int, temperature: float = 1.0, *,
    absolute: bool = False, least_share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Lists]:  # fmt: skip
    """Choose each token's adapters.

    Args:
        products: (splits, T, C) float32, whose sum over splits is ``parts`` times N columns that add up to the logits.
        columned: the number of adapters that are counted; all beyond have no columns.
        least_share: of a softmax over all logits, below which the chosen weigh nothing.

    Returns:
        indices (T, k) int32 and weights (T, k) float32, best first, counts (k, blocks, columned) int32, and the lists,
        which are not written where they have no room.
    """
    splits, T, C = products.shape
    indices, weights = products.new_empty(T, top_k, dtype=torch.int32), products.new_empty(T, top_k)
    counts, lists = _empty(indices, columned)
    blocks = counts.shape[1]
    _choose[(blocks,)](
        products, indices, weights, counts, lists.slots, lists.adapters, T, num_adapters, C, columned, blocks,
        1 / temperature, least_share, MOST=lists.adapters.shape[1], SPLITS=splits, TOP_K=top_k, PARTS=parts, ABSOLUTE=absolute,
        UNSURE=least_share > 0, BT=lists.height, BN=block(num_adapters, MOST_ADAPTERS), BK=block(top_k, 1024, 1), num_warps=8,
        **overlap_options(products),
    )  # fmt: skip
    return indices, weights, counts, lists


@triton.jit(do_not_specialize=["T", "blocks"])
def _count(
    index_ptr, count_ptr, slots_ptr, listed_ptr, T, columned, blocks,
    MOST: tl.constexpr, TOP_K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    token = (own * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.arange(0, BN)
    met = tl.zeros((BN,), tl.int32)
    for j in tl.range(TOP_K):
        index = tl.load(index_ptr + token * TOP_K + j, mask=token < T, other=-1).to(tl.int32)
        counts = _in_block(index, token < T, n)
        met += counts
        tl.store(count_ptr + (j * blocks + own) * columned + n, counts, mask=n < columned)
    if MOST:
        _list(met, n, columned, own, slots_ptr, listed_ptr, MOST)


def count(indices: Tensor, columned: int) -> tuple[Tensor, Lists]:
    """How many tokens of each block chose each adapter: indices (T, k), dense -> (k, blocks, columned) int32, lists."""
    T, k = indices.shape
    counts, lists = _empty(indices, columned)
    blocks = counts.shape[1]
    _count[(blocks,)](
        indices, counts, lists.slots, lists.adapters, T, columned, blocks,
        MOST=lists.adapters.shape[1], TOP_K=k, BT=lists.height, BN=block(columned, MOST_ADAPTERS), num_warps=4,
    )  # fmt: skip
    return counts, lists
