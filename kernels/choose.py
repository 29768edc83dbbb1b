"""choose: each token's adapters and their weights, and how many tokens of a block each adapter has.

The counts are what :mod:`meteora.kernels.sort` needs; :func:`count` gives them for a routing that is there already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from meteora.kernels.launch import block, cdiv, overlap_options
from meteora.kernels.route import largest, sort_keys
from meteora.kernels.sort import tokens_per_block


def choose_ref(
    products: Tensor, parts: int, num_adapters: int, top_k: int, temperature: float = 1.0, *, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """The indices and weights of :func:`choose`, in plain torch."""
    logits = products.sum(0)[:, : parts * num_adapters].unflatten(1, (parts, num_adapters)).sum(1)
    values, indices = (logits.abs() if absolute else logits).topk(top_k)
    return indices, torch.softmax(values / temperature, -1)


def count_ref(indices: Tensor, adapters: int) -> Tensor:
    """What :func:`count` computes, in plain torch."""
    chosen = indices.unsqueeze(-1) == torch.arange(adapters, device=indices.device)  # (T, k, N)
    blocks = chosen.split(tokens_per_block(adapters))
    return torch.stack([chosen.sum(0) for chosen in blocks], 1).int()


@triton.jit
def _in_block(index, live, n):
    """How often each n occurs in ``index`` (BT,) where it is live."""
    return tl.sum(((index[:, None] == n[None, :]) & live[:, None]).to(tl.int32), 0)


@triton.jit(do_not_specialize=["T", "blocks"])
def _choose(
    p_ptr, index_ptr, weight_ptr, count_ptr, T, N, C, columned, blocks, inverse_temperature,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, ABSOLUTE: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
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
    top = tl.max(keys, 1)
    total = tl.zeros((BT,), tl.float32)
    indices = tl.zeros((BT, BK), tl.int32)
    weights = tl.zeros((BT, BK), tl.float32)
    for j in tl.range(TOP_K):
        value, index, keys = largest(keys, n, BN)
        weight = tl.exp((value - top) * inverse_temperature)
        total += weight
        indices = tl.where(slot[None, :] == j, index[:, None], indices)
        weights = tl.where(slot[None, :] == j, weight[:, None], weights)
        tl.store(count_ptr + (j * blocks + own) * columned + n, _in_block(index, live, n), mask=n < columned)
    weights /= total[:, None]
    chosen = live[:, None] & (slot < TOP_K)[None, :]
    tl.store(index_ptr + token[:, None] * TOP_K + slot[None, :], indices, mask=chosen)
    tl.store(weight_ptr + token[:, None] * TOP_K + slot[None, :], weights, mask=chosen)


def choose(
    products: Tensor, parts: int, num_adapters: int, columned: int, top_k: int, temperature: float = 1.0, *,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose each token's adapters.

    Args:
        products: (splits, T, C) float32, whose sum over splits is ``parts`` times N columns that add up to the logits.
        columned: the number of adapters that are counted; all beyond have no columns.

    Returns:
        indices (T, k) int32 and weights (T, k) float32, best first, and counts (k, blocks, columned) int32.
    """
    splits, T, C = products.shape
    BT = tokens_per_block(columned)
    blocks = cdiv(T, BT)
    indices, weights = products.new_empty(T, top_k, dtype=torch.int32), products.new_empty(T, top_k)
    counts = products.new_empty(top_k, blocks, columned, dtype=torch.int32)
    _choose[(blocks,)](
        products, indices, weights, counts, T, num_adapters, C, columned, blocks, 1 / temperature,
        SPLITS=splits, TOP_K=top_k, PARTS=parts, ABSOLUTE=absolute, BT=BT, BN=block(num_adapters, 1024),
        BK=block(top_k, 1024, 1), num_warps=8, **overlap_options(products),
    )  # fmt: skip
    return indices, weights, counts


@triton.jit(do_not_specialize=["T", "blocks"])
def _count(
    index_ptr, count_ptr, T, columned, blocks, TOP_K: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    own, choice = tl.program_id(0), tl.program_id(1)
    token = (own * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.arange(0, BN)
    index = tl.load(index_ptr + token * TOP_K + choice, mask=token < T, other=-1).to(tl.int32)
    counts = _in_block(index, token < T, n)
    tl.store(count_ptr + (choice * blocks + own) * columned + n, counts, mask=n < columned)


def count(indices: Tensor, columned: int) -> Tensor:
    """How many tokens of each block chose each adapter: indices (T, k), dense -> (k, blocks, columned) int32."""
    T, k = indices.shape
    BT = tokens_per_block(columned)
    blocks = cdiv(T, BT)
    counts = indices.new_empty(k, blocks, columned, dtype=torch.int32)
    _count[(blocks, k)](indices, counts, T, columned, blocks, TOP_K=k, BT=BT, BN=block(columned, 1024), num_warps=4)
    return counts
