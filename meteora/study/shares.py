"""The answers that notebooks 03 and 04 look at, given by several processes, each on a GPU of its own.

    PYTHONSAFEPATH=1 accelerate launch --num_processes 4 -m meteora.study.shares --profile llama3-8b

Every process holds the whole model and produces its share of the files of predictions, so no file has two writers. The
notebooks then find them on disk and have only to score. The shares follow from the profile alone: nothing is sent from
one process to another, and what an interrupted run has left is kept, by any number of processes.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from data_prep.errors import DataError
from meteora.study.artifacts import ArtifactError, Workspace, set_up
from meteora.study.composite import can_run, composite_runs, predict_composite
from meteora.study.evaluation import answered_together, predict_independent
from meteora.study.locking import hold
from meteora.study.measures import Example
from meteora.study.opening import Study, open_study
from meteora.study.profiles import Profile, ProfileError, load_profile
from meteora.study.records import RunError

logger = logging.getLogger(__name__)

WRITTEN = 20  # A token that is written takes a pass of its own: on a GPU about the time in which twenty are read.


class Work(NamedTuple):
    """Files of predictions that are made together, of one method.

    Attributes:
        name: to be shown.
        cost: grows with the time that it takes.
        produce: makes what is missing of them.
    """

    name: str
    cost: int
    produce: Callable[[], object]


class Place(NamedTuple):
    """A process among those that were launched: its number, how many there are, and its number on this machine."""

    process: int
    processes: int
    local: int


def take_place() -> Place:
    """The place that accelerate has given this process in the environment; without accelerate, of a single one.

    It is taken out of there: a classifier that has to be trained first is trained by one process, while others wait.
    """
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return Place(*(int(os.environ.pop(name, alone)) for name, alone in names.items()))


def share(costs: Sequence[int], process: int, processes: int) -> list[int]:
    """Which pieces of work, given the costs of all, one of the processes does: positions in ``costs``.

    The costliest are given away first, each to the process that has least to do so far.
    """
    order = list(range(len(costs)))
    # Files of a task cost the same, whichever the method: in the methods' order, one process would have a slow method's
    # for every task.
    random.Random(0).shuffle(order)
    order.sort(key=lambda i: costs[i], reverse=True)
    loads, mine = [0] * processes, []
    for i in order:
        least = loads.index(min(loads))
        loads[least] += costs[i]
        if least == process:
            mine.append(i)
    return sorted(mine)


def independent_work(study: Study) -> list[Work]:
    """What notebook 03 asks of the methods. Tasks that share batches there are one piece, and share them here."""
    settings, tests = study.workspace.profile.evaluation, study.tests
    limits = study.answer_limits(cap=settings.max_new_tokens)
    return [
        Work(
            f"{name}: {', '.join(group)}",
            _cost(row for task in group for row in tests[task]),
            partial(
                predict_independent,
                {name: method},
                {task: tests[task] for task in group},
                tokenizer=study.tokenizer,
                predictions_dir=study.workspace.predictions,
                batch_size=settings.batch_size,
                max_new_tokens=limits,
                tokens_per_batch=settings.tokens_per_batch,
                progress=False,
            ),
        )
        for name, method in study.methods.items()
        for group in answered_together(method, tests, limits, settings.batch_size)
    ]


def composite_work(study: Study) -> list[Work]:
    """What notebook 04 asks of the methods; of those with gates, every temperature is a piece."""
    profile = study.workspace.profile
    limits = study.answer_limits(cap=profile.composite.max_new_tokens_per_answer)
    return [
        Work(
            f"composite-{run.size}, {run.protocol}: {name}",
            _cost(example for item in run.items for example in item.examples),
            partial(
                predict_composite,
                {name: method},
                run.items,
                run.protocol,
                tokenizer=study.tokenizer,
                predictions_dir=run.predictions_dir,
                limits=limits,
                batch_size=profile.composite.batch_size,
                tokens_per_batch=profile.evaluation.tokens_per_batch,
                temperatures=temperatures,
                progress=False,
            ),
        )
        for run in composite_runs(study.workspace)
        for name, method in study.methods.items()
        if can_run(method, run.protocol)
        for temperatures in ([[t] for t in run.temperatures] if method.gated else [run.temperatures])
    ]


def _cost(rows: Iterable[Example]) -> int:
    return sum(len(row["prompt"]) + WRITTEN * len(row["response"]) for row in rows)


def answer_share(workspace: Workspace, place: Place) -> None:
    """Produce one process's share of the predictions of notebooks 03 and 04.

    Raises:
        ArtifactError: naming the notebook that has to be run first, or as there is no GPU for the process.
    """
    profile = workspace.profile
    for number, methods, work_of in (
        ("03", profile.evaluation.methods, independent_work),
        ("04", profile.composite.methods, composite_work),
    ):
        device = own_device(profile, place.local)
        with _one_at_a_time(workspace):  # what methods have to learn or search first, the first process leaves on disk
            study = open_study(workspace, methods, device=device)
        _answer(work_of(study), place, f"notebook {number}, share 1 of {place.processes}")
        del study
        gc.collect()  # its models hold each other; the next study is another one of the same size


def _answer(work: Sequence[Work], place: Place, title: str) -> None:
    costs = [piece.cost for piece in work]
    mine = share(costs, place.process, place.processes)
    total, form = sum(costs[i] for i in mine), "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=total, desc=title, bar_format=form, disable=place.process > 0) as bar:
        for i in mine:
            bar.set_postfix_str(work[i].name)
            work[i].produce()
            bar.update(costs[i])


def own_device(profile: Profile, number: int) -> torch.device:
    """What the ``number``-th process on this machine computes on: the GPU of that number, or the CPU; see `set_up`."""
    device = set_up(profile)
    if device.type != "cuda":
        return device
    if number >= torch.cuda.device_count():
        raise ArtifactError(
            f"there are more processes than GPUs here; give accelerate --num_processes {torch.cuda.device_count()}."
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@contextmanager
def _one_at_a_time(workspace: Workspace) -> Iterator[None]:
    """Wait until no other process is inside. A process that dies is inside no more."""
    with open(workspace.predictions / ".opening.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -P -m meteora.study.shares", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="laptop", metavar="NAME", help="a profile's name or .yaml file (laptop)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        workspace = Workspace(load_profile(options.profile))
        with hold(workspace, together=True):
            answer_share(workspace, take_place())
    except (ProfileError, ArtifactError, RunError, DataError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
