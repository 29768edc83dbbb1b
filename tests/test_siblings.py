"""Layers that get one input are computed together, and their outputs are those that each computes for itself."""

import copy
import gc
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from meteora import GateTrainingConfig, MeteoraConfig, MeteoraModel, train_gates
from meteora.adapters import LoraWeights
from meteora.kernels import decode, ops

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@pytest.fixture
def calls(monkeypatch):
    """How many layers each computation was for, as they come."""
    found = []
    inner = ops.choose_siblings
    monkeypatch.setattr(ops, "choose_siblings", lambda *args, **kw: (found.append(args[2]), inner(*args, **kw))[1])
    return found


@pytest.fixture
def model(core, tiny_llama, tmp_path):
    paths = {name: core.make_adapter(tmp_path / name, tiny_llama, r=3, seed=n) for n, name in enumerate("abc")}
    model = MeteoraModel.from_adapters(tiny_llama, paths, MeteoraConfig(top_k=2, backend="triton"))
    model.state.untrained.clear()  # nothing that a compiler could follow
    return core.randomize_gates(model, std=0.3)


def attention(model, block=0):
    return model.base_model.model.layers[block].self_attn


def groups(model):
    """All siblings of a model that are more than one."""
    return [group for group in dict.fromkeys(layer.siblings for layer in model.layers.values()) if group.layers[1:]]


def separate(model):
    """The same model, in which each layer computes for itself."""
    model = copy.deepcopy(model)
    for layer in model.layers.values():
        layer.siblings = None
    return model


def test_siblings_are_found_by_their_parent_and_have_adapters_alike(model, tiny_llama, mixed_adapters):
    found = [[layer.name.rpartition(".")[2] for layer in group.layers] for group in groups(model)]
    assert found == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
    assert len({layer.name.rpartition(".")[0] for layer in attention(model).q_proj.siblings.layers}) == 1


def test_other_adapters_in_each_layer_make_no_siblings(tiny_llama, mixed_adapters):
    model = MeteoraModel.from_adapters(tiny_llama, mixed_adapters)
    assert [len(group.layers) for group in groups(model)] == [2]  # gate and up of the first block
    assert attention(model).q_proj.siblings.layers == [attention(model).q_proj]


@pytest.mark.parametrize(
    "batch, length, settings",
    [
        (1, 1, {}), (3, 1, {"top_k": 1}), (2, 9, {"temperature": 4.0}), (3, 3, {"absolute_logits": True}),
        (2, 4, {"least_share": 0.7}),
    ],  # fmt: skip
)
@torch.no_grad()
def test_outputs_are_to_the_bit_those_of_separate_layers(model, core, calls, batch, length, settings):
    for name, value in settings.items():
        setattr(model.state, name, value)
    ids = core.tokens(batch, length)
    expected = separate(model)(input_ids=ids).logits
    assert calls == [1] * 14
    calls.clear()
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert calls == [3, 1, 2, 1] * 2
    assert not any(group._ready for group in groups(model)), "nothing is kept"


