"""The trace is what the gates saw and chose: shapes, types, order, concatenation, and nothing left behind."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import GenerationConfig

from meteora import MeteoraConfig, MeteoraModel

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(core, tiny_llama, mixed_adapters):
    return core.randomize_gates(MeteoraModel.from_adapters(tiny_llama, mixed_adapters, MeteoraConfig(top_k=3))).eval()


@torch.no_grad()
def test_shapes_types_and_values(core, model):
    model.set_temperature(3.0)
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in model.layers.items()
    ]
    with model.trace() as trace:
        model(core.tokens(3, 7))
    for hook in hooks:
        hook.remove()
    names = [n for n, m in model.base_model.named_modules() if type(m).__name__ == "MeteoraLinear"]
    assert sorted(trace.logits) == sorted(trace.indices) == sorted(trace.weights) == sorted(names) and len(names) == 14
    for name in names:
        logits, indices, weights = trace.logits[name], trace.indices[name], trace.weights[name]
        assert logits.shape == (3, 7, 4) and indices.shape == weights.shape == (3, 7, 3)
        assert (logits.dtype, indices.dtype, weights.dtype) == (torch.float32, torch.int64, torch.float32)
        torch.testing.assert_close(logits, inputs[name] @ model.layers[name].gate.weight.T)  # before the temperature
        chosen = logits.gather(-1, indices)
        assert (chosen.diff(dim=-1) <= 0).all() and torch.equal(chosen, logits.topk(3).values)
        torch.testing.assert_close(weights, torch.softmax(chosen / 3.0, -1))


def test_logits_are_float32_for_a_bf16_model(core, tiny_llama, mixed_adapters):
    model = MeteoraModel.from_adapters(tiny_llama.bfloat16(), mixed_adapters)
    with torch.no_grad(), model.trace() as trace:
        assert model(core.tokens()).logits.dtype == torch.bfloat16
    assert trace.logits[Q].dtype == trace.weights[Q].dtype == torch.float32


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_concatenated_along_the_tokens(core, model, use_cache):
    ids = core.tokens(2, 5)
    with model.trace() as trace:
        out = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use_cache, eos_token_id=None)
    # Without a cache every pass runs over all tokens so far.
    seen = 5 + 3 if use_cache else 5 + 6 + 7 + 8
    assert trace.indices[Q].shape == (2, seen, 3)
    with torch.no_grad(), model.trace() as whole:
        model(out[:, :-1])
    torch.testing.assert_close(trace.logits[Q][:, -8:], whole.logits[Q], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"prompt_lookup_num_tokens": 1},
        {"guidance_scale": 1.5},
        {"assistant_model": "base"},
        {"assistant_early_exit": 1},
    ],
)
def test_tokens_that_are_not_in_the_text_are_refused(core, model, option):
    if "assistant_model" in option:
        option = {"assistant_model": model.base_model}
    ids = core.tokens(1, 5)
    with model.trace() as trace, pytest.raises(ValueError, match=f"trace cannot follow generation with {next(iter(option))}, "):
        model.generate(ids, max_new_tokens=4, do_sample=False, **option)
    assert not trace.indices


@pytest.mark.parametrize("keyword", [True, False])
def test_a_configuration_that_is_given_stays_as_it_is(core, model, keyword):
    ids = core.tokens(2, 5)
    given = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, guidance_scale=1)
    before = given.to_dict()
    options = {"generation_config": given} if keyword else {}
    with model.trace() as trace:
        model.generate(ids, *([] if keyword else [given]), **options)
    assert trace.indices[Q].shape[:2] == (2, 8) and given.to_dict() == before


def test_pads_are_included(core, model):
    ids = core.tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad(), model.trace() as trace:
        model(input_ids=ids, attention_mask=mask)
    assert trace.indices[Q].shape == (2, 6, 3)


def test_forced_routing_is_one_adapter_of_weight_1_beside_the_gates_logits(core, model):
    with torch.no_grad(), model.trace() as free:
        model(core.tokens())
    names = [model.adapter_names[n] for n in (2, 0, 3)]
    with torch.no_grad(), model.route_to(names), model.trace() as trace:
        model(core.tokens())
    for name in model.layers:
        assert trace.indices[name].shape == (3, 7, 1) and torch.equal(trace.weights[name], torch.ones(3, 7, 1))
        assert trace.indices[name][:, :, 0].tolist() == [[2] * 7, [0] * 7, [3] * 7]
    torch.testing.assert_close(trace.logits[Q], free.logits[Q])  # the first layer's inputs are the same


def test_nothing_is_recorded_while_adapters_are_disabled(core, model):
    with torch.no_grad(), model.trace() as trace, model.disable_adapters():
        model(core.tokens())
    assert trace.logits == trace.indices == trace.weights == {}


def test_tracing_changes_nothing_and_leaves_nothing(core, model):
    with torch.no_grad():
        before = model(core.tokens()).logits
        with model.trace() as trace:
            assert torch.equal(model(core.tokens()).logits, before)
        recorded = trace.logits[Q].shape
        assert torch.equal(model(core.tokens()).logits, before)
    assert trace.logits[Q].shape == recorded and model.state.trace is None
    reference = weakref.ref(trace)
    del trace
    gc.collect()
    assert reference() is None


def test_a_trace_ends_with_an_error_too(core, model):
    with pytest.raises(RuntimeError, match="inside"), model.trace():
        raise RuntimeError("inside")
    assert model.state.trace is None


def test_it_holds_no_graph(core, model):
    with model.trace() as trace:
        model(core.tokens())
    assert not trace.logits[Q].requires_grad and not trace.weights[Q].requires_grad


@pytest.mark.parametrize("how", ["argument", "configuration", "position", "model"])
def test_beam_search_is_refused(core, model, how):
    beams = copy.deepcopy(model.generation_config)
    beams.num_beams = 3
    args, settings = (core.tokens(),), {"max_new_tokens": 2}
    if how == "argument":
        settings["num_beams"] = 3
    elif how == "configuration":
        settings["generation_config"] = beams
    elif how == "position":
        args += (beams,)
    else:
        model.base_model.generation_config = beams
    with model.trace(), pytest.raises(ValueError, match="beam search"):
        model.generate(*args, **settings)
    model.generate(*args, **settings)


def test_passes_of_another_k_are_refused(core, model):
    with torch.no_grad(), model.trace():
        model(core.tokens(3))
        with pytest.raises(ValueError, match="holds 3 chosen adapters a token and now 1; open a new trace"):
            with model.route_to("one"):
                model(core.tokens(3))


def test_batches_of_different_sizes_are_refused(core, model):
    with torch.no_grad(), model.trace():
        model(core.tokens(3))
        with pytest.raises(ValueError, match="batches of 3 and now one of 2; open a new trace"):
            model(core.tokens(2))


def test_recomputed_layers_are_traced_once(core, model):
    for layer in model.layers.values():
        layer.gate.requires_grad_(True)
    ids = core.tokens(2, 5)
    with model.trace() as expected:
        model(input_ids=ids, labels=ids).loss.backward()
    with model.activation_checkpointing(True), model.trace() as trace:
        model(input_ids=ids, labels=ids).loss.backward()
    assert trace.indices[Q].shape == (2, 5, 3)
    assert all(torch.equal(found, expected.indices[name]) for name, found in trace.indices.items())


@torch.no_grad()
def test_an_adapter_added_meanwhile_is_told(core, model, mixed_adapters):
    with model.trace() as trace, pytest.raises(ValueError, match="logits of 4 adapters, and the model has 5 now"):
        model(core.tokens())
        model.add_adapter("more", next(iter(mixed_adapters.values())))
        model(core.tokens())
    assert trace.logits[Q].shape[-1] == 4
