"""Independent evaluation: every method answers the test samples of every task, one prompt at a time (Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from meteora.batches import token_ids
from meteora.study.baselines import Method
from meteora.study.decoding import (
    EncodedPrefix, ScoreProcessor, TranscriptBatch, common_prefix_length, model_device,
)  # fmt: skip
from meteora.study.measures import Example, Row, strict_scores, task_rows
from meteora.study.predictions import PredictionFile, file_name
from meteora.study.statistics import paired_difference_over_tasks

# Tokens times parameters: with less to encode, a GPU is done while Python starts a pass. Of a model of 135M parameters
# that is 15,000 tokens.
WORTH_A_PASS = 2e12

Accuracies = dict[str, dict[str, list[float]]]  # method -> task -> 1.0 or 0.0 per sample


def answer_budget(tokenizer, responses: Iterable[str], *, cap: int) -> int:
    """How many new tokens an answer of a task may take: twice its longest *training* response, 8 at least, `cap` at
    most.

    Answers of most tasks are a few tokens long; a method that has not learned to stop would otherwise spend most of the
    run's time on text that no metric looks at. Test responses are not consulted.
    """
    longest = max(map(len, token_ids(tokenizer, list(responses), add_special_tokens=False)), default=0)
    return min(cap, max(8, 2 * longest))


def iterate_answers(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int | Sequence[int],
    tokens_per_batch: int | None = None,
    processor: ScoreProcessor | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Iterator[dict[int, str]]:
    """Greedy answers, one batch after another as {position in `prompts`: answer}. See `generate_answers`.

    Args:
        max_new_tokens: of all answers, or of each.
        tokens_per_batch: most tokens of the prompts in a batch, pads included (but one prompt at least).
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    encoded = token_ids(tokenizer, prompts)
    shared = common_prefix_length(encoded)
    if not _worth_a_pass(model, shared * (len(prompts) - 1)):
        shared = 0
    prefix = EncodedPrefix(model, encoded[0][:shared]) if shared else None
    if decode is None:
        decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True).strip()  # noqa: E731
    # longest first: little padding, and memory that suffices for the first batch suffices for all
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    while order:
        fitting = batch_size
        if tokens_per_batch is not None:
            fitting = min(batch_size, max(1, tokens_per_batch // len(encoded[order[0]])))
        batch, order = order[:fitting], order[fitting:]
        transcripts = TranscriptBatch(
            model,
            len(batch),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            prefix=prefix,
        )
        transcripts.extend([encoded[i][shared:] for i in batch])
        answers = transcripts.decode([limits[i] for i in batch], processor=processor, last=True)
        yield {i: decode(answer) for i, answer in zip(batch, answers, strict=True)}


def _worth_a_pass(model: torch.nn.Module, tokens: int) -> bool:
    """Whether a pass for a common prefix costs less than so many tokens that need not be encoded with the prompts."""
    if model_device(model).type != "cuda":
        return tokens > 0
    return tokens * sum(parameter.numel() for parameter in model.parameters()) >= WORTH_A_PASS


def generate_answers(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    processor: ScoreProcessor | None = None,
) -> list[str]:
    """Greedy answers to `prompts`: the new text only, without surrounding white space.

    Batches are sorted by length and left-padded. Tokens with which all prompts begin are encoded once, where that pays.
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
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> dict[str, dict[str, list[str]]]:
    """Answers of every method to every task's examples, as method -> task -> one string per example.

    They are stored in `predictions_dir/independent/<method>/<task>.jsonl` after every batch, and taken from there as
    long as weights, method, prompts and settings are the same. How answers are batched is no part of that: it changes
    none of them, up to rounding.
    """
    if isinstance(max_new_tokens, int):
        max_new_tokens = dict.fromkeys(examples, max_new_tokens)
    total = len(methods) * sum(map(len, examples.values()))
    answers: dict[str, dict[str, list[str]]] = {}
    with tqdm(total=total, unit="answer", disable=not progress) as bar:
        for name, method in methods.items():
            files = {
                task: _prediction_file(method, task, rows, Path(predictions_dir), max_new_tokens[task])
                for task, rows in examples.items()
            }
            bar.update(sum(len(file.ids) - len(file.missing()) for file in files.values()))
            for group in answered_together(method, examples, max_new_tokens, batch_size):
                bar.set_description(f"{name}: {group[0]}" + (f" and {len(group) - 1} more" if len(group) > 1 else ""))
                places = [(task, i) for task in group for i in files[task].missing()]
                if not places:
                    continue
                with method.active(group[0]):
                    for batch in iterate_answers(
                        method.model,
                        tokenizer,
                        [examples[task][i]["prompt"] for task, i in places],
                        batch_size=batch_size,
                        max_new_tokens=[max_new_tokens[task] for task, _ in places],
                        tokens_per_batch=smaller(tokens_per_batch, method.tokens_per_batch),
                    ):
                        for task in group:
                            own = {places[n][1]: text for n, text in batch.items() if places[n][0] == task}
                            if own:
                                files[task].add(own)
                        bar.update(len(batch))
            answers[name] = {task: file.all() for task, file in files.items()}
    return answers


def _prediction_file(
    method: Method, task: str, rows: Sequence[Example], predictions_dir: Path, limit: int
) -> PredictionFile:
    ids = [row["id"] for row in rows]
    header = {**method.identity(), "task": task, "prompts": dict(zip(ids, (row["prompt"] for row in rows)))}
    header |= {"max_new_tokens": limit}
    return PredictionFile(predictions_dir / file_name("independent", method.name, task), header, ids)


def answered_together(
    method: Method, examples: Mapping[str, Sequence[Example]], limits: Mapping[str, int], batch_size: int
) -> list[list[str]]:
    """The tasks that are answered together: each alone, unless batches have room for more than one task's examples.

    A step of decoding takes about the same time for few rows as for many, so tasks whose answers may be about equally
    long (within a factor of two) then share batches. A method that is told the task takes one task at a time.
    """
    if method.told_task or batch_size <= max(map(len, examples.values())):
        return [[task] for task in examples]
    groups: dict[int, list[str]] = {}
    for task in examples:
        groups.setdefault(limits[task].bit_length(), []).append(task)
    return list(groups.values())


def smaller(first: int | None, second: int | None) -> int | None:
    """The smaller of two limits, `None` being none."""
    return min((limit for limit in (first, second) if limit is not None), default=None)


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
    tokens_per_batch: int | None = None,
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
        tokens_per_batch=tokens_per_batch,
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
