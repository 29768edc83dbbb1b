"""Batches of few shapes: rows without a sample and places without a target fill them up, and count for nothing.

What is done with them is the same work every time, which a GPU can replay from a recording (:mod:`meteora.recording`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count, takewhile

import torch
from torch import Tensor

from meteora.batches import IGNORE, Sample, collate, response_places

_REPLAY = 2048  # tokens that the GPU could have processed in the time that one more batch costs whatever its size
_TOKENS_PER_PLACE = 16  # more places than that are reserved if they are needed, in powers of two


@dataclass(frozen=True)
class FixedBatch:
    """Some samples, each with the response tokens of its own adapter, of N, to predict at P places of B rows.

    Attributes:
        input_ids: (B, S).
        places: (P,), indices into the B * S tokens; behind each the token of ``targets`` (P,) is to be predicted.
        shares: (N, P) float32, how much a place counts in every adapter's loss: at most in one.
        own: (B, N) float32, 1 at a row's adapter, else 0.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor
    shares: Tensor
    own: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, S, P)."""
        return *self.input_ids.shape, len(self.places)

    def to(self, device: torch.device) -> FixedBatch:
        """A copy on ``device``."""
        return FixedBatch(*(getattr(self, field.name).to(device, copy=True) for field in fields(self)))

    def fill(self, batch: FixedBatch) -> None:
        """Take over the content of a batch of the same shape, which is on the CPU. Nobody waits for a GPU's copies."""
        for field in fields(self):
            mine, other = getattr(self, field.name), getattr(batch, field.name)
            mine.copy_(other.pin_memory() if mine.is_cuda else other, non_blocking=True)


def fixed_batches(
    samples: Sequence[Sample],
    responses: Mapping[int, int],
    adapters: int,
    max_tokens: int,
    max_length: int,
    pad_id: int,
) -> Iterator[FixedBatch]:
    """Samples, none longer than ``max_length``, in batches of at most ``max_tokens`` tokens (or one row), on the CPU.

    A place counts as one of its adapter's ``responses``, so that the losses of all batches add up to the mean.
    """
    for group, rows, length in fixed_groups(samples, max_tokens, max_length):
        yield fixed_batch(group, rows, length, responses, adapters, pad_id)


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


def fixed_batch(
    samples: Sequence[Sample], rows: int, length: int, responses: Mapping[int, int], adapters: int, pad_id: int
) -> FixedBatch:
    """At most ``rows`` samples of at most ``length`` tokens each, see `fixed_batches`."""
    batch = collate(samples, pad_id, torch.device("cpu"))
    missing = (0, length - batch.input_ids.shape[1], 0, rows - len(samples))
    places, targets = response_places(torch.nn.functional.pad(batch.labels, missing, value=IGNORE))
    capacity = _power_of_two(max(len(places), rows * length // _TOKENS_PER_PLACE))
    unused = capacity - len(places)
    tasks = torch.tensor(batch.tasks)
    owners = tasks[places // length]
    shares = torch.zeros(adapters, capacity)
    shares[owners, torch.arange(len(places))] = 1 / torch.tensor([responses[task] for task in owners.tolist()]).float()
    own = torch.zeros(rows, adapters)
    own[torch.arange(len(tasks)), tasks] = 1
    return FixedBatch(
        torch.nn.functional.pad(batch.input_ids, missing, value=pad_id),
        # Places all over the batch: a GPU adds up the gradients of one and the same place one after the other.
        torch.cat([places, torch.arange(unused) % (rows * length)]),
        torch.nn.functional.pad(targets, (0, unused)),
        shares,
        own,
    )
