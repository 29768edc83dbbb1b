"""Every study of notebook 06 by its name.

A machine without notebooks runs some of them by::

    python -P -m meteora.study.ablation_studies --profile smollm2 --studies reference gates --time-limit 500

What they find is kept in ``artifacts/<profile>/ablations``, variant by variant, and notebook 06 takes it from there. At
its end, also when the time is up, the command writes ``results/<profile>/metrics/ablations.csv`` with all that is kept.
With ``--recorded FILE`` it begins with what such a file has of the present inputs, so that one machine can go on where
another stopped: notebooks 01 and 02 leave the same adapters and gates on both, if their GPUs and packages are the same.
On several GPUs one process does study ``reference``, which all need, and then each of four does every fourth variant::

    python -P -m meteora.study.ablation_studies --studies reference
    for n in 1 2 3 4; do CUDA_VISIBLE_DEVICES=$((n - 1)) python -P -m meteora.study.ablation_studies --share $n/4 & done; wait
"""

from __future__ import annotations

import argparse
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from data_prep.errors import DataError
from meteora.study import (
    ablations_composites,
    ablations_formats,
    ablations_gates,
    ablations_reference,
    ablations_routing,
    ablations_speed,
    ablations_tasks,
)
from meteora.study.ablations import COLUMNS, Ablations, Variant
from meteora.study.artifacts import ArtifactError, Workspace, set_up
from meteora.study.locking import hold
from meteora.study.measures import Row
from meteora.study.profiles import ProfileError, load_profile
from meteora.study.records import RunError

logger = logging.getLogger(__name__)

STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {
    **ablations_reference.STUDIES,
    **ablations_routing.STUDIES,
    **ablations_gates.STUDIES,
    **ablations_tasks.STUDIES,
    **ablations_composites.STUDIES,
    **ablations_formats.STUDIES,
    **ablations_speed.STUDIES,
}


def run_studies(
    ablations: Ablations, names: Sequence[str], *, time_limit: float | None = None, share: tuple[int, int] = (1, 1)
) -> bool:
    """Run these studies and log each variant's means and time; whether all are done.

    Args:
        time_limit: seconds after which no other variant is begun. The same call goes on later.
        share: (n, N), to do the n-th of N shares of their variants: every N-th, as a study's variants cost about the same.
    """
    end = None if time_limit is None else time.monotonic() + time_limit
    variants = ((name, variant) for name in names for variant in STUDIES[name](ablations))
    for name, variant in itertools.islice(variants, share[0] - 1, None, share[1]):
        if end is not None and time.monotonic() > end:
            return False
        found = ablations.run(name, [variant])
        if len(found):
            logger.info("%s: %s\n%s", name, variant.name, _summary(found))
    return True


def _require_reference(ablations: Ablations) -> None:
    """All shares read the reference's answers, which one process must have left."""
    if any(ablations.kept("reference", variant) is None for variant in STUDIES["reference"](ablations)):
        raise ArtifactError("every share needs the reference; run this with --studies reference, and then in shares")


def _read_share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 1/4, 2/4, 3/4 and 4/4 for those of four processes")
    return int(found[1]), int(found[2])


def take_recorded(ablations: Ablations, path: Path) -> None:
    """Keep what an `ablations.csv` has of variants with the present inputs; log how much that is.

    Raises:
        ArtifactError: if there is no such file, or it is another.
    """
    try:
        recorded = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from None
    missing = set(COLUMNS) - set(recorded)
    if missing:
        raise ArtifactError(f"{path} is no ablations.csv of this version: it lacks {', '.join(sorted(missing))}")
    taken = [ablations.take(name, variant, recorded) for name, study in STUDIES.items() for variant in study(ablations)]
    logger.info("%d of %d variants are taken from %s", sum(taken), len(taken), path)


def write_kept(ablations: Ablations) -> None:
    """Write `ablations.csv` with the rows of all variants that are kept, of every study; log those that are not."""
    rows: list[Row] = []
    missing = []
    for name, study in STUDIES.items():
        for variant in study(ablations):
            kept = ablations.kept(name, variant)
            if kept is None and variant.produce is not None:
                missing.append(f"{name}: {variant.name}")
            rows += kept or []
    if rows:
        ablations.workspace.write_csv("ablations.csv", pd.DataFrame(rows, columns=COLUMNS))
    if missing:
        logger.info("not yet: %s", ", ".join(missing))


def _summary(rows: pd.DataFrame) -> str:
    """What is no single task's."""
    rows = rows[rows["task"].isna() | (rows["task"] == "ALL")]
    return rows[["method", "metric", "value", "low", "high"]].dropna(axis=1, how="all").to_string(index=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 (also when the time is up), 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -P -m meteora.study.ablation_studies", description="Run ablations.")
    parser.add_argument("--profile", default="smollm2", metavar="NAME", help="a profile's name or .yaml file (smollm2)")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="instead of all")
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="an ablations.csv to take finished variants from")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no variant after that time")
    parser.add_argument("--share", type=_read_share, default=(1, 1), metavar="N/M", help="the N-th of M processes' share")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        workspace = Workspace(load_profile(options.profile))
        if workspace.profile.ablations is None:
            raise ProfileError(f"profile {workspace.profile.name!r} has no section ablations; give it one")
        with hold(workspace, together=True):
            ablations = Ablations(workspace, device=set_up(workspace.profile))
            if options.recorded is not None:
                take_recorded(ablations, options.recorded)
            if options.share[1] > 1:
                _require_reference(ablations)
            complete = run_studies(ablations, options.studies, time_limit=options.time_limit, share=options.share)
            write_kept(ablations)
    except (ProfileError, ArtifactError, RunError, DataError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    logger.info("%s", "complete" if complete else "The time is up; the same command goes on where this one stopped.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
