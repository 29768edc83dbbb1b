"""The command line of measurements that no notebook makes: a profile's, on a device, into a CSV file."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from meteora.study.artifacts import ArtifactError, Workspace, set_up, write_text
from meteora.study.benchmark_rows import where_measured
from meteora.study.profiles import Profile, ProfileError, load_profile

logger = logging.getLogger(__name__)


def on_device(profile: Profile, device: str | None) -> Profile:
    """The profile with its model on that device, if one is named."""
    return replace(profile, model=replace(profile.model, device=device)) if device else profile


def measure_to_file(
    measure: Callable[[Profile, torch.device], Iterable[Mapping[str, Any]]], columns: Sequence[str],
    arguments: Sequence[str] | None, *, module: str, description: str, profile: str, file: str,
) -> int:  # fmt: skip
    """Read a command line, and write the rows that ``measure`` yields as they come: what is measured is not lost.

    Args:
        measure: yields rows without the columns that say where they were measured.
        columns: of the file, those included.
        arguments: as `argparse` takes them.
        module: by whose name the command is started.
        profile: the one that is measured if none is named.
        file: written among the profile's metrics, unless the command line names another.

    Returns:
        The exit status: 0, or 2 for what cannot be run.
    """
    parser = argparse.ArgumentParser(prog=f"python -P -m {module}", description=description)
    parser.add_argument("--profile", default=profile, metavar="NAME", help=f"a profile's name or .yaml file ({profile})")
    parser.add_argument("--output", metavar="FILE", help=f"instead of results/NAME/metrics/{file}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the profile's")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows: list[dict[str, Any]] = []
    try:
        workspace = Workspace(load_profile(options.profile))
        path = Path(options.output) if options.output else workspace.metrics / file
        chosen = on_device(workspace.profile, options.device)
        device = set_up(chosen)
        for row in measure(chosen, device):
            rows.append({**row, **where_measured(device)})
            frame = pd.DataFrame(rows, columns=columns)
            write_text(path, frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    except (ProfileError, ArtifactError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    return 0
