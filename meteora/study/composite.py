"""Composite-n: several tasks in one inference (Table 2), in three protocols.

- `numbered`: the paper's. Two examples of a composite prompt, then n problems; the answers are the numbered lines of
  one answer.
- `guided`: the same prompts. The scaffold is not the model's task: a logits processor writes `1.`, and at every end of
  a line or of the text the next number, until n answers stand (`guided.py`).
- `sequential`: problem, answer, next problem, ... in one growing context and one KV cache (`sequential.py`).

A sub-answer that is missing or empty is not attempted, and wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from data_prep.composite import CompositeItem, build_composites, parse_answers
from data_prep.errors import DataError
from data_prep.prepare import prepared_tasks
from meteora.batches import token_ids
from meteora.study.artifacts import Workspace
from meteora.study.baselines import Method, with_temperature
from meteora.study.evaluation import iterate_answers, smaller
from meteora.study.guided import GuidedNumbering
from meteora.study.measures import Row, interval_row, strict_scores, task_rows
from meteora.study.predictions import file_name, reuse_or_produce
from meteora.study.sequential import answer_in_sequence
from meteora.study.statistics import paired_difference

logger = logging.getLogger(__name__)

PROTOCOLS = ("numbered", "guided", "sequential")

Answers = list[list[str | None]]  # one list per item, one answer (None: not attempted) per sub-task
# method -> temperature -> answers; methods without gates have the same answers at every temperature
CompositePredictions = dict[str, dict[float, Answers]]


class CompositeRun(NamedTuple):
    """Items that all methods answer in one protocol.

    Attributes:
        size: sub-tasks of an item.
        shots: solved examples in the prompts.
        temperatures: of the gates: the profile's for that size, and the 1 that they were trained with.
        predictions_dir: of `predict_composite`.
    """

    size: int
    protocol: str
    shots: int
    items: list[CompositeItem]
    temperatures: list[float]
    predictions_dir: Path


def composite_runs(workspace: Workspace) -> list[CompositeRun]:
    """Every size in every protocol of the profile, those of `zero_shot` without solved examples as well.

    A protocol with fewer items has the first of another's. Sizes with a task that could not be had are left out.

    Raises:
        DataError: if none is left, or examples are too few.
    """
    profile, found = workspace.profile, []
    settings, predictions = profile.composite, workspace.predictions
    most = max(map(settings.count, settings.protocols))
    kinds = [(protocol, settings.shots) for protocol in settings.protocols]
    kinds += [(protocol, 0) for protocol in settings.zero_shot]
    prepared = prepared_tasks(workspace.data)
    for size, tasks in settings.sizes.items():
        if missing := [task for task in tasks if task not in prepared]:
            logger.warning("composites of %d are left out, as %s could not be prepared", size, ", ".join(missing))
            continue
        temperatures = list(dict.fromkeys([settings.temperature.get(size, 1.0), 1.0]))
        built = {
            shots: build_composites(workspace.data, tasks, most, shots=shots, seed=profile.seed)
            for shots in dict.fromkeys(shots for _, shots in kinds)
        }
        for protocol, shots in dict.fromkeys(kinds):
            items = built[shots][: settings.count(protocol)]
            folder = predictions if shots == settings.shots else predictions / f"{shots}-shot"
            found.append(CompositeRun(size, protocol, shots, items, temperatures, folder))
    if not found:
        raise DataError("every composite of the profile has a task that could not be prepared; name others in composite.sizes.")
    return found


def can_run(method: Method, protocol: str) -> bool:
    """Whether a method makes sense in a protocol: one that is told the task needs the problems one by one."""
    return protocol == "sequential" or not method.told_task


def predict_composite(
    methods: Mapping[str, Method],
    items: Sequence[CompositeItem],
    protocol: str,
    *,
    tokenizer,
    predictions_dir: str | Path,
    limits: Mapping[str, int],
    batch_size: int,
    tokens_per_batch: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    progress: bool = True,
) -> CompositePredictions:
    """Answers of every method to every composite item.

    They are stored after every batch in `predictions_dir/composite-n/<protocol>/<method>.jsonl`, of methods with gates
    in `<method>@<temperature>.jsonl`, and taken from there as long as weights, method, prompts and settings are the
    same.

    Args:
        methods: those that are told the task run in `sequential` only.
        items: of one set, all with n sub-tasks.
        protocol: one of `PROTOCOLS`.
        limits: task -> most new tokens of one answer. In `numbered` the whole list may take what they come to.
        batch_size: items at once; fewer where their prompts are more than `tokens_per_batch` tokens.
        temperatures: of the gates' softmax over the chosen adapters (the paper: 15, 20, 30 for composite-3, 5, 10).
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"Unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}.")
    told = [name for name, method in methods.items() if not can_run(method, protocol)]
    if told:
        raise ValueError(f"Method {told[0]!r} has to be told the task, so it cannot run in protocol {protocol!r}.")
    runs = [
        (method, list(temperatures[i : i + 1]) if method.gated else list(temperatures))
        for method in methods.values()
        for i in range(len(temperatures) if method.gated else 1)
    ]
    sizes = batch_size, tokens_per_batch
    predictions: CompositePredictions = {name: {} for name in methods}
    with tqdm(total=len(runs) * len(items), unit="item", disable=not progress) as bar:
        for method, ran_for in runs:
            bar.set_description(f"{protocol}: {method.name}" + (f", T={ran_for[0]:g}" if method.gated else ""))
            run = with_temperature(method, ran_for[0])
            answers = _predict_run(run, ran_for[0], items, protocol, tokenizer, Path(predictions_dir), limits, sizes, bar)
            predictions[method.name] |= {temperature: answers for temperature in ran_for}
    return predictions


