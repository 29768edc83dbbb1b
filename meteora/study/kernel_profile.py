"""What limits each kernel: its own time, and how much of the GPU's throughput it used, by Nsight Compute's counters.

Every case is one call in one setting of the benchmark, with caches flushed before each kernel, as ``ncu`` does it::

    python -P -m meteora.study.kernel_profile --output kernel_profile.csv

runs itself under ``ncu`` and writes one row a kernel, in the columns COLUMNS. ``time_us`` is the kernel's own time, at
the clock the GPU ran at; ``memory``, ``compute`` are the parts of the peak throughput of the memory system and of the
multiprocessors that it reached (Nsight Compute's "Speed Of Light"), ``occupancy`` that of the warps in flight.
"""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd
import torch

from meteora.study.artifacts import write_text
from meteora.study.benchmark_layer import Cell, backward_pass, forward_pass, make_operands
from meteora.study.benchmark_rows import where_measured

logger = logging.getLogger(__name__)

COLUMNS = (
    "mode", "backend", "routing", "tokens", "adapters", "rank", "top_k", "in_features", "out_features", "order", "kernel",
    "time_us", "memory", "compute", "occupancy", "device", "torch", "triton",
)  # fmt: skip
# Nsight Compute's names (section, metric) of the columns that are percentages.
SHARES = {"memory": "Memory Throughput", "compute": "Compute (SM) Throughput", "occupancy": "Achieved Occupancy"}
MICROSECONDS = {"us": 1.0, "usecond": 1.0, "ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}
BACKENDS = ("single_lora", "triton")
SEPARATOR = "spin"  # in the name of the kernel that torch.cuda._sleep starts: one stands before every case


def cases() -> list[tuple[str, Cell]]:
    """(mode, setting): the four layers of Llama-3-8B at rank 8, and what rank 64 does, for many tokens and for few."""
    sizes = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
    found = [
        ("forward", Cell(tokens, 28, 8, 2, *size, "bfloat16", "uniform"))
        for size, tokens in product(sizes, (16, 1024, 4096))
    ]
    found += [
        ("forward", Cell(tokens, 28, rank, 2, 4096, 4096, "bfloat16", "uniform"))
        for rank, tokens in ((8, 1), (64, 1), (64, 16))
    ]
    found += [("backward", Cell(4096, 28, 8, 2, *size, "bfloat16", "uniform")) for size in sizes]
    found += [("forward", Cell(4096, 28, 64, 2, 4096, 4096, "bfloat16", routing)) for routing in ("uniform", "runs")]
    return found


def run_cases(device: torch.device) -> None:
    """Every case once within the profiler's range, a separator before each; warm, so that nothing is compiled there."""
    prepare = {"forward": forward_pass, "backward": backward_pass}
    for mode, cell in cases():
        operands = make_operands(cell, device)
        for backend in BACKENDS:
            call = prepare[mode](backend, cell.top_k, operands)
            for _ in range(2):
                call()
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            call()
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()


def read_profile(text: str) -> list[dict[str, object]]:
    """Rows ``case`` (from 0), ``order``, ``kernel`` and the measured columns, of what ``ncu --csv`` printed."""
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise ValueError("ncu printed no table of kernels.")
    frame = pd.read_csv(io.StringIO("\n".join(lines[first:])), thousands=",", dtype={"Metric Value": str})
    rows, case, order = [], -1, 0
    for _, kernel in frame.groupby("ID", sort=True):
        name = kernel["Kernel Name"].iloc[0]
        if SEPARATOR in name:
            case, order = case + 1, 0
            continue
        values = {
            metric: (float(value.replace(",", "")), unit)
            for metric, value, unit in zip(kernel["Metric Name"], kernel["Metric Value"], kernel["Metric Unit"])
            if metric in ("Duration", *SHARES.values())
        }
        time, unit = values["Duration"]
        row = {"case": case, "order": order, "kernel": name, "time_us": time * MICROSECONDS[unit]}
        rows.append(row | {column: values[metric][0] / 100 for column, metric in SHARES.items()})
        order += 1
    return rows


def profile(device: torch.device) -> pd.DataFrame:
    """Run the cases under ``ncu`` and return the rows of all kernels.

    Raises:
        RuntimeError: without ``ncu``, or if it fails.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("ncu is not on the PATH; install NVIDIA Nsight Compute.")
    sections = [f"--section={name}" for name in ("SpeedOfLight", "Occupancy")]
    command = [
        ncu, "--csv", "--page=details", "--profile-from-start=off", "--clock-control=none", *sections,
        sys.executable, "-P", "-m", __spec__.name, "--run",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"ncu failed: {(found.stderr or found.stdout).strip()[-2000:]}")
    settings = [
        {"mode": mode, "backend": backend} | {name: getattr(cell, name) for name in COLUMNS[2:9]}
        for mode, cell in cases()
        for backend in BACKENDS
    ]
    where = where_measured(device)
    return pd.DataFrame([settings[row["case"]] | row | where for row in read_profile(found.stdout)])[list(COLUMNS)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 where nothing can be profiled."""
    parser = argparse.ArgumentParser(prog="python -P -m meteora.study.kernel_profile", description="Profile the kernels.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", metavar="FILE", help="the CSV file")
    what.add_argument("--run", action="store_true", help="run the cases alone, for a profiler that is attached already")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        logger.error("error: the kernels are profiled on a GPU, and there is none.")
        return 2
    device = torch.device("cuda")
    if options.run:
        run_cases(device)
        return 0
    try:
        frame = profile(device)
    except RuntimeError as error:
        logger.error("error: %s", error)
        return 2
    write_text(Path(options.output), frame.round(4).to_csv(index=False))
    logger.info("%d kernels of %d cases", len(frame), len(cases()) * len(BACKENDS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
