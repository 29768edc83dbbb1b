"""The levels ``device`` and ``layer`` of the benchmark: time and memory of every strategy in every setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from tqdm.auto import tqdm

from meteora.study.benchmark_layer import (
    Cell,
    Expected,
    Operands,
    backward_pass,
    check,
    expect,
    forward_pass,
    gathered_bytes,
    make_operands,
    strategies,
)
from meteora.study.benchmark_results import BOUNDS
from meteora.study.benchmark_rows import NOT_CAPTURABLE, OUT_OF_MEMORY, RowFile, make_row
from meteora.study.profiles import BenchmarkSettings
from meteora.study.timing import Stopwatch, free_memory, measure_peak, waits_for_gpu

# What identifies a strategy's rows.
_STRATEGY = (
    "mode", "routing", "tokens", "adapters", "rank", "top_k", "in_features", "out_features", "dtype", "backend",
)  # fmt: skip


def measure_device(settings: BenchmarkSettings, watch: Stopwatch) -> list[dict[str, Any]]:
    """The two ceilings of a roofline: bytes copied (read and written) and multiplied-and-added numbers in a second.

    Their rows' backends are ``copy`` and ``matmul``; ``tokens`` is the number of rows of the matrices.
    """
    n, dtype = (8192 if watch.device.type == "cuda" else 1024), getattr(torch, settings.dtype)
    a, b = (torch.randn(n, n, device=watch.device, dtype=dtype) for _ in range(2))
    long = torch.empty(16, n, n, device=watch.device, dtype=dtype)  # far larger than any cache
    other = torch.empty_like(long)
    rows = []
    for backend, metric, work, call in (
        ("copy", "bytes_per_s", 2 * long.nbytes, lambda: other.copy_(long)),
        ("matmul", "flop_per_s", 2 * n**3, lambda: a @ b),
    ):
        call()
        median, low, high = watch.eager(lambda call=call: call)
        setting = {
            "workload": "device", "backend": backend, "mode": "forward", "launch": "eager", "routing": "none",
            "batch": 1, "tokens": n, "adapters": 0, "rank": 0, "top_k": 0, "in_features": n, "out_features": n,
            "dtype": settings.dtype,
        }  # fmt: skip
        rows.append(make_row(setting, metric, [1e6 * work / t for t in (median, high, low)]))
    return rows


def cases(settings: BenchmarkSettings) -> dict[tuple[Cell, str], set[str]]:
    """Every (cell, mode) of the profile's layer studies -> its launches; a setting of two studies is one case.

    Settings that share their operands are neighbours.
    """
    found: dict[tuple[Cell, str], set[str]] = {}
    for s in settings.layers:
        for size, n, rank, tokens, routing, k, mode in product(
            s.sizes, s.adapters, s.ranks, s.tokens, s.routings, s.top_k, s.modes
        ):
            cell = Cell(tokens, n, rank, min(k, n), *size, settings.dtype, routing)
            found.setdefault((cell, mode), set()).update(s.launches)
    return found


def measure_layers(
    settings: BenchmarkSettings,
    file: RowFile,
    watch: Stopwatch,
    *,
    seed: int,
    go_on: Callable[[], None],
    progress: bool,
) -> None:
    """Level ``layer``: metrics ``time_us`` and ``peak_bytes`` of every strategy in every case that ``file`` lacks.

    What cannot be measured is a row without a value whose unit says why: OUT_OF_MEMORY, or NOT_CAPTURABLE in a CUDA
    graph, beside which there is an eager row then. The results are first compared with float64.
    """
    names = strategies(settings.backends)
    done = file.keys("workload", *_STRATEGY)

    def key(cell: Cell, mode: str, name: str) -> tuple:
        values = {**asdict(cell), "mode": mode, "backend": name}
        return ("layer", *(values[column] for column in _STRATEGY))

    shared, operands = None, None
    for (cell, mode), launches in tqdm(cases(settings).items(), desc="layer", unit="setting", disable=not progress):
        missing = [name for name in names if key(cell, mode, name) not in done]
        if not missing:
            continue
        go_on()
        if shared != (shared := replace(cell, top_k=1)):
            operands = None  # its memory is needed now
            operands = _operands(cell, watch.device, seed)
        expected: dict[str, Expected] = {}
        rows = []
        for name in missing:
            if operands is None:
                rows += _without_memory(cell, mode, name)
            else:
                rows += _measure(cell, mode, name, launches, operands, expected, watch)
        file.append(rows)
        if watch.device.type == "cuda":
            torch.cuda.empty_cache()  # the graphs' own memory


def _operands(cell: Cell, device: torch.device, seed: int) -> Operands | None:
    """Those of the cell, or ``None`` if they do not fit into memory."""
    try:
        return make_operands(cell, device, seed)
    except RuntimeError as error:
        require_memory_error(error)
        return None


def _measure(
    cell: Cell,
    mode: str,
    name: str,
    launches: Iterable[str],
    o: Operands,
    expected: dict[str, Expected],
    watch: Stopwatch,
) -> list[dict[str, Any]]:
    """The rows of one strategy in one case. ``expected`` is filled, and serves the case's other strategies too."""
    if name == "bmm" and gathered_bytes(cell, mode) > free_memory(watch.device):
        return _without_memory(cell, mode, name)
    kind = name if name in BOUNDS else "mixture"
    try:
        if kind not in expected:
            expected[kind] = expect(cell, o, name, mode)
        with torch.inference_mode(mode == "forward"):
            check(cell, o, name, mode, expected[kind])
            return time_and_memory(_setting(cell, mode, name), _preparation(cell, mode, name, o), launches, watch)
    except RuntimeError as error:
        require_memory_error(error)
    if watch.device.type == "cuda":
        torch.cuda.empty_cache()
    return _without_memory(cell, mode, name)


def _preparation(cell: Cell, mode: str, name: str, o: Operands) -> Callable[[], Callable[[], Any]]:
    if mode == "backward":
        return lambda: backward_pass(name, cell.top_k, o)
    return lambda: forward_pass(name, cell.top_k, o)


def time_and_memory(
    setting: dict[str, Any],
    prepare: Callable[[], Callable[[], Any]],
    launches: Iterable[str],
    watch: Stopwatch,
) -> list[dict[str, Any]]:
    """Rows of one strategy. In mode backward, memory counts from before the forward pass, with all that it keeps."""
    peak = measure_peak(lambda: prepare()(), watch.device)
    rows = [make_row(setting | {"launch": "eager"}, "peak_bytes", (peak, peak, peak))]
    graph = watch.device.type == "cuda" and "graph" in launches
    waits = graph and waits_for_gpu(lambda: prepare()())
    if graph and waits:
        rows.append(make_row(setting | {"launch": "graph"}, "time_us", None, unit=NOT_CAPTURABLE))
    elif graph:
        rows.append(make_row(setting | {"launch": "graph"}, "time_us", watch.graph(prepare)))
    if "eager" in launches or waits or not graph:
        rows.append(make_row(setting | {"launch": "eager"}, "time_us", watch.eager(prepare)))
    return rows


def _setting(cell: Cell, mode: str, name: str) -> dict[str, Any]:
    return {"workload": "layer", "backend": name, "mode": mode, "batch": 1, **asdict(cell)}


def _without_memory(cell: Cell, mode: str, name: str) -> list[dict[str, Any]]:
    setting = _setting(cell, mode, name) | {"launch": "eager"}
    return [make_row(setting, metric, None, unit=OUT_OF_MEMORY) for metric in ("time_us", "peak_bytes")]


def require_memory_error(error: RuntimeError) -> None:
    """Raise ``error`` again unless it says that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