def _predict_run(
    method: Method,
    temperature: float,
    items: Sequence[CompositeItem],
    protocol: str,
    tokenizer,
    predictions_dir: Path,
    limits: Mapping[str, int],
    sizes: tuple[int, int | None],
    bar: tqdm,
) -> Answers:
    n = len(items[0].examples)
    limits = {example["task"]: limits[example["task"]] for item in items for example in item.examples}
    lines = [limits[example["task"]] for example in items[0].examples]
    prompts = {
        item.id: [example["prompt"] for example in item.examples] if protocol == "sequential" else item.prompt
        for item in items
    }
    of_answers = limits if protocol == "sequential" else lines
    header = {**method.identity(), "protocol": protocol, "limits": of_answers, "prompts": prompts}
    if method.told_task:
        header["tasks"] = {item.id: [example["task"] for example in item.examples] for item in items}
    name = method.name
    if method.gated:
        header["temperature"] = temperature
        name += f"@{temperature:g}"
    done = 0

    def produce(missing: list[int]) -> Iterator[dict[int, Any]]:
        nonlocal done
        for batch in _batches(method, [items[i] for i in missing], protocol, tokenizer, limits, lines, *sizes):
            yield {missing[i]: prediction for i, prediction in batch.items()}
            bar.update(len(batch))
            done += len(batch)

    path = predictions_dir / file_name(f"composite-{n}", protocol, name)
    stored = reuse_or_produce(path, header, [item.id for item in items], produce)
    bar.update(len(items) - done)
    if protocol == "sequential":
        return [[text or None for text in texts] for texts in stored]
    return [parse_answers(text, n) for text in stored]


