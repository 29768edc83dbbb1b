"""The benchmark: what it measures is right, its rows say what was measured, and it goes on where it was stopped."""

import json
import math
import os
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from data_prep.prepare import prepare_tasks
from meteora.backends import dense
from meteora.gating import Routing, gate_logits, route
from meteora.study import benchmark, benchmark_layer, benchmark_measure, benchmark_tasks, timing
from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.benchmark import LEVELS, main, record_benchmark, run_benchmark
from meteora.study.benchmark_layer import (
    RUN_LENGTHS,
    Cell,
    backward_pass,
    check,
    expect,
    forward_pass,
    gathered_bytes,
    make_layer,
    make_logits,
    make_operands,
    strategies,
)
from meteora.study.benchmark_measure import cases
from meteora.study.benchmark_rows import COLUMNS, NOT_CAPTURABLE, OUT_OF_MEMORY, RowFile, make_row, read_rows
from meteora.study.benchmark_tasks import prompt_lengths
from meteora.study.profiles import PROFILES, BenchmarkSettings, LayerStudy, ProfileError, PromptStudy
from meteora.study.timing import Stopwatch, measure_peak

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ("loop", "bmm", "dense")
ALL = strategies(BACKENDS)
MODES = ("forward", "backward")
CELL = Cell(tokens=20, adapters=3, rank=4, top_k=2, in_features=16, out_features=24, dtype="float32", routing="uniform")
SETTINGS = BenchmarkSettings(
    BACKENDS,
    layers=(
        LayerStudy(sizes=((8, 12),), tokens=(1, 6), adapters=(1, 3), ranks=(2,)),
        LayerStudy(sizes=((8, 12),), tokens=(6,), adapters=(3,), ranks=(2,), modes=("forward",), launches=("graph",)),
    ),
    tasks=PromptStudy(sizes=((8, 12), (12, 8)), prompts=2, rank=2, repeats=2),
    repeats=3,
    seconds=0.05,
)
LENGTHS = {"first": [3, 5], "second": [4, 4], "third": [9]}  # two tasks of as many tokens


