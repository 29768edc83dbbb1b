"""Batches of one row that many samples share: of few shapes, and nearly without padding.

What is done with them is the same work every time, which a GPU can replay from a recording (:mod:`meteora.passes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from meteora.batches import IGNORE, Batch, Sample, Texts, collate

_TOKENS_PER_PLACE = 8  # more places than that are reserved if they are needed, in powers of two
_TOKENS_PER_TEXT = 256  # likewise of texts


def packed_batches(
    samples: Sequence[Sample], max_tokens: int, longest: int, pad_id: int
) -> Iterator[tuple[Batch, int]]:
    """Samples, none longer than ``longest``, in rows of ``max_tokens`` tokens (or ``longest``), or half, on the CPU.

    Each comes with the places to reserve in it. What fills a row up are texts, too, in which nothing counts.
    """
    for group, tokens in packed_groups(samples, max(max_tokens, longest), longest):
        needed = sum(sample.response_tokens for sample in group)
        yield _one_row(group, tokens, longest, pad_id), _power_of_two(max(needed, tokens // _TOKENS_PER_PLACE))


def packed_groups(samples: Sequence[Sample], max_tokens: int, longest: int) -> list[tuple[list[Sample], int]]:
    """Groups of samples, each with the tokens of its row: ``max_tokens``, and for the rest perhaps half of that.

    From the longest on, a sample goes where most room is left, so that every row gets long and short ones.
    """
    if (most := max(len(sample.ids) for sample in samples)) > longest:
        raise ValueError(f"a sample has {most} tokens, more than longest={longest}.")
    total = sum(len(sample.ids) for sample in samples)
    count, rest = divmod(total, max_tokens)
    half = max_tokens // 2 if max_tokens // 2 >= longest else max_tokens
    rows = [max_tokens] * count + [half if rest <= half else max_tokens] * (rest > 0)
    while (groups := _fill(samples, rows)) is None:  # they leave too little room, or have it in too small pieces
        if rows[-1] < max_tokens:
            rows[-1] = max_tokens
        else:
            rows.append(half)
    return [(group, tokens) for group, tokens in zip(groups, rows, strict=True) if group]


def _fill(samples: Sequence[Sample], rows: Sequence[int]) -> list[list[Sample]] | None:
    """The samples of each row; ``None`` if these rows do not hold them."""
    room, groups = list(rows), [[] for _ in rows]
    for sample in sorted(samples, key=lambda sample: len(sample.ids), reverse=True):
        row = max(range(len(room)), key=room.__getitem__)
        if len(sample.ids) > room[row]:
            return None
        room[row] -= len(sample.ids)
        groups[row].append(sample)
    return groups


def _one_row(samples: Sequence[Sample], tokens: int, longest: int, pad_id: int) -> Batch:
    lengths = [len(sample.ids) for sample in samples]
    real = sum(lengths)
    filling = tokens - real
    ids = [token for sample in samples for token in sample.ids] + [pad_id] * filling
    whole = Sample(
        ids,
        [response for sample in samples for response in sample.is_response] + [False] * filling,
        [task for sample in samples for task in sample.tasks] + [0] * filling,
    )
    batch = collate([whole], pad_id, torch.device("cpu"))
    batch.attention_mask[:, real:] = 0
    bounds = [*accumulate(lengths + [longest] * (filling // longest) + [filling % longest], initial=0)]
    batch.labels[:, bounds[1 : len(samples)]] = IGNORE  # no text predicts the first token of the next
    count = _power_of_two(max(len(bounds) - 1, tokens // _TOKENS_PER_TEXT))
    bounds += [tokens] * (count + 1 - len(bounds))
    texts = Texts(torch.tensor(bounds, dtype=torch.int32), longest)
    return replace(batch, tasks=[sample.task for sample in samples], texts=texts)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
