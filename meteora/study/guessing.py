"""What is right without a look at the prompt: the floor under the accuracies of multiple-choice tasks.

Notebook 01 writes ``guessing.csv``, later ones show it beside what methods get right. It needs no model, so any machine
can do that::

    .venv/bin/python -P -m meteora.study.guessing --profile smollm2
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd

from data_prep.errors import DataError
from data_prep.prepare import load_split, prepared_tasks
from data_prep.tasks import get_task
from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.examples import prepare_examples
from meteora.study.measures import Example, Row, interval_row, references, strict_scores
from meteora.study.profiles import ProfileError, load_profile
from meteora.study.scoring import score
from meteora.study.tables import INDEPENDENT_COLUMNS, scored_tasks

logger = logging.getLogger(__name__)

FILE = "guessing.csv"


def guessing_rows(train: Mapping[str, Sequence[Example]], tests: Mapping[str, Sequence[Example]]) -> list[Row]:
    """Rows of ``guessing.csv``, `task,method,metric,value,low,high,n` as in ``independent.csv``, by strict accuracy.

    Method ``chance`` takes one of a question's choices at random: its value is the expectation, which has no interval,
    and 0 where there are no choices. ``majority`` gives the answer that is right most often in the training examples. Tasks
    without an accuracy have no row.
    """
    rows = []
    for task, examples in tests.items():
        if get_task(task).accuracy is None:
            continue
        chance = [len(_right(e)) / len(e["choices"]) if e["choices"] else 0.0 for e in examples]
        answers = Counter(answer for e in train[task] for answer in (_right(e) if e["choices"] else references(e)))
        most_frequent = min(answers, key=lambda answer: (-answers[answer], answer))
        majority = strict_scores(examples, [most_frequent] * len(examples))
        expected = {"metric": "accuracy", "value": sum(chance) / len(chance), "low": None, "high": None, "n": len(chance)}
        rows.append({"task": task, "method": "chance", **expected})
        rows.append({"task": task, "method": "majority", **interval_row("accuracy", majority)})
    return rows


def _right(example: Example) -> list[str]:
    """The choices that count as right."""
    task, choices = get_task(example["task"]), example["choices"]
    return [choice for choice in choices if score(task, choice, references(example), choices)]


def tasks_at_a_guess(guessing: pd.DataFrame, independent: pd.DataFrame) -> tuple[int, int]:
    """In how many tasks the interval of `peft` reaches down to the better guess, and of how many tasks."""
    better = better_guess(guessing)
    own = independent[(independent["metric"] == "accuracy") & (independent["method"] == "peft")].set_index("task")
    return int((own["low"] <= better.reindex(own.index)).sum()), len(own)


def expected_correct(guessing: pd.DataFrame, composite: pd.DataFrame) -> dict[int, float]:
    """Size of a composite -> the right answers of an item by the better guess of each task, by the frames of the two files."""
    better = better_guess(guessing)
    return {size: float(better[tasks].sum()) for size, tasks in scored_tasks(composite).items()}


def better_guess(guessing: pd.DataFrame) -> pd.Series:
    """Task -> the accuracy of the better of the two guesses."""
    return guessing.groupby("task")["value"].max()


def guess(workspace: Workspace) -> pd.DataFrame:
    """The rows for the examples that methods are tested on, once they are prepared."""
    tasks = prepared_tasks(workspace.data)
    train, tests = ({task: load_split(workspace.data, task, split) for task in tasks} for split in ("train", "test"))
    count = workspace.profile.evaluation.test_samples
    rows = guessing_rows(train, {task: rows[:count] for task, rows in tests.items()})
    return pd.DataFrame(rows, columns=list(INDEPENDENT_COLUMNS))


def load_guessing(workspace: Workspace) -> pd.DataFrame:
    """What notebook 01 has left.

    Raises:
        ArtifactError: if it has not.
    """
    path = workspace.metrics / FILE
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: run notebook 01_adapter_collection first.")
    return pd.read_csv(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -P -m meteora.study.guessing", description="Score answers by guess.")
    parser.add_argument("--profile", default="laptop", metavar="NAME", help="a profile's name or .yaml file (laptop)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        workspace = Workspace(load_profile(options.profile))
        prepare_examples(workspace)
        found = guess(workspace)
        workspace.write_csv(FILE, found)
    except (ProfileError, DataError) as error:
        logger.error("error: %s", error)
        return 2
    logger.info("%s", found.pivot(index="task", columns="method", values="value").round(3).to_string())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