def run(path, settings=SETTINGS, device=CPU, **options):
    return run_benchmark(settings, path, LENGTHS, device=device, progress=False, **options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("benchmark") / "benchmark.csv"
    assert run(path)
    return read_rows(path)


# Settings ------------------------------------------------------------------------------------------------------------


def test_cases_are_every_combination_and_mix_no_more_adapters_than_there_are():
    found = cases(SETTINGS)
    assert len(found) == 2 * 2 * 2
    assert {(cell.adapters, cell.top_k) for cell, _ in found} == {(1, 1), (3, 2)}
    both = {"eager", "graph"}
    assert [mode for (_, mode), launches in found.items() if launches == both] == ["forward"], "two studies, one case"


def test_settings_that_share_their_operands_are_neighbours():
    study = LayerStudy(((8, 12),), (1, 6), (3,), (2, 4), (1, 2), ("uniform", "runs"))
    shared = [replace(cell, top_k=1) for cell, _ in cases(replace(SETTINGS, layers=(study,)))]
    changes = sum(a != b for a, b in zip(shared, shared[1:]))
    assert changes + 1 == len(set(shared)) == 8


# What is computed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_every_strategy_agrees_with_float64(name, mode, top_k, dtype):
    cell = replace(CELL, dtype=dtype, top_k=top_k, tokens=300)
    operands = make_operands(cell, CPU)
    check(cell, operands, name, mode, expect(cell, operands, name, mode))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs the kernels on a CPU")
@pytest.mark.parametrize("mode", MODES)
def test_so_do_the_kernels(mode):
    cell = replace(CELL, rank=8, tokens=70, in_features=64, out_features=96)
    operands = make_operands(cell, CPU)
    check(cell, operands, "triton", mode, expect(cell, operands, "triton", mode))


def test_what_is_expected_is_the_papers_equation_token_by_token():
    o = make_operands(CELL, CPU)
    update = torch.zeros(20, 24, dtype=torch.float64)
    for t in range(20):
        logits = o.layer.gate @ o.x[t]
        best = logits.argsort(descending=True)[:2].tolist()
        weights = torch.softmax(logits[best].double(), 0)
        for n, weight in zip(best, weights):
            A, B = o.layer.A[4 * n : 4 * n + 4].double(), o.layer.B[:, 4 * n : 4 * n + 4].double()
            update[t] += weight * (B @ (A @ o.x[t].double()))
    expected = expect(CELL, o, "mixture", "forward")
    assert expected.rows.tolist() == list(range(20))
    torch.testing.assert_close(expected.values[0], update, rtol=1e-6, atol=1e-6)


def test_expected_gradients_are_the_slopes_of_the_loss():
    o = make_operands(CELL, CPU)
    dx, dgate = expect(CELL, o, "mixture", "backward").values
    x, gate = torch.randn(o.x.shape).double(), torch.randn(o.layer.gate.shape).double()
    indices = route(gate_logits(o.x, o.layer.gate), 2).indices

    def loss(step):
        layer = replace(o.layer.double(), gate=o.layer.gate.double() + step * gate)
        out = benchmark_layer._equation("mixture", layer, o.x.double() + step * x, indices)
        return (out * o.dy).sum().item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert (dx * x).sum() + (dgate * gate).sum() == pytest.approx(slope, rel=1e-6)


def test_gradients_are_those_of_what_is_trained():
    o = make_operands(CELL, CPU)
    shapes = {name: [tuple(g.shape) for g in backward_pass(name, 2, o)()] for name in ALL}
    assert shapes["base"] == [(20, 16)]
    assert shapes["single_lora"] == [(20, 16), (4, 16), (24, 4)]
    assert {tuple(shapes[name]) for name in BACKENDS} == {((20, 16), (3, 16))}
    call = backward_pass("dense", 2, o)
    assert all(torch.equal(a, b) for a, b in zip(call(), call()))


def wrong_weights(y, x, A, B, column_adapter, routing):
    return dense.mix(y, x, A, B, column_adapter, Routing(routing.indices, routing.weights.flip(-1)))


def forgets_the_last_columns(y, x, A, B, column_adapter, routing):
    out = dense.mix(y.clone(), x, A, B, column_adapter, routing)
    y[:-1] = out[:-1]
    y[-1, :12] = out[-1, :12]
    return y


def twice_the_gates_gradient(y, x, A, B, column_adapter, routing):
    weights = 2 * routing.weights - routing.weights.detach()
    return dense.mix(y, x, A, B, column_adapter, Routing(routing.indices, weights))


@pytest.mark.parametrize("wrong", [wrong_weights, forgets_the_last_columns])
def test_a_wrong_result_stops_the_benchmark(monkeypatch, tmp_path, wrong):
    monkeypatch.setattr(benchmark_layer, "get_gated_mix", lambda *names: None)
    monkeypatch.setattr(benchmark_layer, "get_mix", lambda *names: wrong)
    study = LayerStudy(sizes=((16, 24),), tokens=(400,), adapters=(3,), ranks=(4,))
    with pytest.raises(AssertionError, match="loop is wrong in its forward pass: .*adapters=3"):
        run(tmp_path / "benchmark.csv", replace(SETTINGS, layers=(study,)))


def test_a_wrong_gradient_stops_it_as_well(monkeypatch):
    monkeypatch.setattr(benchmark_layer, "get_gated_mix", lambda *names: None)
    monkeypatch.setattr(benchmark_layer, "get_mix", lambda *names: twice_the_gates_gradient)
    o = make_operands(CELL, CPU)
    check(CELL, o, "dense", "forward", expect(CELL, o, "dense", "forward"))
    with pytest.raises(AssertionError, match="dense is wrong in its backward pass: the gradient of x is off by"):
        check(CELL, o, "dense", "backward", expect(CELL, o, "dense", "backward"))


def test_strategies_add_into_y():
    o = make_operands(CELL, CPU)
    for name in ALL[1:]:
        o.y.fill_(5)
        assert forward_pass(name, 2, o)().data_ptr() == o.y.data_ptr()
        torch.testing.assert_close(o.y.double() - 5, expect(CELL, o, name, "forward").values[0], rtol=1e-4, atol=1e-4)


def test_a_fused_backend_is_asked_first(monkeypatch):
    def fused(y, x, A, B, gate, column_adapter, top_k, packed):
        return dense.mix(y, x, A, B, column_adapter, route(gate_logits(x, gate), top_k))

    monkeypatch.setattr(benchmark_layer, "get_gated_mix", lambda *names: fused)
    monkeypatch.setattr(benchmark_layer, "get_mix", lambda *names: pytest.fail("not fused"))
    o = make_operands(CELL, CPU)
    for mode in MODES:
        check(CELL, o, "triton", mode, expect(CELL, o, "triton", mode))


# Operands ------------------------------------------------------------------------------------------------------------


def test_routing_is_as_asked():
    cell = replace(CELL, tokens=3000, routing="runs")
    o = make_operands(cell, CPU)
    chosen = route(gate_logits(o.x, o.layer.gate), 3).indices
    ends = [t for t in range(1, 3000) if (chosen[t] != chosen[t - 1]).any()]
    lengths = [b - a for a, b in zip([0, *ends], ends)]
    assert min(lengths) >= RUN_LENGTHS[0] and len(ends) > 8, "two neighbouring runs may choose alike"
    o = make_operands(replace(CELL, tokens=3000), CPU)
    first = route(gate_logits(o.x, o.layer.gate), 1).indices.flatten()
    assert (torch.bincount(first, minlength=3) / 3000 - 1 / 3).abs().max() < 0.05
    with pytest.raises(ValueError, match="20 adapters need a layer"):
        make_operands(replace(CELL, adapters=20), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_two_logits_lie_so_close_that_rounding_decides(dtype):
    cell = replace(CELL, tokens=4000, adapters=28, in_features=512, dtype=dtype)
    o = make_operands(cell, CPU)
    logits = gate_logits(o.x, o.layer.gate).sort(dim=1).values
    assert logits.diff(dim=1).min() > 0.003


def test_one_run_is_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = make_logits(replace(CELL, tokens=500, routing="runs"), generator, one_run=True)
    assert logits.shape == (500, 3) and (logits == logits[0]).all()


def test_operands_are_seeded_and_the_same_for_every_k():
    first, same, other = (make_operands(c, CPU, s) for c, s in ((CELL, 0), (replace(CELL, top_k=1), 0), (CELL, 1)))
    assert torch.equal(first.x, same.x) and torch.equal(first.layer.B, same.layer.B)
    assert not torch.equal(first.x, other.x)


def test_layers_are_of_the_asked_shape():
    layer = make_layer(CELL, torch.Generator().manual_seed(0))
    assert layer.W.shape == (24, 16) and layer.A.shape == (12, 16) and layer.B.shape == (24, 12)
    assert torch.equal(layer.single_B, layer.B[:, :4]) and layer.single_B.is_contiguous()
    torch.testing.assert_close(layer.gate @ layer.gate.t(), torch.eye(3), atol=1e-5, rtol=0)


# Measuring -----------------------------------------------------------------------------------------------------------


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
    o = make_operands(cell, CPU)
    peak = {name: measure_peak(forward_pass(name, 2, o), CPU) for name in ALL}
    assert peak["bmm"] > gathered_bytes(cell, "forward") > peak["dense"] > peak["single_lora"] >= 4 * 256 * cell.rank
    assert peak["base"] == 4 * 256 * 64
    both = measure_peak(lambda: backward_pass("bmm", 2, o)(), CPU)
    assert both > gathered_bytes(cell, "backward") == 2 * gathered_bytes(cell, "forward")


def test_times_are_microseconds_of_one_call():
    watch = Stopwatch(CPU, repeats=50, seconds=0.1)
    begin = time.perf_counter()
    median, low, high = watch.eager(lambda: lambda: time.sleep(0.02))
    assert 20_000 <= low <= median <= high < 200_000
    assert time.perf_counter() - begin < 2, "the time for one call is bounded"


def test_what_comes_before_the_call_is_not_timed():
    def prepare():
        time.sleep(0.3)
        return lambda: None

    assert Stopwatch(CPU, repeats=3, seconds=1.0).eager(prepare)[0] < 1000


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_are_tidy_and_complete(measured):
    assert tuple(measured.columns) == COLUMNS
    layer = measured[measured["workload"] == "layer"]
    keys = [column for column in COLUMNS if column not in ("value", "p20", "p80")]
    assert not layer.duplicated(keys).any()
    assert len(layer) == len(cases(SETTINGS)) * len(ALL) * 2
    assert set(layer["mode"]) == set(MODES) and set(layer["launch"]) == {"eager"} and set(layer["batch"]) == {1}
    assert (measured["p20"] <= measured["value"]).all() and (measured["value"] <= measured["p80"]).all()
    units = {"time_us": "us", "peak_bytes": "bytes", "bytes_per_s": "bytes/s", "flop_per_s": "flop/s"}
    assert (measured["unit"] == measured["metric"].map(units)).all()
    assert set(measured["torch"]) == {torch.__version__} and measured["device"].nunique() == 1


def test_the_device_has_two_ceilings(measured):
    device = measured[measured["workload"] == "device"].set_index("metric")["value"]
    assert set(device.index) == {"bytes_per_s", "flop_per_s"}
    assert (device > 1e8).all()


def test_tasks_have_a_row_for_every_task_size_and_routing(measured):
    tasks = measured[measured["workload"] == "tasks"]
    assert len(tasks) == 3 * 2 * 2 * len(ALL)
    assert sorted(tasks["tokens"].unique()) == [8, 9] and set(tasks["adapters"]) == {3}
    assert set(tasks["routing"]) == {"uniform", "runs"}


def test_prompts_run_one_at_a_time_at_their_own_length(monkeypatch, tmp_path):
    seen = []
    real = benchmark_tasks.update

    def spy(name, *rest):
        call = real(name, *rest)
        return lambda layer, x, y: (seen.append((name, len(x), len(y))), call(layer, x, y))[1]

    monkeypatch.setattr(benchmark_tasks, "update", spy)
    assert run(tmp_path / "benchmark.csv", levels=["tasks"])
    passes = 2 * 2 * (1 + SETTINGS.tasks.repeats)  # sizes, routings, a first pass that does not count
    assert seen.count(("dense", 4, 4)) == 2 * passes and seen.count(("dense", 9, 9)) == passes


def test_a_prompts_tokens_choose_their_own_tasks_adapter(monkeypatch, tmp_path):
    chosen = []

    def watched(layer, x, y):
        chosen.append(route(gate_logits(x, layer.gate), 1).indices.unique().tolist())
        return y

    monkeypatch.setattr(benchmark_tasks, "update", lambda *names: watched)
    tasks = PromptStudy(sizes=((8, 12),), prompts=1, rank=2, routings=("runs",), repeats=1)
    run(tmp_path / "benchmark.csv", replace(SETTINGS, tasks=tasks), levels=["tasks"])
    assert chosen == [[0]] * (len(chosen) * 2 // 5) + [[1]] * (len(chosen) * 2 // 5) + [[2]] * (len(chosen) // 5)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch, tmp_path, error):
    def too_large(y, *rest):
        raise error

    real = benchmark_layer.get_mix
    monkeypatch.setattr(benchmark_layer, "get_mix", lambda name, kind: too_large if name == "bmm" else real(name, kind))
    run(tmp_path / "benchmark.csv", levels=["layer"])
    rows = read_rows(tmp_path / "benchmark.csv")
    assert set(rows[rows["backend"] == "bmm"]["unit"]) == {OUT_OF_MEMORY}
    assert (rows["value"].isna() == (rows["backend"] == "bmm")).all()


def test_what_cannot_fit_is_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_measure, "free_memory", lambda device: 100)
    real = benchmark_layer.get_mix

    def watched(name, kind):
        assert name != "bmm"
        return real(name, kind)

    monkeypatch.setattr(benchmark_layer, "get_mix", watched)
    study = LayerStudy(sizes=((8, 12),), tokens=(6,), adapters=(3,), ranks=(2,))
    run(tmp_path / "benchmark.csv", replace(SETTINGS, layers=(study,)), levels=["layer"])
    rows = read_rows(tmp_path / "benchmark.csv")
    assert set(rows[rows["backend"] == "bmm"]["unit"]) == {OUT_OF_MEMORY}


def test_operands_that_do_not_fit_leave_a_row_for_everyone(monkeypatch, tmp_path):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark_measure, "make_operands", too_large)
    run(tmp_path / "benchmark.csv", levels=["layer"])
    rows = read_rows(tmp_path / "benchmark.csv")
    assert set(rows["unit"]) == {OUT_OF_MEMORY} and set(rows["backend"]) == set(ALL)


def test_other_errors_are_not_taken_for_memory(monkeypatch, tmp_path):
    def broken(y, *rest):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(benchmark_layer, "get_mix", lambda *names: broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(tmp_path / "benchmark.csv")


def test_a_backend_without_its_device_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ProfileError, match="benchmark.backends: backend 'triton'"):
        run(tmp_path / "benchmark.csv", replace(SETTINGS, backends=("dense", "triton")))


# Going on ------------------------------------------------------------------------------------------------------------


def test_a_run_out_of_time_goes_on_later(tmp_path, measured):
    path = tmp_path / "benchmark.csv"
    assert not run(path, time_limit=0.0)
    assert set(read_rows(path)["workload"]) == {"device"}
    assert run(path, levels=["layer"])
    whole = path.read_text()
    assert run(path) and path.read_text().startswith(whole), "what is there is not measured again"
    rows = read_rows(path)
    assert len(rows) == len(measured)
    before = path.read_text()
    assert run(path) and path.read_text() == before


def test_a_strategy_whose_rows_are_missing_is_measured_again(tmp_path):
    path = tmp_path / "benchmark.csv"
    run(path, levels=["layer"])
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in rows if ",dense,backward," not in line))
    assert run(path, levels=["layer"]) and len(path.read_text().splitlines()) == len(rows)


