"""Compiled decoder layers: the gradients of layers that are not, and one graph for all of them and all shapes."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from meteora import MeteoraConfig, MeteoraModel
from meteora.batches import Sample, collate
from meteora.compiling import compiled_layers, worth_compiling
from meteora.passes import gate_inputs
from meteora.trace import Trace
from meteora.training import _forward_joint, _forward_local
from meteora.training_loop import response_losses

CPU = torch.device("cpu")
SHAPES = [(3, 9), (4, 8), (2, 12), (5, 7)]


@pytest.fixture
def model(core, tiny_llama, mixed_adapters, tmp_path):
    fewer = core.make_adapter(tmp_path / "fewer", tiny_llama, target_modules=["q_proj", "down_proj"], r=2)
    model = MeteoraModel.from_adapters(
        tiny_llama, {"one": fewer, "two": mixed_adapters["three"]}, MeteoraConfig(top_k=2)
    )
    return core.randomize_gates(model, std=0.3)


@pytest.fixture
def equal(core, tiny_llama, tmp_path):
    """With adapters of one rank and the same modules, as they are trained."""
    paths = {name: core.make_adapter(tmp_path / name, tiny_llama, r=3, seed=n) for n, name in enumerate(("one", "two"))}
    return MeteoraModel.from_adapters(tiny_llama, paths)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def batch_of(rows, tokens):
    """The last of the samples has all of the tokens, the others fewer; the last two tokens are the response."""
    generator = torch.Generator().manual_seed(rows)
    samples = []
    for n in range(rows):
        length = tokens if n == rows - 1 else 3 + n
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        samples.append(Sample(ids, [False] * (length - 2) + [True] * 2, [n % 2] * length))
    return collate(samples, 2, CPU)


def forced(model, batch, backward=True):
    with model.route_to([model.adapter_names[task] for task in batch.tasks]), torch.set_grad_enabled(backward):
        losses = response_losses(model, batch)
        if backward:
            losses.sum().backward()
    return losses.detach()


def own(model, batch):
    """The step of `train_adapters`."""
    model.state.own = torch.nn.functional.one_hot(batch.token_tasks, 2).float()
    losses = response_losses(model, batch)
    model.state.own = None
    losses.sum().backward()
    return losses.detach()


def joint(model, batch):
    return _forward_joint(model, gate_inputs(batch, batch.attention_mask / 20, 1 / 6), 3.0)


def gate(model, batch):
    for layer in model.layers.values():
        layer.gate.weight.grad = torch.zeros_like(layer.gate.weight)
    return _forward_local(model, gate_inputs(batch, batch.attention_mask / 20, 1 / 6))


def steps(model, parameters, step):
    """Result and gradients, by name, of one step for each of the shapes."""
    found = []
    for shape in SHAPES:
        for parameter in parameters.values():
            parameter.grad = None
        result = step(model, batch_of(*shape))
        found.append((result, {name: parameter.grad.clone() for name, parameter in parameters.items()}))
    return found


def assert_graphs(count):
    assert counters["stats"]["unique_graphs"] == count and not counters["graph_break"]


@pytest.mark.parametrize(
    ("step", "trained"), [(own, "lora_"), (forced, "lora_"), (joint, "gate.weight"), (gate, "gate.weight")]
)
def test_gradients_are_those_of_eager_layers_and_one_graph_is_enough(request, step, trained):
    model = request.getfixturevalue("equal" if step is own else "model")
    parameters = {name: p.requires_grad_(True) for name, p in model.named_parameters() if trained in name}
    eager = steps(model, parameters, step)
    with compiled_layers(model, True, "aot_eager"):
        compiled = steps(model, parameters, step)
        assert_graphs(1)
    for (expected, gradients), (result, found) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(result, expected)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    again = steps(model, parameters, step)  # nothing is left of it
    assert_graphs(1)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(again, eager, strict=True))


def test_passes_without_gradients_are_one_graph_more(model):
    for layer in model.layers.values():
        layer.lora_A.requires_grad_(True)
    with compiled_layers(model, True, "aot_eager"):
        for shape in SHAPES:
            batch = batch_of(*shape)
            torch.testing.assert_close(forced(model, batch), forced(model, batch, backward=False))
    assert_graphs(2)


def test_what_cannot_be_compiled_runs_as_it_is(model):
    def failing(graph, inputs):
        raise RuntimeError("no compiler found")

    batch = batch_of(3, 9)
    expected = forced(model, batch, backward=False)
    with compiled_layers(model, True, failing):
        assert torch.equal(forced(model, batch, backward=False), expected)


def test_compiled_for_a_gpu_alone_and_for_whole_plain_models(model, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr("meteora.backends.triton.INSTALLED", True)
    assert worth_compiling(model, gpu) and not worth_compiling(model, CPU)
    model.base_model.hf_device_map = {"": 0}
    assert not worth_compiling(model, gpu)
    del model.base_model.hf_device_map
    monkeypatch.setattr("meteora.backends.triton.INSTALLED", False)
    assert not worth_compiling(model, gpu)


def test_the_users_own_compilation_comes_back(model):
    layers = model.base_model.model.layers
    layers[0].compile(backend="eager")
    own = layers[0]._compiled_call_impl
    with compiled_layers(model, True, "eager"):
        assert layers[0]._compiled_call_impl is not own and layers[1]._compiled_call_impl is not None
    assert layers[0]._compiled_call_impl is own and layers[1]._compiled_call_impl is None


def test_a_traced_layer_compiles_into_one_graph(model, core):
    layer = next(iter(model.layers.values()))
    x = torch.randn(2, 5, layer.in_features)
    with torch.no_grad(), model.trace() as expected:
        layer(x)
    with torch.no_grad(), model.trace() as found:
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert torch.equal(found.indices[layer.name], expected.indices[layer.name])


# Generation -----------------------------------------------------------------------------------------------------------


def test_compiled_generation_is_the_same(model, core):
    """A static cache has transformers compile the steps: here on the CPU too, in one graph."""
    everywhere = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    everywhere._compile_all_devices = True
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = {"cache_implementation": "static", "compile_config": everywhere}
    ids = core.tokens()

    def graphs_of(inside=nullcontext) -> int:
        before = counters["stats"]["unique_graphs"]
        with inside() as one:
            expected = model.generate(ids, **options)
        with inside() as other:
            assert torch.equal(model.generate(ids, **options, **static), expected)
        if isinstance(one, Trace):
            assert all(torch.equal(other.indices[name], found) for name, found in one.indices.items())
        return counters["stats"]["unique_graphs"] - before

    assert graphs_of() == 1 and graphs_of() == 0, "compiled once for all calls"
    assert graphs_of(model.trace) == 0, "it would be compiled for every step"
    model.set_top_k(1)
    assert graphs_of() == 1
    assert graphs_of(model.disable_adapters) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rank", [2, 64])  # with many columns only those of the chosen adapters are read
def test_generation_in_cuda_graphs_is_the_same(core, tiny_llama, tmp_path, rank):
    """As transformers does it by itself there."""
    paths = {name: core.make_adapter(tmp_path / name, tiny_llama, r=rank, seed=n) for n, name in enumerate(("one", "two"))}

    def mixture():
        return core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), paths), std=0.3).to("cuda")

    ids = core.tokens().to("cuda")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = mixture().generate(ids, **options)
    model = mixture()  # whose layers have not been called
    for _ in range(2):
        assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)
    assert counters["stats"]["unique_graphs"] > 0 and counters["inductor"]["cudagraph_skips"] == 0
    with model.trace() as one:
        model.generate(ids, **options)
    with model.trace() as other:
        model.generate(ids, **options, cache_implementation="static")
    assert all(torch.equal(other.indices[name], found) for name, found in one.indices.items())
