"""The benchmark of a whole model: it measures the decoder it says, checks the results, and goes on where it stopped."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import DynamicCache

from meteora import layer, model
from meteora.backends import dense
from meteora.gating import Routing
from meteora.study import benchmark_model
from meteora.study.benchmark import run_benchmark
from meteora.study.benchmark_model import Case, Decoders, Work, cases, check
from meteora.study.benchmark_rows import OUT_OF_MEMORY, read_rows
from meteora.study.model_settings import DecoderShape, ModelStudy, WholeModel
from meteora.study.profiles import BenchmarkSettings, LayerStudy, PromptStudy
from meteora.study.random_models import adapted_layers

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = DecoderShape(32, 64, 2, 4, 2, 256)
WHOLE = WholeModel(
    SHAPE,
    studies=(
        ModelStudy("prefill", (1,), (20, 40), ("dense",), ("eager", "graph")),
        ModelStudy("decode", (3,), (20,), ("dense",)),
        ModelStudy("prefill", (1,), (20,), ("loop", "bmm")),
    ),
    adapters=5,
    repeats=2,
    seconds=0.01,
)
SETTINGS = BenchmarkSettings(
    ("dense",),
    layers=(LayerStudy(sizes=((8, 12),), tokens=(1,), adapters=(1,)),),
    tasks=PromptStudy(sizes=((8, 12),), prompts=1),
    model=WHOLE,
)
KEY = ["mode", "batch", "tokens", "backend"]


def run(path, settings=SETTINGS, **options):
    return run_benchmark(settings, path, {}, device=CPU, levels=["model"], progress=False, **options)


@pytest.fixture(scope="module")
def decoders() -> Decoders:
    return Decoders(WHOLE, "float32", CPU)


def test_the_cases_are_every_combination_and_the_bounds_are_launched_in_every_way():
    found = cases(WHOLE)
    assert list(found) == [Case("prefill", 1, 20), Case("prefill", 1, 40), Case("decode", 3, 20)]
    both = {"eager", "graph"}
    first = {"base": both, "single_lora": both, "dense": both, "loop": {"eager"}, "bmm": {"eager"}}
    assert found[Case("prefill", 1, 20)] == first and list(found[Case("decode", 3, 20)]) == ["base", "single_lora", "dense"]


def test_three_decoders_share_one_copy_of_the_weights(decoders):
    base, single, mixture = decoders.base, decoders.single_lora.get_base_model(), decoders.mixture.base_model
    linears = adapted_layers(base)
    assert len(linears) == 7 * 2 and base.config.vocab_size == 256 and not decoders.base.training
    for name, linear in linears.items():
        assert type(linear) is torch.nn.Linear, "the bound is the decoder as transformers has it"
        assert isinstance(single.get_submodule(name), LoraLayer)
        others = (model.get_submodule(name).base_layer.weight for model in (single, mixture))
        assert {weight.data_ptr() for weight in others} == {linear.weight.data_ptr()}
    assert all(len(layer.lora_A) == 5 * 8 and layer.gate.weight.any() for layer in decoders.mixture.layers.values())


def test_updates_are_about_half_as_large_as_the_layers_outputs(decoders):
    x = torch.randn(500, 32)
    layer = decoders.mixture.layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad(), decoders.mixture.route_to("adapter 3"):
        share = (layer(x) - layer.base_layer(x)).norm() / layer.base_layer(x).norm()
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("name", ["base", "single_lora", "dense"])
def test_a_step_decodes_the_last_place_of_the_context_each_time(decoders, name):
    work = Work(Case("decode", 2, 12), decoders)
    with torch.no_grad():
        first, second = work.call(name)(), work.call(name)()
        assert first.shape == (2, 1, 256) and torch.equal(first, second)
        assert {int(layer.cumulative_length) for layer in work.cache.layers} == {12}
        # the same context in a cache that grows
        cache = DynamicCache(config=decoders.base.config)
        for n, filled in enumerate(work.cache.layers):
            cache.update(filled.keys[:, :, :11], filled.values[:, :, :11], n)
        expected = decoders.model(name)(input_ids=work.ids, past_key_values=cache).logits
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["loop", "bmm", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [Case("prefill", 2, 30), Case("decode", 3, 20)], ids=lambda case: case.mode)
def test_right_results_pass(name, dtype, case):
    with torch.no_grad():
        check(Work(case, Decoders(WHOLE, dtype, CPU)), name)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs the kernels on a CPU")
def test_so_do_the_kernels(decoders):
    with torch.no_grad():
        check(Work(Case("prefill", 1, 20), decoders), "triton")


def equal_weights(y, x, A, B, column_adapter, routing):
    return dense.mix(y, x, A, B, column_adapter, Routing(routing.indices, torch.full_like(routing.weights, 0.5)))


def nothing(y, *rest):
    return y


def second_adapter(y, x, A, B, column_adapter, routing):
    indices = (routing.indices + 1) % 5 if routing.indices.shape[1] == 1 else routing.indices
    return dense.mix(y, x, A, B, column_adapter, Routing(indices, routing.weights))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (equal_weights, "dense is wrong in 'model.layers.*its update is off by"),
        (nothing, "dense is wrong in 'model.layers.*its update is off by"),
        (second_adapter, "dense, told to use one adapter, differs from PEFT by"),
    ],
)
def test_a_wrong_result_stops_the_benchmark(monkeypatch, tmp_path, wrong, message):
    monkeypatch.setattr(layer, "get_mix", lambda *names: wrong)
    with pytest.raises(AssertionError, match=message):
        run(tmp_path / "benchmark.csv")
    assert set(read_rows(tmp_path / "benchmark.csv")["backend"]) == {"base", "single_lora"}, "what came before is kept"


def test_rows_are_tidy_and_complete(tmp_path):
    assert run(tmp_path / "benchmark.csv")
    rows = read_rows(tmp_path / "benchmark.csv")
    assert not rows.duplicated([*KEY, "launch", "metric"]).any() and set(rows["launch"]) == {"eager"}
    assert len(rows) == 3 * sum(map(len, cases(WHOLE).values())) and (rows["value"] > 0).all()
    assert (rows["p20"] <= rows["value"]).all() and (rows["value"] <= rows["p80"]).all()
    for column, value in {"in_features": 32, "out_features": 256, "adapters": 5, "rank": 8, "top_k": 2}.items():
        assert set(rows[column]) == {value}
    wide = rows.pivot(index=KEY, columns="metric", values="value").reset_index()
    tokens = wide["batch"] * wide["tokens"].where(wide["mode"] == "prefill", 1)
    assert wide["tokens_per_s"].to_list() == pytest.approx((1e6 * tokens / wide["time_us"]).to_list(), rel=1e-4)
    peak = wide.set_index(["backend", "mode"])["peak_bytes"]
    assert peak["bmm", "prefill"].min() > peak["dense", "prefill"].min(), "weights are copied for every token"


def test_a_run_goes_on_later_and_measures_a_missing_strategy_again(tmp_path, monkeypatch):
    path = tmp_path / "benchmark.csv"
    assert not run(path, time_limit=0.0) and not path.exists()
    assert run(path)
    whole = path.read_text()
    monkeypatch.setattr(benchmark_model, "Decoders", lambda *arguments: pytest.fail("made though nothing is missing"))
    assert run(path) and path.read_text() == whole
    monkeypatch.undo()
    path.write_text("".join(line for line in whole.splitlines(keepends=True) if ",dense,decode," not in line))
    assert run(path) and len(path.read_text().splitlines()) == len(whole.splitlines())


def test_what_does_not_fit_is_a_row_that_says_so(tmp_path, monkeypatch):
    real = model.MeteoraModel.forward

    def too_large(self, *arguments, **options):
        if self.state.backend == "bmm":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments, **options)

    monkeypatch.setattr(model.MeteoraModel, "forward", too_large)
    run(tmp_path / "benchmark.csv")
    rows = read_rows(tmp_path / "benchmark.csv")
    assert set(rows[rows["backend"] == "bmm"]["unit"]) == {OUT_OF_MEMORY}
    assert set(rows[rows["backend"] == "bmm"]["metric"]) == {"time_us", "tokens_per_s", "peak_bytes"}
    assert (rows["value"].isna() == (rows["backend"] == "bmm")).all()


def test_a_profile_without_a_model_measures_none(tmp_path):
    assert run(tmp_path / "benchmark.csv", replace(SETTINGS, model=None))
    assert not (tmp_path / "benchmark.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": 1}, "top_k must be at most 1"),
        ({"studies": ()}, "studies must name at least one"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_mistakes_in_the_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(WHOLE, **change)
    with pytest.raises(ValueError, match="num_attention_heads must be a multiple of num_key_value_heads, not 4"):
        replace(SHAPE, num_key_value_heads=3)
    with pytest.raises(ValueError, match="tokens must be at least 2"):
        ModelStudy("decode", (1,), (1,), ("dense",))


@GPU
def test_on_a_gpu_prefill_and_decoding_fit_into_graphs(tmp_path):
    shape = DecoderShape(256, 512, 2, 4, 2, 512)
    studies = tuple(
        ModelStudy(mode, (1, 2), (64,), names, ways)
        for mode in ("prefill", "decode")
        for names, ways in ((("dense", "triton"), ("eager", "graph")), (("loop",), ("eager",)))
    )
    settings = replace(SETTINGS, dtype="bfloat16", model=replace(WHOLE, shape=shape, studies=studies))
    assert run_benchmark(
        settings, tmp_path / "b.csv", {}, device=torch.device("cuda"), levels=["model"], progress=False
    )  # fmt: skip
    timed = read_rows(tmp_path / "b.csv").query("metric == 'time_us'").dropna(subset="value")
    launches = timed.groupby(["mode", "backend"])["launch"].unique().map(set)
    for mode in ("prefill", "decode"):
        for name in ("base", "single_lora", "dense", "triton"):
            assert launches[mode, name] == {"eager", "graph"}
        assert launches[mode, "loop"] == {"eager"}