ROW = make_row({c: "x" for c in COLUMNS[:13]}, "time_us", (1.0, 0.5, 2.0))
HERE = {"device": "a, b", "torch": "2.10", "triton": "none"}


def test_a_row_file_reads_back(tmp_path):
    file = RowFile(tmp_path / "benchmark.csv", HERE)
    file.append([ROW, make_row(ROW | {"backend": "bmm"}, "time_us", None, unit=NOT_CAPTURABLE)])
    again = RowFile(tmp_path / "benchmark.csv", HERE)
    assert again.keys("backend", "device", "torch") == {("x", "a, b", "2.10"), ("bmm", "a, b", "2.10")}
    assert again.rows[0]["value"] == 1.0 and math.isnan(again.rows[1]["p20"])
    assert [p.name for p in tmp_path.iterdir()] == ["benchmark.csv"]


def test_a_row_file_of_another_machine_is_refused(tmp_path):
    RowFile(tmp_path / "benchmark.csv", HERE).append([ROW])
    with pytest.raises(ArtifactError, match="measured with torch 2.10, and here it is 2.11: name another file"):
        RowFile(tmp_path / "benchmark.csv", HERE | {"torch": "2.11"})
    for text in ("", "a,b\n1,2\n"):
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(ArtifactError, match="other.csv is not a benchmark.csv"):
            RowFile(tmp_path / "other.csv", HERE)


