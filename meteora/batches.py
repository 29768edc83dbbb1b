"""Examples to padded batches: encoded once, drawn evenly over the tasks, cut by length. All of it is seeded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
_ROWS_AT_ONCE = 1024  # what a tokenizer holds of each text while it encodes a list is many times the text

MIXED = -1  # the task of a sample whose turns belong to several


@dataclass(frozen=True)
class Sample:
    """One encoded example, or several in one context: per token its id, whether it is a response's, and its task."""

    ids: list[int]
    is_response: list[bool]
    tasks: list[int]

    @property
    def task(self) -> int:
        return self.tasks[0] if len(set(self.tasks)) == 1 else MIXED

    @property
    def response_tokens(self) -> int:
        """Those that are predicted: nothing is ahead of a first token."""
        return sum(self.is_response[1:])

    @property
    def turns(self) -> int:
        """Prompts with their responses: a turn ends with a response, where the task changes, or with the text."""
        ends = (before and not now for before, now in pairwise([False, *self.is_response[1:]]))
        return 1 + sum(end or task != other for end, (task, other) in zip(ends, pairwise(self.tasks), strict=True))


class Texts(NamedTuple):
    """Texts that stand one behind another in one row; a token attends to its own text alone.

    Attributes:
        bounds: (M + 1,) int32, from 0 to the row's end: text m is the tokens from ``bounds[m]`` to ``bounds[m + 1]``.
        longest: tokens that a text may have at most.
    """

    bounds: Tensor
    longest: int

    def of_tokens(self, tokens: int) -> tuple[Tensor, Tensor]:
        """For each of so many tokens (T,) int32 where its text begins, and where it ends."""
        places = torch.arange(tokens, dtype=torch.int32, device=self.bounds.device)
        behind = torch.bucketize(places, self.bounds, right=True)
        return self.bounds[behind - 1], self.bounds[behind]


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors (B, S) of some samples, and the task of each.

    ``labels`` is -100 at prompts and padding, ``token_tasks`` the task of every token (0 at padding). Padding is told
    from text by length, never by the pad id: in many tokenizers pad and end-of-text are one id, and the end must be
    learned. ``weight`` is 0 for a batch that counts for nothing, and only keeps a process in step with the others.
    ``texts`` are those of a single row that all samples share.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_tasks: Tensor
    tasks: list[int]
    weight: float = 1.0
    texts: Texts | None = None

    def turn_lengths(self) -> Tensor:
        """(B, S): how many tokens the turn has that a token belongs to (see :attr:`Sample.turns`)."""
        answers = self.labels != IGNORE
        answers[:, 0] = False
        begins = torch.ones_like(answers)
        real, tasks = self.attention_mask.bool(), self.token_tasks
        begins[:, 1:] = (answers[:, :-1] & ~answers[:, 1:]) | (real[:, :-1] & ~real[:, 1:])
        begins[:, 1:] |= tasks[:, :-1] != tasks[:, 1:]
        if self.texts is not None:
            places = torch.arange(answers.shape[1], device=answers.device)
            begins |= self.texts.of_tokens(answers.shape[1])[0] == places
        turn = begins.flatten().cumsum(0) - 1
        lengths = torch.zeros_like(turn).scatter_add_(0, turn, torch.ones_like(turn))
        return lengths[turn].view_as(answers)


def encode(rows: Iterable[Mapping], task_ids: Mapping[str, int], tokenizer, max_length: int) -> list[Sample]:
    """Encode rows {prompt, response, task}, or {turns: [such rows]} for several tasks in one context.

    A text of another layout comes in pieces, {segments: [{text, task, is_response}], ended}: it is encoded as a whole,
    every token has the task of the piece it ends in, and ``ended`` says whether the end of the text belongs to it. A
    row's ``task`` is that of the segments that name none.

    A row that is too long loses the beginning of its prompt (of its first turns), so that the response stays.

    Raises:
        ValueError: for a row that is no mapping, lacks a key or has no string there, or whose task is not in
            ``task_ids``.
    """
    if tokenizer is None:
        raise ValueError("no tokenizer given; give the base model's.")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, so no response would ever end; set eos_token.")
    samples: list[Sample] = []
    rows = iter(rows)
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        samples += _encode_rows(chunk, len(samples), task_ids, tokenizer, max_length)
    if not samples:
        raise ValueError("the dataset is empty; give at least one row.")
    return samples


