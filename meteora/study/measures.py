"""From answers to rows of metrics: every metric a task has, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.tasks import get_task
from meteora.study.scoring import (
    ROUGE_METRICS,
    bleu_from_statistics,
    bleu_statistics,
    corpus_bleu_published,
    published,
    rouge_scores,
    score,
)
from meteora.study.statistics import bootstrap_interval, corpus_interval

Example = Mapping[str, Any]
Row = dict[str, Any]


def interval_row(metric: str, values: Sequence[float]) -> Row:
    """`metric,value,low,high,n` of a mean over samples."""
    value, low, high = bootstrap_interval(values)
    return {"metric": metric, "value": value, "low": low, "high": high, "n": len(values)}


def references(example: Example) -> list[str]:
    """All answers that count as right: `references` where an example has several, else its one response."""
    return example.get("references") or [example["response"]]


def strict_scores(examples: Sequence[Example], answers: Sequence[str], by: Callable[..., float] = score) -> list[float]:
    """1.0 or 0.0 per example by its task's strict accuracy, or by another scoring; tasks without one are left out."""
    pairs = zip(examples, answers, strict=True)
    tasks = {example["task"]: get_task(example["task"]) for example in examples}
    return [
        by(tasks[example["task"]], answer, references(example), example["choices"])
        for example, answer in pairs
        if tasks[example["task"]].accuracy is not None
    ]


def published_rows(
    examples: Mapping[str, Sequence[Example]], answers: Mapping[str, Mapping[str, Sequence[str]]]
) -> list[Row]:
    """Rows of `published_scoring.csv`: the accuracy of the authors' code, for answers as method -> task -> strings."""
    return [
        {"task": task, "method": method, **interval_row("accuracy", strict_scores(examples[task], texts, published))}
        for method, by_task in answers.items()
        for task, texts in by_task.items()
        if get_task(task).accuracy is not None
    ]


def task_rows(examples: Sequence[Example], answers: Sequence[str]) -> list[Row]:
    """All metrics of the answers to examples of *one* task.

    `bleu_published` scores a single answer (see `scoring`), so it has no interval.
    """
    task = get_task(examples[0]["task"])
    rows: list[Row] = []
    if task.accuracy is not None:
        rows.append(interval_row("accuracy", strict_scores(examples, answers)))
    right = [references(example) for example in examples]
    if "bleu" in task.text_metrics:
        counts = np.stack([bleu_statistics(a, r) for a, r in zip(answers, right, strict=True)])
        value, low, high = corpus_interval(lambda drawn: bleu_from_statistics(counts[drawn].sum(0)), len(answers))
        rows.append({"metric": "bleu", "value": value, "low": low, "high": high, "n": len(answers)})
        as_published = corpus_bleu_published(answers, right)
        rows.append({"metric": "bleu_published", "value": as_published, "low": None, "high": None, "n": len(answers)})
    if "rouge" in task.text_metrics:
        scores = [rouge_scores(a, r) for a, r in zip(answers, right, strict=True)]
        rows += [interval_row(metric, [row[metric] for row in scores]) for metric in ROUGE_METRICS]
    return rows