# The profile's data and the command line -----------------------------------------------------------------------------


@pytest.fixture
def smoke(tmp_path) -> str:
    """Profile smoke in a folder of its own, and its data."""
    path = tmp_path / "smoke.yaml"
    path.write_text((PROFILES / "smoke.yaml").read_text(encoding="utf-8") + f"\nroot: {tmp_path}\n", encoding="utf-8")
    workspace = Workspace(path)
    prepare_tasks(workspace.profile.tasks, workspace.data, sizes={"train": 48, "valid": 8, "test": 6})
    return str(path)


def test_prompt_lengths_are_counted_and_kept(smoke):
    workspace = Workspace(smoke)
    lengths = prompt_lengths(workspace)
    assert list(lengths) == list(workspace.profile.tasks)
    first = json.loads((workspace.data / "toy_echo" / "test.jsonl").read_text().splitlines()[0])
    assert lengths["toy_echo"][0] == len(first["prompt"].encode()) and len(lengths["toy_echo"]) == 2
    (workspace.data / "manifest.json").unlink()
    assert prompt_lengths(workspace) == lengths
    kept = workspace.artifacts / "prompt_lengths.json"
    kept.write_text(kept.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ArtifactError, match="run notebook 01_adapter_collection first"):
        prompt_lengths(workspace)


