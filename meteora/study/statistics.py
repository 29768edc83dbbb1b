"""Seeded percentile bootstraps: how far a mean, a difference or a corpus metric would move with other test samples.

All intervals are percentile intervals over ``resamples`` draws with replacement (Efron and Tibshirani 1993,
chapter 13). They say nothing about other training seeds, and one of n equal values is a point: with few samples, all
right or all wrong, it is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95

Interval = tuple[float, float, float]


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Mean of ``values`` (n,) and the interval of that mean: (mean, low, high).

    Raises:
        ValueError: if there are no values, or one is not finite.
    """
    values = _checked(values)
    draws = _resampled_means(values, resamples, np.random.default_rng(seed))
    return float(values.mean()), *_percentiles(draws, confidence)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Mean of ``first - second`` and its interval; entry i of both must belong to the same sample.

    Pairs are drawn whole, so what makes a sample hard for both methods cancels.

    Raises:
        ValueError: if the two are not of the same length.
    """
    return bootstrap_interval(_differences(first, second), resamples=resamples, confidence=confidence, seed=seed)


def mean_over_tasks(
    values: Mapping[str, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Mean over tasks of each task's mean, every task counting the same; samples are drawn within their task.

    Args:
        values: task -> values of its samples. The tasks are taken as given, not as a sample of all tasks.
    """
    if not values:
        raise ValueError("there is no task to take a mean over; give at least one.")
    rng = np.random.default_rng(seed)
    tasks = [_checked(values[task], task) for task in sorted(values)]
    draws = np.mean([_resampled_means(task, resamples, rng) for task in tasks], axis=0)
    return float(np.mean([task.mean() for task in tasks])), *_percentiles(draws, confidence)


def paired_difference_over_tasks(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """:func:`mean_over_tasks` of the paired differences ``first - second``.

    Raises:
        ValueError: if the two do not have the same tasks, or a task not the same number of samples.
    """
    if set(first) != set(second):
        odd = ", ".join(sorted(set(first) ^ set(second)))
        raise ValueError(f"both methods need the same tasks; {odd} is on one side only.")
    differences = {task: _differences(first[task], second[task], task) for task in first}
    return mean_over_tasks(differences, resamples=resamples, confidence=confidence, seed=seed)


def corpus_interval(
    metric: Callable[[np.ndarray], float],
    count: int,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Value and interval of a metric that is no mean of samples' values, such as corpus BLEU.

    Args:
        metric: takes the indices (count,) int64 of the samples, some of them repeated, and returns the metric.
        count: number of samples.
    """
    if count < 1:
        raise ValueError("a corpus metric needs at least one sample.")
    rng = np.random.default_rng(seed)
    draws = np.array([metric(rng.integers(count, size=count)) for _ in range(resamples)])
    return float(metric(np.arange(count))), *_percentiles(draws, confidence)


def _differences(first: Sequence[float], second: Sequence[float], name: str = "paired values") -> np.ndarray:
    first, second = _checked(first, name), _checked(second, name)
    if first.shape != second.shape:
        raise ValueError(f"{name}: {len(first)} and {len(second)} samples cannot be paired; score the same samples.")
    return first - second


def _checked(values: Sequence[float], name: str = "values") -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: a bootstrap needs at least one value, in one dimension.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: every value must be finite.")
    return array


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """values (n,) -> the means (resamples,) of that many draws of n with replacement."""
    return values[rng.integers(values.size, size=(resamples, values.size))].mean(axis=1)


def _percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return float(low), float(high)
