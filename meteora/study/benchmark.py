"""Time and memory of one linear layer's mixture of LoRAs, gate and routing included: the rows of ``benchmark.csv``.

Every strategy adds its update into a given y (T, out), as it does inside a layer. Two bounds stand beside the backends:
``single_lora`` adds one adapter for all tokens without a gate, ``base`` is the frozen linear layer alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from meteora.backends import get_mix
from meteora.gating import gate_logits, route
from meteora.study.artifacts import device_name
from meteora.study.profiles import BenchmarkSettings
from meteora.study.timing import captured, measure_peak, measure_time, waits_for_gpu

COLUMNS = (
    "workload", "backend", "mode", "launch", "routing", "batch", "tokens", "adapters", "rank", "top_k", "in_features",
    "out_features", "dtype", "metric", "value", "p20", "p80", "unit", "device", "torch", "triton",
)  # fmt: skip
BOUNDS = ("base", "single_lora")
ROUTINGS = ("uniform", "runs")
RUN_LENGTH = 64  # tokens; about a short problem of a composite prompt
# Largest relative error of an update (norm of the difference over norm of the reference) that rounding explains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Cell:
    """One setting in which all strategies are measured. ``routing``: ``uniform``, or ``runs`` of tokens that agree."""

    tokens: int
    adapters: int
    rank: int
    top_k: int
    in_features: int
    out_features: int
    dtype: str
    routing: str


def cells(settings: BenchmarkSettings) -> list[Cell]:
    """Every combination of the profile's lists; ``top_k`` is at most the number of adapters."""
    return [
        Cell(tokens, n, settings.rank, min(settings.top_k, n), *layer, settings.dtype, routing)
        for layer, n, tokens, routing in product(settings.layers, settings.adapters, settings.tokens, ROUTINGS)
    ]


@dataclass(frozen=True)
class Operands:
    """A layer and its input: W (out, in), gate (N, in) float32, A (R, in), B (out, R), x (T, in), y (T, out)."""

    W: Tensor
    gate: Tensor
    A: Tensor
    B: Tensor
    column_adapter: Tensor
    x: Tensor
    y: Tensor