def test_the_notebooks_file_is_whole_or_not_there(smoke, monkeypatch):
    workspace = Workspace(smoke)
    limited = benchmark.run_benchmark
    monkeypatch.setattr(benchmark, "run_benchmark", lambda *a, **k: (limited(*a, **k, time_limit=0.0), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        record_benchmark(workspace, CPU)
    [partial] = workspace.artifacts.glob("benchmark-*.csv")
    assert len(read_rows(partial)) == 2 and not (workspace.metrics / "benchmark.csv").exists()
    begun = partial.read_text()
    monkeypatch.setattr(benchmark, "run_benchmark", limited)
    frame = record_benchmark(workspace, CPU)
    assert (workspace.metrics / "benchmark.csv").read_text().startswith(begun) and not partial.exists()
    assert set(frame["workload"]) == set(LEVELS)


def test_the_command_line(smoke, tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = ["--profile", smoke, "--output", str(tmp_path / "out" / "benchmark.csv"), "--device", "cpu"]
    assert main([*arguments, "--time-limit", "0"]) == 0
    assert caplog.messages[-1].startswith("The time is up")
    assert main([*arguments, "--levels", "device", "tasks"]) == 0
    assert caplog.messages[-1] == "complete"
    assert set(read_rows(tmp_path / "out" / "benchmark.csv")["workload"]) == {"device", "tasks"}
    assert main([*arguments[:2], "--output", smoke]) == 2
    assert "is not a benchmark.csv" in caplog.messages[-1]
    assert main(["--profile", "desktop", "--output", "x.csv"]) == 2


# On a GPU ------------------------------------------------------------------------------------------------------------


@GPU
def test_on_a_gpu_graphs_are_timed_and_what_waits_is_eager(tmp_path):
    study = LayerStudy(((64, 96),), (1, 300), (5,), (8, 64), routings=("uniform", "runs"), launches=("graph",))
    settings = replace(SETTINGS, layers=(study,), backends=(*BACKENDS, "triton", "auto"), dtype="bfloat16")
    assert run(tmp_path / "benchmark.csv", settings, torch.device("cuda"))
    rows = read_rows(tmp_path / "benchmark.csv").query("workload == 'layer' and metric == 'time_us'")
    assert set(rows[rows["unit"] == NOT_CAPTURABLE]["backend"]) == {"loop"}
    timed = rows.dropna(subset="value").groupby("backend")["launch"].unique().map(set)
    for name in strategies(settings.backends):
        assert timed[name] == ({"eager"} if name == "loop" else {"graph"})


@GPU
def test_a_graph_of_a_backward_pass_holds_no_forward_pass():
    cell = replace(CELL, tokens=4096, in_features=2048, out_features=2048, dtype="bfloat16")
    o = make_operands(cell, torch.device("cuda"))
    watch = timing.Stopwatch(o.x.device, repeats=20, seconds=0.2)
    forward, backward = (watch.graph(lambda: make("base", 2, o)) for make in (forward_pass, backward_pass))
    assert 0.5 < forward[0] / backward[0] < 2, "one matrix product each"


@GPU
def test_a_graphs_time_is_the_gpus_however_slow_the_cpu_is(monkeypatch):
    x = torch.zeros(1, device="cuda")
    watch = timing.Stopwatch(x.device, repeats=5, seconds=0.2)
    usual = watch.graph(lambda: x.zero_)
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (time.sleep(1e-3), replay(graph)))
    assert watch.graph(lambda: x.zero_)[2] < 3 * usual[0] < 100, "not the thousand that the CPU takes"
