"""The layer benchmark: what it measures is right, and its rows say what was measured."""

import math
import time
from dataclasses import replace

import pytest
import torch

from meteora.backends import dense
from meteora.gating import Routing, gate_logits, route
from meteora.study import benchmark
from meteora.study.benchmark import (
    BOUNDS,
    COLUMNS,
    Cell,
    benchmark_layer,
    cells,
    check,
    make_operands,
    reference,
    strategies,
)
from meteora.study.profiles import BenchmarkSettings
from meteora.study.timing import measure_peak, measure_time

CPU = torch.device("cpu")
BACKENDS = ("loop", "bmm", "dense")
CELL = Cell(tokens=20, adapters=3, rank=4, top_k=2, in_features=16, out_features=24, dtype="float32", routing="uniform")
SETTINGS = BenchmarkSettings(BACKENDS, tokens=(1, 6), adapters=(1, 3), layers=((8, 12),), rank=2, repeats=2)


def test_cells_are_every_combination_and_mix_no_more_adapters_than_there_are():
    found = cells(SETTINGS)
    assert len(found) == len(set(found)) == 2 * 2 * 1 * 2
    assert {(cell.adapters, cell.top_k) for cell in found} == {(1, 1), (3, 2)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*BOUNDS, *BACKENDS])
def test_every_strategy_agrees_with_float64(name, dtype):
    cell = replace(CELL, dtype=dtype)
    operands = make_operands(cell, CPU)
    check(cell, operands, name, strategies(cell, operands, BACKENDS)[name], reference(cell, operands, name))


def test_reference_is_the_papers_equation_token_by_token():
    o = make_operands(CELL, CPU)
    expected = torch.zeros(20, 24, dtype=torch.float64)
    for t in range(20):
        logits = o.gate @ o.x[t]
        best = logits.argsort(descending=True)[:2].tolist()
        weights = torch.softmax(logits[best], 0)
        for n, weight in zip(best, weights):
            A, B = o.A[4 * n : 4 * n + 4].double(), o.B[:, 4 * n : 4 * n + 4].double()
            expected[t] += weight.double() * (B @ (A @ o.x[t].double()))
    torch.testing.assert_close(reference(CELL, o), expected, rtol=1e-5, atol=1e-6)


def test_a_wrong_result_stops_the_benchmark(monkeypatch):
    def wrong(y, x, A, B, column_adapter, routing):
        return dense.mix(y, x, A, B, column_adapter, Routing(routing.indices, routing.weights.flip(-1)))

    monkeypatch.setattr(benchmark, "get_mix", lambda name: wrong)
    with pytest.raises(AssertionError, match="loop is wrong by .* adapters=3"):
        benchmark_layer(SETTINGS, device=CPU, progress=False)


def test_strategies_add_into_y():
    operands = make_operands(CELL, CPU)
    for name, call in strategies(CELL, operands, BACKENDS).items():
        if name == "base":
            continue
        operands.y.fill_(5)
        assert call().data_ptr() == operands.y.data_ptr()
        torch.testing.assert_close(operands.y.double() - 5, reference(CELL, operands, name), rtol=1e-4, atol=1e-4)


def test_routing_is_as_asked():
    runs = make_operands(replace(CELL, tokens=200, routing="runs"), CPU)
    chosen = route(gate_logits(runs.x, runs.gate), 2).indices
    for start in range(0, 200, benchmark.RUN_LENGTH):
        assert (chosen[start : start + benchmark.RUN_LENGTH] == chosen[start]).all()
    uniform = make_operands(replace(CELL, tokens=3000), CPU)
    first = route(gate_logits(uniform.x, uniform.gate), 1).indices.flatten()
    assert (torch.bincount(first, minlength=3) / 3000 - 1 / 3).abs().max() < 0.05
    with pytest.raises(ValueError, match="20 adapters need a layer"):
        make_operands(replace(CELL, adapters=20), CPU)


def test_operands_are_seeded():
    first, same, other = (make_operands(CELL, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first.x, same.x) and torch.equal(first.B, same.B)
    assert not torch.equal(first.x, other.x)


def test_peak_is_of_what_lives_at_once(capfd):
    def call():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(250)
        return second, third

    assert measure_peak(call, CPU) == 4 * 1500
    assert measure_peak(lambda: None, CPU) == 0
    assert capfd.readouterr() == ("", "")


def test_gathered_weights_take_the_memory_they_must():
    cell = replace(CELL, tokens=256, in_features=64, out_features=64)
    calls = strategies(cell, make_operands(cell, CPU), BACKENDS)
    peak = {name: measure_peak(call, CPU) for name, call in calls.items()}
    gathered = 4 * 256 * cell.top_k * cell.rank * (64 + 64)
    assert peak["bmm"] > gathered / 2 > peak["dense"] > peak["single_lora"] >= 4 * 256 * cell.rank
    assert peak["base"] == 4 * 256 * 64


def test_times_are_microseconds_of_one_call():
    median, low, high = measure_time(lambda: time.sleep(0.02), CPU, repeats=3)
    assert 20_000 <= low <= median <= high < 200_000


def test_rows_are_tidy_and_complete():
    rows = benchmark_layer(SETTINGS, device=CPU, progress=False)
    assert all(tuple(row) == COLUMNS for row in rows)
    keys = [tuple(row[c] for c in COLUMNS if c not in ("value", "p20", "p80")) for row in rows]
    assert len(set(keys)) == len(keys) == len(cells(SETTINGS)) * len((*BOUNDS, *BACKENDS)) * 2
    for row in rows:
        assert (row["workload"], row["mode"], row["launch"], row["batch"]) == ("layer", "forward", "eager", 1)
        assert math.isfinite(row["value"]) and row["p20"] <= row["value"] <= row["p80"]
        assert row["unit"] == {"time_us": "us", "peak_bytes": "bytes"}[row["metric"]]
        assert row["torch"] == torch.__version__ and row["device"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch, error):
    def too_large(y, *rest):
        raise error

    real = benchmark.get_mix
    monkeypatch.setattr(benchmark, "get_mix", lambda name: too_large if name == "bmm" else real(name))
    rows = benchmark_layer(replace(SETTINGS, tokens=(1,), adapters=(3,)), device=CPU, progress=False)
    units = {(row["backend"], row["unit"]) for row in rows}
    assert {unit for backend, unit in units if backend == "bmm"} == {"out of memory"}
    assert all(math.isnan(row["value"]) == (row["backend"] == "bmm") for row in rows)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(y, *rest):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(benchmark, "get_mix", lambda name: broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        benchmark_layer(SETTINGS, device=CPU, progress=False)