def make_operands(cell: Cell, device: torch.device, seed: int = 0) -> Operands:
    """Random operands, the same on every device, whose update is about as large as the layer's own output.

    The gate's rows are orthonormal and the input's logits are set to random numbers: independent ones for each token
    (``uniform``), or the same for ``RUN_LENGTH`` tokens in a row (``runs``).

    Raises:
        ValueError: if there are more adapters than features, so that the logits cannot be set.
    """
    if cell.adapters > cell.in_features:
        raise ValueError(f"{cell.adapters} adapters need a layer of at least as many features, not {cell.in_features}.")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * math.sqrt(variance)

    gate = torch.linalg.qr(normal(cell.in_features, cell.adapters)).Q.t().contiguous()
    logits = normal(cell.tokens, cell.adapters)
    if cell.routing == "runs":
        logits = logits[torch.arange(cell.tokens) // RUN_LENGTH]
    x = normal(cell.tokens, cell.in_features)
    x += (logits - x @ gate.t()) @ gate
    columns = cell.adapters * cell.rank
    weights = {
        "W": normal(cell.out_features, cell.in_features, variance=1 / cell.in_features),
        "A": normal(columns, cell.in_features, variance=1 / cell.in_features),
        "B": normal(cell.out_features, columns, variance=1 / cell.rank),
        "x": x,
        "y": torch.zeros(cell.tokens, cell.out_features),
    }
    owner = torch.arange(cell.adapters).repeat_interleave(cell.rank)
    dtype = getattr(torch, cell.dtype)
    moved = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    return Operands(gate=gate.to(device), column_adapter=owner.to(device), **moved)


def strategies(cell: Cell, o: Operands, backends: Iterable[str]) -> dict[str, Call]:
    """Name -> a call that does one layer's work; all but ``base`` add into ``o.y`` and return it."""

    def mixture(backend: str) -> Call:
        mix = get_mix(backend)
        return lambda: mix(o.y, o.x, o.A, o.B, o.column_adapter, route(gate_logits(o.x, o.gate), cell.top_k))

    A, B = o.A[: cell.rank], o.B[:, : cell.rank].contiguous()
    return {
        "base": lambda: o.x @ o.W.t(),
        "single_lora": lambda: o.y.addmm_(o.x @ A.t(), B.t()),
        **{backend: mixture(backend) for backend in backends},
    }


def reference(cell: Cell, o: Operands, name: str = "mixture") -> Tensor:
    """What a bound, or else every backend, is to add to y (T, out), in float64, one adapter after the other."""
    x = o.x.double()
    if name == "base":
        return x @ o.W.double().t()
    if name == "single_lora":
        return x @ o.A[: cell.rank].double().t() @ o.B[:, : cell.rank].double().t()
    routing = route(gate_logits(o.x, o.gate), cell.top_k)
    total = torch.zeros(cell.tokens, cell.out_features, dtype=torch.float64, device=x.device)
    for n in range(cell.adapters):
        weight = (routing.weights.double() * (routing.indices == n)).sum(dim=1, keepdim=True)  # (T, 1)
        columns = o.column_adapter == n
        total += weight * (x @ o.A[columns].double().t() @ o.B[:, columns].double().t())
    return total


def check(cell: Cell, o: Operands, name: str, call: Call, expected: Tensor) -> None:
    """Raise ``AssertionError`` unless ``call`` computes ``expected``, its ``reference``, up to rounding."""
    o.y.zero_()
    error = ((call().double() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE[o.x.dtype]:
        raise AssertionError(f"{name} is wrong by {error:.1e} (relative) in {cell}.")


@torch.inference_mode()
def benchmark_layer(
    settings: BenchmarkSettings, *, device: torch.device, seed: int = 0, progress: bool = True
) -> list[dict[str, Any]]:
    """The rows of ``benchmark.csv`` (``COLUMNS``) with workload ``layer`` and mode ``forward``.

    Metrics are ``time_us`` and, for eager calls, ``peak_bytes``. What cannot be measured is a row without a value whose
    unit says why: ``out of memory`` or, for a CUDA graph, ``not capturable``. Results are first compared with float64.

    Raises:
        AssertionError: if a strategy computes something else.
    """
    rows = []
    for cell in tqdm(cells(settings), desc="benchmark", unit="setting", disable=not progress):
        names = (*BOUNDS, *settings.backends)
        try:
            operands = make_operands(cell, device, seed)
            calls = strategies(cell, operands, settings.backends)
            expected = {name: reference(cell, operands, name) for name in (*BOUNDS, "mixture")}
        except (torch.OutOfMemoryError, RuntimeError) as error:
            _require_memory_error(error)
            rows += [row for name in names for row in _out_of_memory(cell, name, device)]
            continue
        for name, call in calls.items():
            try:
                check(cell, operands, name, call, expected[name if name in BOUNDS else "mixture"])
                rows += _measure(cell, name, call, settings.repeats, device)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                _require_memory_error(error)
                rows += _out_of_memory(cell, name, device)
    return rows


def _measure(cell: Cell, name: str, call: Call, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    times, peak = measure_time(call, device, repeats), measure_peak(call, device)
    rows = [
        _row(cell, name, "eager", "time_us", "us", device, *times),
        _row(cell, name, "eager", "peak_bytes", "bytes", device, peak, peak, peak),
    ]
    if device.type == "cuda":
        if waits_for_gpu(call):
            rows.append(_row(cell, name, "graph", "time_us", "not capturable", device))
        else:
            times = measure_time(captured(call), device, repeats)
            rows.append(_row(cell, name, "graph", "time_us", "us", device, *times))
    return rows


def _out_of_memory(cell: Cell, name: str, device: torch.device) -> list[dict[str, Any]]:
    return [_row(cell, name, "eager", metric, "out of memory", device) for metric in ("time_us", "peak_bytes")]


def _require_memory_error(error: RuntimeError) -> None:
    """Raise ``error`` again unless it says that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error


def _row(
    cell: Cell,
    backend: str,
    launch: str,
    metric: str,
    unit: str,
    device: torch.device,
    value: float = math.nan,
    p20: float = math.nan,
    p80: float = math.nan,
) -> dict[str, Any]:
    setting = {
        "workload": "layer", "backend": backend, "mode": "forward", "launch": launch, "routing": cell.routing,
        "batch": 1, "tokens": cell.tokens, "adapters": cell.adapters, "rank": cell.rank, "top_k": cell.top_k,
        "in_features": cell.in_features, "out_features": cell.out_features, "dtype": cell.dtype,
    }  # fmt: skip
    measured = {"metric": metric, "value": value, "p20": p20, "p80": p80, "unit": unit}
    where = {"device": device_name(device.type), "torch": torch.__version__, "triton": _triton_version()}
    return {**setting, **measured, **where}


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "none"
    import triton

    return triton.__version__
