"""Protocol `sequential`: problem, the model's own answer, next problem, ... in one growing context and one KV cache.

A transcript of three problems, with `<eos>` for the tokenizer's end-of-text token:

    [INST] problem 1 [/INST]\\n answer 1 <eos>\\n[INST] problem 2 [/INST]\\n answer 2 <eos>\\n ...

An answer ends with `<eos>`, as every training sample does, and the next problem begins on a new line, as in the chat
format the base model was tuned on (`meteora.batches.prompt_ids`). Both are written by us, so that an answer that was
cut off at its limit is closed like the others. Nobody names a task or touches an adapter, except for methods that are
told the task (the oracle): they run a problem, its answer and the answer's end as that task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from meteora.batches import prompt_ids
from meteora.study.decoding import TranscriptBatch


class Transcript(NamedTuple):
    """A whole transcript, as the model saw and wrote it; the three lists have one entry per token.

    Attributes:
        tokens: ids.
        problem: the number, from 0, of the problem that a token belongs to, as part of its prompt or of its answer.
        is_answer: whether it belongs to the answer; the end-of-text token behind an answer does.
    """

    tokens: list[int]
    problem: list[int]
    is_answer: list[bool]


def transcript(tokenizer, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> Transcript:
    """Put problems and answers (token ids) together; every answer but the last is closed."""
    whole = Transcript([], [], [])
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        closed = [*answer] if i == len(prompts) - 1 else [*answer, tokenizer.eos_token_id]
        for tokens, is_answer in ((prompt_ids(tokenizer, prompt, first=i == 0), False), (closed, True)):
            whole.tokens.extend(tokens)
            whole.problem.extend([i] * len(tokens))
            whole.is_answer.extend([is_answer] * len(tokens))
    return whole


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
            prompts = [prompt_ids(tokenizer, example["prompt"], first=position == 0) for example in problems]
            with active(tasks):
                transcripts.extend(prompts)
                written = transcripts.decode([limits[task] for task in tasks])
                if position < len(items[0]) - 1:
                    transcripts.extend([[tokenizer.eos_token_id]] * len(batch))
            for i, answer in zip(batch, written, strict=True):
                answers[i].append(answer)
        yield answers
