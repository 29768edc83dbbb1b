"""Independent evaluation: every method answers the test samples of every task, one prompt at a time (Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from meteora.study.baselines import Method
from meteora.study.decoding import EncodedPrefix, ScoreProcessor, TranscriptBatch, common_prefix_length
from meteora.study.measures import Example, Row, strict_scores, task_rows
from meteora.study.predictions import file_name, reuse_or_produce
from meteora.study.statistics import paired_difference_over_tasks

Accuracies = dict[str, dict[str, list[float]]]  # method -> task -> 1.0 or 0.0 per sample


def answer_budget(tokenizer, responses: Iterable[str], *, cap: int) -> int:
    """How many new tokens an answer of a task may take: twice its longest *training* response, 8 at least, `cap` at
    most.

    Answers of most tasks are a few tokens long; a method that has not learned to stop would otherwise spend most of the
    run's time on text that no metric looks at. Test responses are not consulted.
    """
    longest = max((len(tokenizer.encode(text, add_special_tokens=False)) for text in responses), default=0)
    return min(cap, max(8, 2 * longest))


def iterate_answers(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    processor: ScoreProcessor | None = None,
    decode: Callable[[list[int]], str] | None = None,
    reuse_prefix: bool = True,
) -> Iterator[dict[int, str]]:
    """Greedy answers, one batch after another as {position in `prompts`: answer}. See `generate_answers`."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    shared = common_prefix_length(encoded) if reuse_prefix else 0
    prefix = EncodedPrefix(model, encoded[0][:shared]) if shared else None
    if decode is None:
        decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True).strip()  # noqa: E731
    # longest first: little padding, and memory that suffices for the first batch suffices for all
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        transcripts = TranscriptBatch(
            model,
            len(batch),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            prefix=prefix,
        )
        transcripts.extend([encoded[i][shared:] for i in batch])
        answers = transcripts.decode([max_new_tokens] * len(batch), processor=processor, last=True)
        yield {i: decode(answer) for i, answer in zip(batch, answers, strict=True)}


def generate_answers(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    processor: ScoreProcessor | None = None,
    reuse_prefix: bool = True,
) -> list[str]:
    """Greedy answers to `prompts`: the new text only, without surrounding white space.

    Batches are sorted by length and left-padded. Tokens with which all prompts begin are encoded once (`reuse_prefix`).
    A row ends with the tokenizer's end-of-text token or after `max_new_tokens`, and then leaves its batch.

    Args:
        model: a Hugging Face causal LM or a `MeteoraModel`, in eval mode. To route by task, enter
            `model.route_to(task)` with one task for all prompts.
        tokenizer: with `eos_token_id` and `pad_token_id`; they may be the same.
        processor: changes the scores before the arg max.
    """
    answers: dict[int, str] = {}
    for batch in iterate_answers(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        processor=processor,
        reuse_prefix=reuse_prefix,
    ):
        answers |= batch
    return [answers[i] for i in range(len(answers))]


def predict_independent(
    methods: Mapping[str, Method],
    examples: Mapping[str, Sequence[Example]],
    *,
    tokenizer,
    predictions_dir: str | Path,
    batch_size: int,
    max_new_tokens: int | Mapping[str, int],
    progress: bool = True,
) -> dict[str, dict[str, list[str]]]:
    """Answers of every method to every task's examples, as method -> task -> one string per example.

    They are stored in `predictions_dir/independent/<method>/<task>.jsonl` after every batch, and taken from there as
    long as weights, method, prompts and settings are the same.
    """
    total = len(methods) * sum(map(len, examples.values()))
    answers: dict[str, dict[str, list[str]]] = {}
    with tqdm(total=total, unit="answer", disable=not progress) as bar:
        for name, method in methods.items():
            answers[name] = {}
            for task, rows in examples.items():
                bar.set_description(f"{name}: {task}")
                limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[task]
                answers[name][task] = _predict_task(
                    method, task, rows, tokenizer, Path(predictions_dir), batch_size, limit, bar
                )
    return answers


def _predict_task(
    method: Method,
    task: str,
    rows: Sequence[Example],
    tokenizer,
    predictions_dir: Path,
    batch_size: int,
    limit: int,
    bar: tqdm,
) -> list[str]:
    """One method on one task. Batch size is no part of the fingerprint: padding and batching change no answer."""
    prompts = [row["prompt"] for row in rows]
    header = {**method.identity(), "task": task, "prompts": dict(zip((row["id"] for row in rows), prompts))}
    header |= {"max_new_tokens": limit}
    done = 0

    def produce(missing: list[int]) -> Iterator[dict[int, str]]:
        nonlocal done
        with method.active(task):
            for batch in iterate_answers(
                method.model,
                tokenizer,
                [prompts[i] for i in missing],
                batch_size=batch_size,
                max_new_tokens=limit,
            ):
                yield {missing[i]: answer for i, answer in batch.items()}
                bar.update(len(batch))
                done += len(batch)

    path = predictions_dir / file_name("independent", method.name, task)
    answers = reuse_or_produce(path, header, [row["id"] for row in rows], produce)
    bar.update(len(rows) - done)
    return answers


class IndependentResult(NamedTuple):
    """What an independent evaluation found.

    Attributes:
        rows: of `independent.csv`: `task,method,metric,value,low,high,n`.
        accuracies: of every sample, to compare methods on the same samples; tasks without an accuracy are left out.
        answers: method -> task -> one string per example.
    """

    rows: list[Row]
    accuracies: Accuracies
    answers: dict[str, dict[str, list[str]]]


def evaluate_independent(
    methods: Mapping[str, Method],
    examples: Mapping[str, Sequence[Example]],
    *,
    tokenizer,
    predictions_dir: str | Path,
    batch_size: int,
    max_new_tokens: int | Mapping[str, int],
    progress: bool = True,
) -> IndependentResult:
    """Every method on every task: answers (`predict_independent`), metrics with 95% bootstrap intervals, accuracies."""
    answers = predict_independent(
        methods,
        examples,
        tokenizer=tokenizer,
        predictions_dir=predictions_dir,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    rows: list[Row] = []
    accuracies: Accuracies = {method: {} for method in methods}
    for method, by_task in answers.items():
        for task, texts in by_task.items():
            rows += [{"task": task, "method": method, **row} for row in task_rows(examples[task], texts)]
            correct = strict_scores(examples[task], texts)
            if correct:
                accuracies[method][task] = correct
    return IndependentResult(rows, accuracies, answers)


def paired_rows(accuracies: Accuracies, pairs: Iterable[tuple[str, str]]) -> list[Row]:
    """Differences of two methods' mean accuracy over tasks on the same samples: `method,other,value,low,high`.

    If `low <= 0 <= high`, the samples do not tell the two apart.
    """
    rows = []
    for method, other in pairs:
        value, low, high = paired_difference_over_tasks(accuracies[method], accuracies[other])
        rows.append({"method": method, "other": other, "value": value, "low": low, "high": high})
    return rows