def _batches(
    method: Method,
    items: Sequence[CompositeItem],
    protocol: str,
    tokenizer,
    limits: Mapping[str, int],
    lines: Sequence[int],
    batch_size: int,
    tokens_per_batch: int | None,
) -> Iterator[dict[int, Any]]:
    """Predictions as they are stored: the generated text, or for `sequential` one text per answer."""
    tokens_per_batch = smaller(tokens_per_batch, method.tokens_per_batch)
    if protocol == "sequential":
        if tokens_per_batch is not None:
            problems = [example["prompt"] for item in items for example in item.examples]
            longest = max(map(len, token_ids(tokenizer, problems)))
            batch_size = min(batch_size, max(1, tokens_per_batch // longest))
        for batch in answer_in_sequence(
            method.model,
            tokenizer,
            [item.examples for item in items],
            limits=limits,
            batch_size=batch_size,
            active=method.active,
        ):
            yield {
                i: [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
                for i, answers in batch.items()
            }
        return
    guide = GuidedNumbering(tokenizer, lines)
    guided = {"processor": guide, "decode": guide.text} if protocol == "guided" else {}
    with method.active():
        yield from iterate_answers(
            method.model,
            tokenizer,
            [item.prompt for item in items],
            batch_size=batch_size,
            max_new_tokens=guide.max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            **guided,
        )


def score_composite(items: Sequence[CompositeItem], answers: Answers) -> dict[str, list[float]]:
    """Per item, how many of its sub-answers were `attempted`, and how many `correct` by the strict accuracy.

    Sub-tasks without an accuracy count as attempted only.
    """
    return {
        "attempted": [float(sum(answer is not None for answer in row)) for row in answers],
        "correct": [
            sum(strict_scores(item.examples, [answer or "" for answer in row]))
            for item, row in zip(items, answers, strict=True)
        ],
    }


def composite_rows(
    items: Sequence[CompositeItem], protocol: str, predictions: CompositePredictions, *, shots: int
) -> list[Row]:
    """Rows of `composite.csv`: `composite,protocol,shots,temperature,subtask,method,metric,value,low,high,n`.

    Every sub-task has the metrics of its task; sub-task `ALL` has `attempted` and `correct`, means per item out of n.
    A method without gates does not depend on the temperature: its rows are repeated, so that every temperature has all
    methods.

    Args:
        shots: examples in the prompt; `sequential` has none, and its rows say 0.
    """
    examples = [example for item in items for example in item.examples]
    tasks = list(dict.fromkeys(example["task"] for example in examples))
    rows: list[Row] = []
    for method, by_temperature in predictions.items():
        measured: dict[int, list[Row]] = {}  # repeated answers are measured once
        for temperature, answers in by_temperature.items():
            if id(answers) not in measured:
                texts = [answer or "" for row in answers for answer in row]
                measured[id(answers)] = [
                    {"subtask": "ALL", "method": method, **interval_row(metric, values)}
                    for metric, values in score_composite(items, answers).items()
                ]
                for task in tasks:
                    own = [i for i, example in enumerate(examples) if example["task"] == task]
                    measured[id(answers)] += [
                        {"subtask": task, "method": method, **row}
                        for row in task_rows([examples[i] for i in own], [texts[i] for i in own])
                    ]
            setting = {
                "composite": len(items[0].examples),
                "protocol": protocol,
                "shots": 0 if protocol == "sequential" else shots,
                "temperature": temperature,
            }
            rows += [setting | row for row in measured[id(answers)]]
    return rows


def paired_composite_rows(
    items: Sequence[CompositeItem],
    predictions: CompositePredictions,
    pairs: Iterable[tuple[str, str]],
    *,
    temperature: float,
) -> list[Row]:
    """Differences of two methods on the same items: `method,other,metric,value,low,high`, of attempted and correct."""
    pairs = list(pairs)
    names = dict.fromkeys(name for pair in pairs for name in pair)
    scores = {name: score_composite(items, predictions[name][temperature]) for name in names}
    rows: list[Row] = []
    for method, other in pairs:
        for metric in scores[method]:
            value, low, high = paired_difference(scores[method][metric], scores[other][metric])
            rows.append({"method": method, "other": other, "metric": metric, "value": value, "low": low, "high": high})
    return rows
