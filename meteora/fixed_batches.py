"""Batches of few shapes: rows without a sample and places without a target fill them up, and count for nothing.

What is done with them is the same work every time, which a GPU can replay from a recording (:mod:`meteora.passes`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile

import torch

from meteora.batches import IGNORE, Batch, Sample, collate

_REPLAY = 2048  # tokens that the GPU could have processed in the time that one more batch costs whatever its size
_TOKENS_PER_PLACE = 16  # more places than that are reserved if they are needed, in powers of two


def fixed_batches(
    samples: Sequence[Sample], max_tokens: int, max_length: int, pad_id: int
) -> Iterator[tuple[Batch, int]]:
    """Samples, none longer than ``max_length``, in batches of at most ``max_tokens`` tokens (or one row), on the CPU.

    Each comes with the places to reserve in it. Rows without a sample have no entry in ``Batch.tasks``.
    """
    for group, rows, length in fixed_groups(samples, max_tokens, max_length):
        batch = _padded(collate(group, pad_id, torch.device("cpu")), rows, length, pad_id)
        needed = sum(sample.response_tokens for sample in group)
        yield batch, _power_of_two(max(needed, rows * length // _TOKENS_PER_PLACE))


def _padded(batch: Batch, rows: int, length: int, pad_id: int) -> Batch:
    missing = (0, length - batch.input_ids.shape[1], 0, rows - len(batch.input_ids))
    fillings = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE, "token_tasks": 0}
    pad = torch.nn.functional.pad
    return replace(batch, **{name: pad(getattr(batch, name), missing, value=value) for name, value in fillings.items()})


def fixed_groups(
    samples: Sequence[Sample], max_tokens: int, max_length: int
) -> list[tuple[list[Sample], int, int]]:
    """Groups of samples of similar length, each with the rows B and tokens S of its batch: the cheapest division.

    A batch has rows for ``max_tokens`` tokens or for half of them; for less, in powers of two, where all samples have no
    more. From the longest sample on, each takes as many as it has rows for, as what is left is never cheaper with one
    more sample.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.ids), reverse=True)
    lengths = _lengths(max_length)
    needed = [lengths[bisect_left(lengths, len(sample.ids))] for sample in ordered]
    max_tokens = min(max_tokens, _power_of_two(sum(needed)))
    costs, shapes = [0] * (len(ordered) + 1), [(0, 0)] * len(ordered)  # of all batches from a sample on; of the first
    for first, length in reversed([*enumerate(needed)]):
        full = max(1, max_tokens // length)
        options = []
        for rows in {full, max(1, full // 2)}:
            rest = costs[min(first + rows, len(ordered))]
            options.append((rows * length + _REPLAY + rest, rows, length))
        costs[first], *shapes[first] = min(options)
    groups, first = [], 0
    while first < len(ordered):
        rows, length = shapes[first]
        groups.append((ordered[first : first + rows], rows, length))
        first += rows
    return groups


def _lengths(max_length: int) -> list[int]:
    """64, 96, 128, 192, 256, 384 and so on up to ``max_length``."""
    steps = (size << n for n in count() for size in (64, 96))
    return [*takewhile(lambda length: length < max_length, steps), max_length]


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
