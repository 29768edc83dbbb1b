"""The benchmark: every way to compute the mixture, on whatever device there is, into the rows of ``benchmark.csv``.

Four levels, which are the file's ``workload``: the ``device`` itself (how fast it copies and multiplies), one linear
``layer`` in many settings, the ``tasks``' real prompts, the paper's Figure 5, and a whole ``model`` with random weights,
if the profile has one. Notebook 05 calls `record_benchmark`; a machine without notebooks does::

    python -P -m meteora.study.benchmark --profile smollm2 --output benchmark.csv
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import pandas as pd
import torch

from data_prep.errors import DataError
from meteora.backends import resolve
from meteora.study import figures
from meteora.study.artifacts import ArtifactError, Workspace, find_stage, set_up, write_bytes
from meteora.study.benchmark_measure import measure_device, measure_layers
from meteora.study.benchmark_model import measure_model
from meteora.study.benchmark_rows import RowFile, read_rows, where_measured
from meteora.study.benchmark_tasks import measure_tasks, prompt_lengths
from meteora.study.measuring import on_device
from meteora.study.predictions import fingerprint
from meteora.study.profiles import BenchmarkSettings, ProfileError, load_profile
from meteora.study.records import Records
from meteora.study.timing import Stopwatch

logger = logging.getLogger(__name__)

LEVELS = ("device", "layer", "tasks", "model")


class TimeIsUp(Exception):
    """The time limit was reached before everything was measured."""


def record_benchmark(workspace: Workspace, device: torch.device) -> pd.DataFrame:
    """Measure what the profile says, write ``metrics/benchmark.csv``, and return its rows.

    An interrupted run goes on where it was, unless anything that decides the results has changed meanwhile.
    """
    profile = workspace.profile
    state = fingerprint(Records(workspace).inputs(find_stage("05")))
    partial = workspace.artifacts / f"benchmark-{state}.csv"
    run_benchmark(profile.benchmark, partial, prompt_lengths(workspace), device=device, seed=profile.seed)
    path = write_bytes(workspace.metrics / "benchmark.csv", partial.read_bytes())
    partial.unlink()
    return read_rows(path)


def run_benchmark(
    settings: BenchmarkSettings,
    path: str | Path,
    lengths: dict[str, list[int]],
    *,
    device: torch.device,
    seed: int = 0,
    levels: Sequence[str] = LEVELS,
    time_limit: float | None = None,
    progress: bool = True,
) -> bool:
    """Measure what ``path`` does not hold yet, and append it there at once; whether that is all now.

    Args:
        lengths: task -> the tokens of each of its prompts, see `prompt_lengths`; needed by level ``tasks`` alone.
        time_limit: seconds after which nothing new is begun. The same call goes on later.

    Raises:
        AssertionError: if a strategy computes something else than float64 does.
        ArtifactError: if ``path`` holds something else, or rows of another machine.
        ProfileError: if a backend cannot run on ``device``.
    """
    studies = settings.model.studies if settings.model else ()
    for backend in dict.fromkeys((*settings.backends, *(name for study in studies for name in study.backends))):
        try:
            resolve(backend, device.type)
        except RuntimeError as error:
            raise ProfileError(f"benchmark.backends: {error}") from error
    file = RowFile(path, where_measured(device))
    end = time.perf_counter() + time_limit if time_limit is not None else None

    def go_on() -> None:
        if end is not None and time.perf_counter() >= end:
            raise TimeIsUp

    watch = Stopwatch(device, settings.repeats, settings.seconds)
    try:
        if "device" in levels and ("device",) not in file.keys("workload"):
            file.append(measure_device(settings, watch))
        if "layer" in levels:
            measure_layers(settings, file, watch, seed=seed, go_on=go_on, progress=progress)
        if "tasks" in levels:
            measure_tasks(settings, lengths, file, device, seed=seed, go_on=go_on, progress=progress)
        if "model" in levels:
            measure_model(settings, file, device, seed=seed, go_on=go_on, progress=progress)
    except TimeIsUp:
        return False
    return True


def draw(frame: pd.DataFrame) -> dict[str, matplotlib.figure.Figure]:
    """Name -> figure: all that ``benchmark.csv`` is drawn as."""
    drawn = {
        "benchmark_tokens": figures.benchmark_over(frame, "tokens"),
        "benchmark_tokens_backward": figures.benchmark_over(frame, "tokens", mode="backward"),
        "benchmark_ratios": figures.benchmark_ratios(frame, "forward"),
        "benchmark_ratios_backward": figures.benchmark_ratios(frame, "backward"),
        "benchmark_adapters": figures.benchmark_over(frame, "adapters"),
        "roofline": figures.roofline(frame),
        "figure5": figures.figure5_total_time(frame),
    }
    if (frame["workload"] == "model").any():
        drawn["benchmark_model"] = figures.model_speed(frame)
        drawn["benchmark_model_eager"] = figures.model_speed(frame, launch="eager")
    return drawn


# The command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 (also when the time is up), 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -P -m meteora.study.benchmark", description="Measure the backends.")
    parser.add_argument("--profile", default="laptop", metavar="NAME", help="a profile's name or .yaml file (laptop)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the CSV file; what it lacks is measured")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the profile's")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="instead of all four")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing new after that time")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw FILE into results/NAME/figures/")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        workspace = Workspace(load_profile(options.profile))
        profile = workspace.profile
        if options.draw:
            for name, figure in draw(read_rows(options.output)).items():
                workspace.save_figure(figure, name)
            return 0
        profile = on_device(profile, options.device)
        device = set_up(profile)
        lengths = prompt_lengths(workspace) if "tasks" in options.levels else {}
        complete = run_benchmark(
            profile.benchmark,
            options.output,
            lengths,
            device=device,
            seed=profile.seed,
            levels=options.levels,
            time_limit=options.time_limit,
        )
    except (ProfileError, ArtifactError, DataError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    logger.info("%s", "complete" if complete else "The time is up; the same command goes on where this one stopped.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