@pytest.mark.parametrize("tokens, fits", [(4, [True] * 3), (5, [False, True, True]), (8, [False, True, True])])
@torch.no_grad()
def test_so_are_those_of_layers_too_wide_for_the_kernel_that_takes_the_others(model, core, monkeypatch, tokens, fits):
    monkeypatch.setattr(decode, "MOST_OUTPUTS", 4 * 32)
    layers = attention(model).q_proj.siblings.layers
    assert [decode.fits(tokens, layer.out_features, len(layer.lora_A)) for layer in layers] == fits
    ids, alone = core.tokens(tokens, 1), separate(model)
    expected = alone(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    compiled = torch.compile(model.base_model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(input_ids=ids).logits, expected)


@torch.no_grad()
def test_many_tokens_and_generation(model, core):
    ids = core.tokens(2, 33)
    torch.testing.assert_close(model(input_ids=ids).logits, separate(model)(input_ids=ids).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    found, expected = (m.generate(ids[:, :3], **options) for m in (model, separate(model)))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_compiled_layers_compute_for_themselves(model, core, calls):
    ids = core.tokens(1, 3)
    expected = separate(model)(input_ids=ids).logits
    compiled = torch.compile(model.base_model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
    calls.clear()
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    assert calls == [1] * 14 + [3, 1, 2, 1] * 2


def together(model, x, change=lambda: None, other=None):
    """What q, then, after a change, k and v make of x (or k of another input), and what they should."""
    layer, alone = attention(model), attention(separate(model))
    q = layer.q_proj(x)
    expected = [alone.q_proj(x)]
    change()
    inputs = [x if other is None else other, x]
    alone = attention(separate(model))
    expected += [alone.k_proj(inputs[0]), alone.v_proj(inputs[1])]
    return [q, layer.k_proj(inputs[0]), layer.v_proj(inputs[1])], expected


def assert_same(results):
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@torch.no_grad()
def test_what_is_written_to_the_input_between_siblings_is_seen(model, calls):
    x = torch.randn(2, 3, 32)
    assert_same(together(model, x))
    assert calls.count(3) == 1
    for change in (lambda: x.mul_(2), lambda: x[0, 1].zero_(), lambda: x.view(-1)[5:].add_(1)):
        attention(model).q_proj.siblings.apart = False
        assert_same(together(model, x, change))
        assert attention(model).q_proj.siblings.apart


@torch.no_grad()
def test_another_input_is_not_taken_for_the_first(model, calls):
    x = torch.randn(2, 3, 32)
    for other in (x.clone(), x.view(2, 3, 32), x[:1], torch.randn(1, 32)):
        attention(model).q_proj.siblings.apart = False
        assert_same(together(model, x, other=other))
        assert attention(model).q_proj.siblings.apart, "and no more is computed in vain"
    calls.clear()
    assert_same(together(model, x))
    assert 3 not in calls


def changes(model):
    layer, state = attention(model).k_proj, model.state
    return [
        lambda: model.set_top_k(1),
        lambda: model.set_temperature(3.0),
        lambda: model.set_least_share(0.8),
        lambda: setattr(state, "absolute_logits", True),
        lambda: setattr(state, "enabled", False),
        lambda: model.set_backend("dense"),
        lambda: layer.gate.weight.neg_(),
        lambda: layer.lora_A.mul_(2),
        lambda: layer.lora_B.mul_(2),
        lambda: layer.base_layer.weight.mul_(2),
        lambda: setattr(layer, "lora_B", nn.Parameter(torch.randn_like(layer.lora_B), requires_grad=False)),
    ]


@pytest.mark.parametrize("number", range(11))
@torch.no_grad()
def test_a_setting_or_weight_that_changes_between_siblings_is_seen(model, number):
    change = changes(model)[number]
    found, expected = together(model, torch.randn(2, 3, 32), change)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_weights_that_change_between_passes(model, core):
    ids = core.tokens(1, 2)
    model(input_ids=ids)
    for change in changes(model):
        change()
        torch.testing.assert_close(model(input_ids=ids).logits, separate(model)(input_ids=ids).logits)
    model.state.enabled, model.state.backend = True, "triton"
    for layer in model.layers.values():
        layer.gate.weight.add_(0.1)
    assert torch.equal(model(input_ids=ids).logits, separate(model)(input_ids=ids).logits)
    packed = attention(model).q_proj.siblings._packed
    for layer in attention(model).q_proj.siblings.layers:
        assert layer.lora_A.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr(), "A is kept twice"


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_loop_of_ones_own_is_seen(model, core, fused):
    """Also where the optimiser does not tell that it wrote, and by a graph, which does not look."""
    ids = core.tokens(1, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([layer.gate.weight for layer in model.layers.values()], lr=0.3, fused=fused)
    for _ in range(2):
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            # The graph first: what runs without it would pack anew.
            graph, found = compiled(input_ids=ids).logits, model(input_ids=ids).logits
            expected = separate(model).to("cpu")(input_ids=ids).logits  # moved: nothing is kept
        assert torch.equal(found, expected)
        torch.testing.assert_close(graph, expected)


@torch.no_grad()
@pytest.mark.parametrize("replace", [lambda gate, new: setattr(gate, "weight", nn.Parameter(new)),
                                     lambda gate, new: setattr(gate.weight, "data", new)])  # fmt: skip
def test_weights_that_come_to_lie_where_others_did_are_seen(model, replace):
    layer = attention(model).o_proj
    x = torch.randn(1, 1, 32)
    for _ in range(20):
        layer(x)
        for _ in range(2):
            replace(layer.gate, torch.randn_like(layer.gate.weight))
        found = layer(x)
        layer.forget_packed()
        assert torch.equal(found, layer(x))


def test_packed_weights_stay_where_they_are(model, core):
    """Graphs that were captured once read them there, also after a pass with gradients, and when gates have changed."""
    places, ids = [], core.tokens(1, 3)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        with mode():
            model(input_ids=ids)
        places.append([layer.lora_A.data_ptr() for layer in model.layers.values()])
    with torch.no_grad():
        for layer in model.layers.values():
            layer.gate.weight.normal_()
        found = model(input_ids=ids).logits
        places.append([layer.lora_A.data_ptr() for layer in model.layers.values()])
        assert torch.equal(found, separate(model).to("cpu")(input_ids=ids).logits)
    assert all(place == places[0] for place in places)


@torch.no_grad()
@pytest.mark.parametrize("data", [False, True])
def test_adapters_that_are_put_back_are_what_they_were(model, data):
    """Another's A is packed elsewhere, not over theirs."""
    layer, x = attention(model).q_proj, torch.randn(1, 3, 32)
    expected = layer(x)
    other = torch.randn_like(layer.lora_A)
    if data:
        old = layer.lora_A.data
        layer.lora_A.data = other
    else:
        old = layer.lora_A
        layer.lora_A = nn.Parameter(other)
    assert not torch.equal(layer(x), expected)
    if data:
        layer.lora_A.data = old
    else:
        layer.lora_A = old
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_an_adapter_in_some_of_the_siblings_alone(model, core):
    block = attention(model)
    x = torch.randn(1, 3, 32)
    weights = LoraWeights(torch.randn(3, 32), torch.randn(block.k_proj.out_features, 3), 1.0)
    block.k_proj.add_adapter(weights)
    block.k_proj.gate.weight[-1] = 1.0
    found = [layer(x) for layer in (block.q_proj, block.k_proj, block.v_proj)]
    for layer in (block.q_proj, block.k_proj, block.v_proj):
        layer.siblings = None
    assert all(map(torch.equal, found, [layer(x) for layer in (block.q_proj, block.k_proj, block.v_proj)]))


@torch.no_grad()
def test_an_input_of_another_width_is_the_base_layers_to_refuse(model, calls):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        attention(model).q_proj(torch.randn(1, 3, 48))
    assert not calls


@torch.no_grad()
def test_a_graph_of_another_type_packs_its_own(model, core):
    """What the same model kept in 32 bits is of no use to its layers that autocast gives 16."""
    ids = core.tokens(1, 3)
    model(input_ids=ids)
    with torch.autocast("cpu", torch.float16):
        expected = model(input_ids=ids).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


def test_passes_that_somebody_watches_are_separate(model, core, calls):
    ids = core.tokens(1, 2)
    model(input_ids=ids).logits.sum().backward()
    with torch.inference_mode():
        model(input_ids=ids)
    with torch.no_grad():
        with model.trace() as trace:
            model(input_ids=ids)
        with model.route_to("b"):
            model(input_ids=ids)
        with torch.autocast("cpu", dtype=torch.float16):
            model(input_ids=ids)
        attention(model).k_proj.base_layer.register_forward_hook(lambda *_: None)
        calls.clear()
        model(input_ids=ids)
    assert len(trace.logits) == 14
    assert calls == [1] * 4 + [2, 1] + [3, 1, 2, 1]


@torch.no_grad()
def test_hooks_of_the_layers_see_their_own_calls(model, core, calls):
    seen, alone = [], separate(model)
    for name, layer in model.layers.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.append((name, *inputs, output)))
    model(input_ids=core.tokens(1, 2))
    assert [name for name, *_ in seen] == list(model.layers) and 3 in calls
    for name, x, y in seen:
        assert torch.equal(y, alone.layers[name](x))
    # One that replaces a layer's input makes it another input.
    attention(model).k_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    x = torch.randn(1, 2, 32)
    attention(model).q_proj(x)
    assert torch.equal(attention(model).k_proj(x), attention(alone).k_proj(x * 2))


@torch.no_grad()
def test_what_nobody_takes_goes_with_its_input(model, calls):
    layer = attention(model)
    x = torch.randn(2, 3, 32)
    layer.q_proj(x)
    assert layer.q_proj.siblings._ready
    del x
    gc.collect()
    assert not layer.q_proj.siblings._ready and layer.q_proj.siblings.apart
    calls.clear()
    layer.q_proj(torch.randn(1, 32))
    assert calls == [1]


def test_threads_do_not_meet(model):
    layer, alone = attention(model), attention(separate(model))
    inputs, threads = [torch.randn(1, 32) for _ in range(2)], [ThreadPoolExecutor(1) for _ in range(2)]
    for name in ("q_proj", "k_proj", "v_proj"):
        for x, thread in zip(inputs, threads, strict=True):
            found, expected = (thread.submit(torch.no_grad()(getattr(m, name)), x).result() for m in (layer, alone))
            assert torch.equal(found, expected)
    assert not layer.q_proj.siblings.apart and not layer.q_proj.siblings._ready
    for thread in threads:
        thread.shutdown()


@torch.no_grad()
def test_replicas_of_data_parallelism_compute_with_their_own_weights(model):
    layer, x = attention(model).q_proj, torch.randn(1, 32)
    replica = layer._replicate_for_data_parallel()
    replica.lora_A, replica.lora_B = layer.lora_A.detach().clone(), layer.lora_B * 2
    expected = attention(separate(model)).q_proj
    expected.lora_B.mul_(2)
    assert torch.equal(replica(x), expected(x))
    assert not layer.siblings.apart and not layer.siblings._ready


@torch.no_grad()
def test_layers_go_with_their_model_and_come_with_its_copies(model, core):
    ids = core.tokens(1, 2)
    expected = model(input_ids=ids).logits
    pickled = pickle.loads(pickle.dumps(model.layers))
    assert [len(layer.siblings.layers) for layer in pickled.values()] == [3, 3, 3, 1, 2, 2, 1] * 2
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=ids).logits, expected) and len(groups(copied)) == 4
    layer = weakref.ref(attention(copied).q_proj)
    assert layer().siblings.layers == [layer(), attention(copied).k_proj, attention(copied).v_proj]
    gc.collect()
    gc.disable()
    try:
        del copied
        assert layer() is None, "a model's memory is free as soon as nobody has it"
    finally:
        gc.enable()


@torch.no_grad()
def test_added_adapters_and_unloading(model, core, tiny_llama, tmp_path):
    base = copy.deepcopy(model).unload()
    model.add_adapter("everywhere", core.make_adapter(tmp_path / "everywhere", base, r=2, seed=7))
    assert len(groups(model)) == 4
    model.add_adapter("some", core.make_adapter(tmp_path / "some", base, target_modules=["q_proj"], seed=8))
    assert len(groups(model)) == 2 and len(attention(model).k_proj.siblings.layers) == 1
    ids = core.tokens(1, 2)
    assert torch.equal(model(input_ids=ids).logits, separate(model)(input_ids=ids).logits)
    copied = copy.deepcopy(model)
    assert torch.equal(model(input_ids=ids).logits, copied(input_ids=ids).logits)
    assert all(layer in layer.siblings.layers for layer in copied.layers.values())


def _trained(model, core, tmp_path, objective="joint"):
    rows = [{"prompt": name * 3, "response": name, "task": name} for name in "abc"] * 2
    config = GateTrainingConfig(objective=objective, max_steps=8, learning_rate=1.0)
    model.set_backend("dense")
    train_gates(model, rows, config, tokenizer=core.Tokenizer())
    model.set_backend("triton")


def _trained_where_it_lies(model, core, tmp_path):
    model.base_model.hf_device_map = {"": "cpu"}  # so that training does not move it
    _trained(model, core, tmp_path, "gate")
    del model.base_model.hf_device_map


def _grown(model, core, tmp_path):
    model.add_adapter("d", core.make_adapter(tmp_path / "d", AutoModelForCausalLM.from_config(model.config), r=3, seed=9))
    core.randomize_gates(model, std=0.3, seed=5)
    model.state.untrained.clear()


def _halved(model, core, tmp_path):
    model.half()


def _loaded(model, core, tmp_path):
    model.load_state_dict({n: -t if "gate.weight" in n else t for n, t in model.state_dict().items()})


@pytest.mark.parametrize("change", [_trained, _trained_where_it_lies, _grown, _halved, _loaded])
def test_a_model_compiled_after_a_change_computes_with_the_weights_of_then(model, core, tmp_path, change):
    ids = core.tokens(1, 2)
    with torch.no_grad():
        before = model(input_ids=ids).logits  # packs the weights
    change(model, core, tmp_path)
    compiled = torch.compile(model.base_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits
        expected = separate(model)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert change is _halved or (before - expected).abs().max() > 1e-3


def test_a_model_made_under_inference_mode(model, core, tiny_llama, tmp_path):
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_config(model.config)
        paths = {name: core.make_adapter(tmp_path / f"i{name}", base, r=3, seed=n) for n, name in enumerate("ab")}
        made = core.randomize_gates(MeteoraModel.from_adapters(base, paths, MeteoraConfig(backend="triton")), std=0.3)
        ids = core.tokens(1, 3)
        found = [made(input_ids=ids).logits for _ in range(3)]
    with torch.no_grad():
        found.append(made(input_ids=ids).logits)
        made.set_backend("dense")
        expected = made(input_ids=ids).logits
    for logits in found:
        torch.testing.assert_close(logits, expected)


def test_what_was_packed_is_let_go_when_the_weights_move(model, core):
    """Unless they lie where they did, as CUDA graphs read them there."""
    ids = core.tokens(1, 3)
    with torch.no_grad():
        expected = model(ids).logits
        held = [weakref.ref(group._packed) for group in groups(model)]
        model.to("cpu")
        model.float()
        assert all(packed() is not None for packed in held)
        model.half()
        assert all(packed() is None for packed in held)
        assert all(group._packed is None for group in groups(model))
        torch.testing.assert_close(model.float()(ids).logits, expected, rtol=0.05, atol=0.05)