def _encode_rows(
    rows: Sequence[Mapping], first: int, task_ids: Mapping[str, int], tokenizer, max_length: int
) -> list[Sample]:
    """The samples of some rows, the first of which is number ``first`` of the dataset."""
    for n, row in enumerate(rows, first):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {n} of the dataset is a {type(row).__name__}; the dataset must be a list of rows, each a dict "
                "with prompt, response, task."
            )
        for key in ("turns", "segments"):
            parts = row.get(key, [])
            if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Mapping) for part in parts):
                raise ValueError(f"row {n} of the dataset has {key}={parts!r}; it must be a list of dicts.")
    turns = {n: row.get("turns", [row]) for n, row in enumerate(rows, first) if "segments" not in row}
    tasks = []
    for n, of_row in turns.items():
        if not of_row:
            raise ValueError(f"row {n} of the dataset has no turns; give at least one.")
        tasks += [_task_of(turn, n, task_ids) for turn in of_row]
    in_order = [turn for of_row in turns.values() for turn in of_row]
    responses = token_ids(tokenizer, [turn["response"] for turn in in_order], add_special_tokens=False)
    beginnings = token_ids(tokenizer, [of_row[0]["prompt"] for of_row in turns.values()])
    others = ["\n" + turn["prompt"] for of_row in turns.values() for turn in of_row[1:]]
    continuations = iter(token_ids(tokenizer, others, add_special_tokens=False))
    beginnings, of_turn = iter(beginnings), zip(tasks, responses, strict=True)

    samples = []
    for n, row in enumerate(rows, first):
        if n not in turns:
            samples.append(_encode_segments(row, n, task_ids, tokenizer, max_length))
            continue
        ids, is_response, token_tasks = [], [], []
        for position in range(len(turns[n])):
            task, response = next(of_turn)
            response = [*response, tokenizer.eos_token_id][: max_length - 1]
            prompt = next(continuations if position else beginnings)[-(max_length - len(response)) :]
            if not prompt:
                raise ValueError(f"row {n} of the dataset has an empty prompt; a response needs a token before it.")
            ids += prompt + response
            is_response += [False] * len(prompt) + [True] * len(response)
            token_tasks += [task] * (len(prompt) + len(response))
        samples.append(Sample(ids[-max_length:], is_response[-max_length:], token_tasks[-max_length:]))
    return samples


def token_ids(tokenizer, texts: Sequence[str], **options) -> list[list[int]]:
    """The ids of each text.

    A fast tokenizer encodes a list in parallel; another gains nothing by one, and need not take it.
    """
    if texts and getattr(tokenizer, "is_fast", False):
        return tokenizer(list(texts), return_attention_mask=False, **options)["input_ids"]
    return [tokenizer(text, **options)["input_ids"] for text in texts]


def prompt_ids(tokenizer, prompt: str, *, first: bool) -> list[int]:
    """Token ids of a prompt: at the beginning of a context, or on a new line behind an ended response."""
    return tokenizer(prompt)["input_ids"] if first else tokenizer("\n" + prompt, add_special_tokens=False)["input_ids"]


