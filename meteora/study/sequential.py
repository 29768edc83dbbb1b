"""Protocol `sequential`: problem, the model's own answer, next problem, ... in one growing context and one KV cache.

A transcript of three problems, with `<eos>` for the tokenizer's end-of-text token:

    [INST] problem 1 [/INST]\\n answer 1 <eos>\\n[INST] problem 2 [/INST]\\n answer 2 <eos>\\n ...

Between an answer and the next problem stand `<eos>`, with which every training sample ends, and a line break, which
follows it in the chat format the base model was tuned on. They are written by us, so that an answer that was cut off
at its limit is closed like the others. Nobody names a task or touches an adapter, except for methods that are told the
task (the oracle).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from meteora.batches import prompt_ids
from meteora.study.decoding import TranscriptBatch


def problem_tokens(tokenizer, prompt: str, *, first: bool) -> list[int]:
    """What is appended for one problem: what closes the previous answer, unless it is the first, and the prompt."""
    closing = [] if first else [tokenizer.eos_token_id]
    return closing + prompt_ids(tokenizer, prompt, first=first)


def transcript_tokens(
    tokenizer, prompts: Sequence[str], answers: Sequence[Sequence[int]]
) -> tuple[list[int], list[int | None]]:
    """A whole transcript, as the model saw and wrote it.

    Args:
        prompts: of the problems.
        answers: token ids, one list per problem.

    Returns:
        The token ids, and for each of them the number of the problem it belongs to if the model wrote it, else `None`.
    """
    tokens: list[int] = []
    written: list[int | None] = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        problem = problem_tokens(tokenizer, prompt, first=i == 0)
        tokens += [*problem, *answer]
        written += [None] * len(problem) + [i] * len(answer)
    return tokens, written


def answer_in_sequence(
    model: torch.nn.Module,
    tokenizer,
    items: Sequence[Sequence[Mapping[str, Any]]],
    *,
    limits: Mapping[str, int],
    batch_size: int,
    active: Callable[[list[str]], AbstractContextManager],
) -> Iterator[dict[int, list[list[int]]]]:
    """Answer the problems of every item one after another.

    Args:
        items: each a list of examples; all of one length.
        limits: task -> most new tokens of an answer.
        active: given one task per row, the context in which that problem and its answer are run.

    Yields:
        One batch after another as {position in `items`: one list of token ids per problem}.
    """
    order = sorted(range(len(items)), key=lambda i: sum(len(example["prompt"]) for example in items[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        transcripts = TranscriptBatch(
            model, len(batch), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
        )
        answers: dict[int, list[list[int]]] = {i: [] for i in batch}
        for position, problems in enumerate(zip(*(items[i] for i in batch), strict=True)):
            tasks = [example["task"] for example in problems]
            with active(tasks):
                transcripts.extend(
                    [problem_tokens(tokenizer, example["prompt"], first=position == 0) for example in problems]
                )
                written = transcripts.decode([limits[task] for task in tasks])
            for i, answer in zip(batch, written, strict=True):
                answers[i].append(answer)
        yield answers