def _encode_segments(row: Mapping, n: int, task_ids: Mapping[str, int], tokenizer, max_length: int) -> Sample:
    task = {"task": row["task"]} if "task" in row else {}
    segments = [{"is_response": False, **task, **segment} for segment in row["segments"]]
    if not any(segment.get("text", True) for segment in segments):
        raise ValueError(f"row {n} of the dataset has no segments with a text; give at least one.")
    tasks = [_task_of(segment, n, task_ids, needed=("text", "task")) for segment in segments]
    ends = list(accumulate(len(segment["text"]) for segment in segments))
    found = tokenizer("".join(segment["text"] for segment in segments), return_offsets_mapping=True)
    ids = list(found["input_ids"])
    # A token that reaches over a border belongs to the piece that its last character is of.
    owners = [bisect_right(ends, max(0, end - 1)) for _, end in found["offset_mapping"]]
    if row.get("ended", True):
        ids, owners = [*ids, tokenizer.eos_token_id], [*owners, len(segments) - 1]
    is_response = [segments[owner]["is_response"] for owner in owners]
    token_tasks = [tasks[owner] for owner in owners]
    return Sample(ids[-max_length:], is_response[-max_length:], token_tasks[-max_length:])


def _task_of(
    turn: Mapping, row: int, task_ids: Mapping[str, int], needed: Sequence[str] = ("prompt", "response", "task")
) -> int:
    missing, names = set(needed) - set(turn), ", ".join(needed)
    if missing:
        raise ValueError(f"row {row} of the dataset has no {sorted(missing)[0]!r}; each needs {names}.")
    for key in needed:
        if not isinstance(turn[key], str):
            raise ValueError(f"row {row} of the dataset has {key}={turn[key]!r}, which must be a string.")
    if turn["task"] not in task_ids:
        known = ", ".join(map(repr, task_ids))
        raise ValueError(
            f"row {row} of the dataset is of task {turn['task']!r}, for which there is no adapter ({known})."
        )
    return task_ids[turn["task"]]


def by_task(samples: Iterable[Sample]) -> dict[int, list[Sample]]:
    """Task -> its samples, in order; those of several tasks under ``MIXED``."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.task, []).append(sample)
    return dict(sorted(groups.items()))


def balanced_steps(
    groups: Mapping[int, Sequence[Sample]], per_task: int, steps: int, seed: int, mixed: int | None = None
) -> Iterator[list[Sample]]:
    """Yield ``steps`` lists with ``per_task`` samples of every task; each task goes round in its own shuffled order.

    Of the samples of several tasks a list has ``mixed``, or as many as of a task.
    """
    streams = {task: _shuffled_forever(samples, seed * 100_003 + task) for task, samples in groups.items()}
    counts = {task: per_task if task != MIXED or mixed is None else mixed for task in groups}
    for _ in range(steps):
        yield [next(stream) for task, stream in streams.items() for _ in range(counts[task])]


def _shuffled_forever(samples: Sequence[Sample], seed: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for n in torch.randperm(len(samples), generator=generator).tolist():
            yield samples[n]


def micro_batches(samples: Sequence[Sample], max_tokens: int, pad_id: int, device: torch.device) -> Iterator[Batch]:
    """Batches of at most ``max_tokens`` padded tokens (or one sample)."""
    return (collate(group, pad_id, device) for group in by_length(samples, max_tokens))


def by_length(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Cut samples, sorted by length, into groups of at most ``max_tokens`` padded tokens (or one sample)."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: len(s.ids)):
        if groups and len(sample.ids) * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device, weight: float = 1.0) -> Batch:
    """Pad on the right: with padding on the left, fully masked attention rows give NaN in training."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)

    def padded(lists: Iterable[list], filling: int, dtype: type = np.int64) -> Tensor:
        values = np.array(list(chain.from_iterable(lists)), dtype)  # several times as fast as torch.tensor of a list
        return torch.full(real.shape, filling).masked_scatter(real, torch.from_numpy(values))

    input_ids = padded((sample.ids for sample in samples), pad_id)
    is_response = padded((sample.is_response for sample in samples), False, np.bool_)
    token_tasks = padded((sample.tasks for sample in samples), 0)
    labels = input_ids.where(is_response, IGNORE)
    tensors = (tensor.to(device) for tensor in (input_ids, real.long(), labels, token_tasks))
    return Batch(*tensors, [sample.task for sample in samples], weight)


def response_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels (B, S) the P places among the B * S tokens that a response's token comes behind, and those tokens."""
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns, labels[rows, columns + 1]
