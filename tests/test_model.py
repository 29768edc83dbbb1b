"""The model: what it refuses, how it generates, what its contexts do, and that it leaves the base model as it was."""

import copy
import inspect
import json
import logging
import os
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM, Trainer, TrainingArguments

import meteora
from meteora import AdapterError, MeteoraConfig, MeteoraModel, train_gates

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tiny_llama):
    return tiny_llama


@pytest.fixture
def model(core, base, mixed_adapters):
    return core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(base), mixed_adapters))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def test_every_adapted_module_is_a_meteora_linear(model, base, mixed_adapters):
    assert model.adapter_names == list(mixed_adapters)
    wrapped = {n: m for n, m in model.base_model.named_modules() if isinstance(m, meteora.MeteoraLinear)}
    assert wrapped == model.layers and len(wrapped) == 14
    for name, layer in wrapped.items():
        assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight)
        assert isinstance(layer.gate, nn.Linear) and layer.gate.bias is None
        assert layer.gate.weight.shape == (4, layer.in_features)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"base_model.{name}.gate.weight" for name in wrapped}


def test_defaults(base, mixed_adapters):
    model = MeteoraModel.from_adapters(base, mixed_adapters)
    assert model.top_k == 2
    one = MeteoraModel.from_adapters(model.unload(), {"one": mixed_adapters["one"]})
    assert one.top_k == 1


def test_top_k_over_n_and_unknown_settings_are_errors(model, base, mixed_adapters):
    with pytest.raises(ValueError, match=r"top_k=5 is more than the 4 adapters there are; choose 1\.\.4"):
        MeteoraModel.from_adapters(base, mixed_adapters, MeteoraConfig(top_k=5))
    for top_k in (5, 0, np.int64(5), True, np.bool_(True), 2.0, np.float64(2)):
        with pytest.raises(ValueError, match="top_k"):
            model.set_top_k(top_k)
    for temperature in (-1, np.float32(0), True, np.bool_(True)):
        with pytest.raises(ValueError, match="temperature"):
            model.set_temperature(temperature)
    with pytest.raises(ValueError, match="least_share"):
        model.set_least_share(1.0)
    with pytest.raises(ValueError, match="unknown backend"):
        model.set_backend("quick")
    assert (model.top_k, model.state.temperature, model.state.backend) == (2, 1.0, "auto")
    with pytest.raises(AdapterError, match="there is no adapter 'nine'; there are 'one', "), model.route_to("nine"):
        pass
    with pytest.raises(AdapterError, match="at least one name"), model.route_to([]):
        pass
    with pytest.raises(NotImplementedError, match="depends on its input"):
        model.merge_and_unload()
    with pytest.raises(AdapterError, match="carries adapters already"):
        MeteoraModel.from_adapters(model.base_model, mixed_adapters)


@pytest.mark.parametrize(("integer", "real"), [(np.int64, np.float32), (np.uint8, np.float16), (np.int32, np.int64)])
def test_numbers_of_numpy_are_settings(model, tmp_path, integer, real):
    model.set_top_k(integer(3))
    model.set_temperature(real(2))
    assert (type(model.top_k), type(model.state.temperature)) == (int, float)
    model.save_pretrained(tmp_path / "m")
    assert (model.top_k, model.state.temperature) == (3, 2.0)


def test_backends_and_settings_reach_every_layer(core, model):
    results, ids = {}, core.tokens(2, 5)
    interpreted = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
    for backend in ("loop", "bmm", "dense", *interpreted, "auto"):
        model.set_backend(backend)
        results[backend] = logits(model, ids)
        torch.testing.assert_close(results[backend], results["loop"], rtol=1e-4, atol=1e-4)
    model.set_temperature(50)
    assert (logits(model, ids) - results["auto"]).abs().max() > 1e-3
    model.set_top_k(1)
    cold = logits(model, ids)
    model.set_temperature(1)
    assert torch.equal(logits(model, ids), cold)  # one choice has weight 1 at any temperature


def test_tokens_of_an_unsure_gate_get_no_adapter(core, base, mixed_adapters):
    """By every backend alike, in whole passes and in generation; and it can be told which adapter all the same."""
    model = core.randomize_gates(MeteoraModel.from_adapters(base, mixed_adapters, MeteoraConfig(least_share=0.6)), std=0.3)
    ids, found = core.tokens(2, 3), {}
    for backend in ("loop", "bmm", "dense", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])):
        model.set_backend(backend)
        found[backend] = logits(model, ids)
        torch.testing.assert_close(found[backend], found["loop"], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.trace() as trace:
        torch.testing.assert_close(logits(model, ids), found["loop"], rtol=1e-4, atol=1e-4)
    for name, weights in trace.weights.items():
        share = torch.softmax(trace.logits[name], -1).gather(-1, trace.indices[name]).sum(-1)
        assert torch.equal(weights.sum(-1) > 0, share >= 0.6)
    silent = torch.cat([weights.sum(-1).flatten() == 0 for weights in trace.weights.values()])
    assert 0 < silent.float().mean() < 1
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    with model.route_to("one"):
        told = logits(model, ids)
    model.set_least_share(0)
    assert not torch.allclose(logits(model, ids), found["loop"], atol=1e-3)
    with model.route_to("one"):
        torch.testing.assert_close(logits(model, ids), told, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.gate.weight.zero_()
    model.set_least_share(0.9)
    with model.disable_adapters():
        expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), expected)


def test_the_base_model_may_be_a_path(core, model, base, mixed_adapters, tmp_path):
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "m")
    for again in (
        MeteoraModel.from_pretrained(tmp_path / "base", tmp_path / "m"),
        core.randomize_gates(MeteoraModel.from_adapters(str(tmp_path / "base"), mixed_adapters)),
    ):
        torch.testing.assert_close(logits(again, core.tokens()), logits(model, core.tokens()))


@pytest.mark.parametrize("gates", [None, "arrow"])
@pytest.mark.parametrize(
    "where", [(meteora.MeteoraLinear, "add_adapter", 3), (MeteoraModel, "_wrap", 3), (meteora.model, "link_siblings", 1)]
)
def test_an_adapter_that_cannot_be_added_leaves_the_model_as_it_was(core, base, mixed_adapters, monkeypatch, where, gates):
    model = MeteoraModel.from_adapters(base, {"four": mixed_adapters["four"]}, gates=gates)
    if gates is None:
        core.randomize_gates(model)
    before, layers = logits(model, core.tokens()), dict(model.layers)
    holder, name, nth = where
    real, calls, untrained = getattr(holder, name), [], set(model.state.untrained)

    def full(*args):
        calls.append(args)
        if len(calls) == nth:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(holder, name, full)
    with pytest.raises(torch.OutOfMemoryError):
        model.add_adapter("late", mixed_adapters["one"])
    monkeypatch.undo()
    assert torch.equal(logits(model, core.tokens()), before)
    assert model.adapter_names == model.state.adapters == ["four"] and model.layers == layers
    assert model.state.untrained == untrained
    assert {layer.gate.weight.shape[0] for layer in layers.values()} == {1}
    assert [m for m in model.modules() if isinstance(m, meteora.MeteoraLinear)] == list(layers.values())
    model.add_adapter("late", mixed_adapters["one"])
    assert model.adapter_names == ["four", "late"] and len(model.layers) > len(layers)


def test_contexts_let_one_thread_in_at_a_time(model, core):
    """Two would undo each other's settings in the wrong order."""
    inside, leave, refused = threading.Event(), threading.Event(), []

    def other():
        with model.route_to("one"):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    for context in (lambda: model.route_to("three"), model.disable_adapters, model.trace):
        with pytest.raises(RuntimeError, match="another thread, .* is inside route_to"), context():
            refused.append(context)
    leave.set()
    thread.join()
    assert not refused and model.state.forced is None and model.state.enabled
    with model.route_to("three"), model.trace() as trace:
        model(core.tokens())
    assert trace.indices and model.state.forced is None and model.state.trace is None


def test_contexts_may_be_left_in_any_order(model):
    """As those of generators are."""
    state, before = model.state, model.state.forced
    first, second, third = model.route_to("one"), model.disable_adapters(), model.route_to("three")
    for context in (first, second, third):
        context.__enter__()
    inner = state.forced
    first.__exit__(None, None, None)
    assert state.forced is inner and not state.enabled
    second.__exit__(None, None, None)
    assert state.forced is inner and state.enabled
    third.__exit__(None, None, None)
    assert state.forced is before and not state.inside


def test_a_copy_is_inside_of_no_context(model, core):
    ids = core.tokens()
    free = logits(model, ids)
    with model.route_to("one"), model.route_to("three"):
        copied = copy.deepcopy(model)
    assert not copied.state.inside and torch.equal(logits(copied, ids), free)
    found = []
    thread = threading.Thread(target=lambda: found.append(copied.route_to("one").__enter__()))
    thread.start()
    thread.join()
    assert found == [None], "another thread may enter it"


def test_what_transformers_does_with_adapters_of_peft_is_refused(model, base, core, mixed_adapters):
    before = logits(model, core.tokens())
    for name in ("load_adapter", "set_adapter", "enable_adapters", "delete_adapter", "active_adapters"):
        with pytest.raises(NotImplementedError, match="by add_adapter"):
            getattr(model, name)(mixed_adapters["one"])
    assert torch.equal(logits(model, core.tokens()), before)


def test_add_adapter_leaves_the_others_choices_alone(core, base, mixed_adapters):
    names = list(mixed_adapters)
    first = {name: mixed_adapters[name] for name in names[2:]}  # only some modules
    model = core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(base), first))
    with torch.no_grad(), model.trace() as before:
        model(core.tokens())
    model.add_adapter("new", mixed_adapters["one"])
    assert model.adapter_names == [*names[2:], "new"] and len(model.layers) == 14
    with torch.no_grad(), model.trace() as after:
        model(core.tokens())
    # Later layers see other inputs, since the new adapter may be chosen; the first sees the same.
    assert torch.equal(after.logits[Q][..., :2], before.logits[Q]) and not after.logits[Q][..., 2].any()
    alone = MeteoraModel.from_adapters(copy.deepcopy(base), {"one": mixed_adapters["one"]})
    with model.route_to("new"), alone.route_to("one"):
        torch.testing.assert_close(logits(model, core.tokens()), logits(alone, core.tokens()))
    for name in first:
        reference = MeteoraModel.from_adapters(copy.deepcopy(base), {name: first[name]})
        with model.route_to(name), reference.route_to(name):
            torch.testing.assert_close(logits(model, core.tokens()), logits(reference, core.tokens()))
    with pytest.raises(AdapterError, match="an adapter 'new' already"):
        model.add_adapter("new", mixed_adapters["one"])


def test_an_added_adapter_is_saved(core, model, base, mixed_adapters, tmp_path):
    model.add_adapter("fifth", mixed_adapters["one"])
    model.save_pretrained(tmp_path / "m")
    again = MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")
    assert again.adapter_names[-1] == "fifth"
    assert torch.equal(logits(again, core.tokens()), logits(model, core.tokens()))


def test_generation_with_and_without_cache_and_with_left_padding(core, model):
    ids = core.tokens(2, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, **settings)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    padded, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    padded[:, 3:], mask[:, 3:] = ids, 1
    longer = model.generate(input_ids=padded, attention_mask=mask, **settings)
    assert torch.equal(longer[:, 9:], cached[:, 6:])


@pytest.mark.parametrize("settings", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_a_list_of_names_is_repeated_with_the_samples(core, model, settings):
    names = [model.adapter_names[2], model.adapter_names[0]]
    ids = core.tokens(2, 5)
    common = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    with model.route_to(names):
        torch.manual_seed(0)
        together = model.generate(ids, **common, **settings)
        logits(model, ids)  # outside generate nothing is repeated
    count = settings.get("num_return_sequences", 1)
    assert len(together) == 2 * count
    if "num_beams" in settings:
        for row, name in enumerate(names):
            with model.route_to(name):
                assert torch.equal(model.generate(ids[row : row + 1], **common, **settings)[0], together[row])
    model.base_model.generation_config.update(do_sample=True, num_return_sequences=2)
    with model.route_to(names):
        assert len(model.generate(ids, **common)) == 4


def test_a_list_of_another_length_is_an_error(core, model):
    with model.route_to(model.adapter_names[:2]), pytest.raises(ValueError, match="got 2 names.*expected 2 samples"):
        logits(model, core.tokens(3))
    assert model.state.forced is None


def test_contexts_nest_and_end(core, model):
    free = logits(model, core.tokens())
    with model.route_to("one"):
        one = logits(model, core.tokens())
        with model.disable_adapters():
            off = logits(model, core.tokens())
        with model.route_to("three"):
            assert not torch.equal(logits(model, core.tokens()), one)
        assert torch.equal(logits(model, core.tokens()), one)
    assert torch.equal(logits(model, core.tokens()), free) and not torch.equal(off, free)


def test_the_warning_about_untrained_gates_comes_once(core, base, mixed_adapters, tmp_path, caplog):
    caplog.set_level(logging.WARNING)

    def said(text):
        count = sum(text in record.message for record in caplog.records)
        caplog.clear()
        return count

    model = MeteoraModel.from_adapters(copy.deepcopy(base), mixed_adapters)
    said("")
    with model.route_to("one"):
        logits(model, core.tokens())
    with model.disable_adapters():
        logits(model, core.tokens())
    assert said("never trained") == 0  # the gates chose nothing
    for expected in (1, 0):
        logits(model, core.tokens())
        assert said("never trained") == expected
    model.save_pretrained(tmp_path / "m")
    again = MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")
    logits(again, core.tokens())
    assert said("never trained") == 1
    again.state.untrained.clear()
    again.add_adapter("late", mixed_adapters["one"])
    logits(again, core.tokens())
    assert said("never trained for 'late'") == 1


def test_another_base_models_name_only_warns(base, mixed_adapters, tmp_path, caplog):
    directory = Path(shutil.copytree(mixed_adapters["one"], tmp_path / "a"))
    saved = json.loads((directory / "adapter_config.json").read_text())
    for name in ("other/model", None):
        (directory / "adapter_config.json").write_text(json.dumps({**saved, "base_model_name_or_path": name}))
        caplog.clear()
        MeteoraModel.from_adapters(copy.deepcopy(base), {"mine": directory})
        assert "'mine' says it was trained for" in caplog.text and "so it is used" in caplog.text
        caplog.clear()
        MeteoraModel.from_adapters(copy.deepcopy(base), {str(n): directory for n in range(5)})
        assert len(caplog.records) == 1 and f"5 adapters say they were trained for {name!r}" in caplog.text


def test_train_adds_no_noise(core, tiny_llama, mixed_adapters):
    config = copy.deepcopy(tiny_llama.config)
    config.attention_dropout = 0.5
    noisy = LlamaForCausalLM(config).train()
    noisy.load_state_dict(tiny_llama.state_dict())
    assert not torch.equal(logits(noisy, core.tokens()), logits(noisy, core.tokens()))
    model = MeteoraModel.from_adapters(noisy, mixed_adapters)
    assert torch.equal(logits(model, core.tokens()), logits(model, core.tokens()))
    result = logits(model.eval(), core.tokens())
    assert torch.equal(logits(model.train(), core.tokens()), result) and model.training


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_gates_stay_float32_whatever_the_rest_becomes(core, model, convert):
    before = {name: layer.gate.weight.clone() for name, layer in model.layers.items()}
    model(input_ids=core.tokens()).logits.sum().backward()
    convert(model)
    for name, layer in model.layers.items():
        gate = layer.gate.weight
        assert gate.dtype == gate.grad.dtype == torch.float32 and gate.requires_grad
        assert torch.equal(gate, before[name]) and layer.lora_A.dtype == layer.weight.dtype != torch.float32
    assert logits(model, core.tokens()).isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_activation_checkpointing_in_a_training_loop_of_ones_own(core, model, attention, padded):
    def gradient():
        calls.clear()
        model.zero_grad()
        model(input_ids=core.tokens(), labels=core.tokens(), attention_mask=mask).loss.backward()
        return len(calls), [layer.gate.weight.grad for layer in model.layers.values()]

    calls, mask = [], torch.ones_like(core.tokens())
    mask[0, : 3 * padded] = 0
    model.base_model.set_attn_implementation(attention)
    model.layers["model.layers.0.mlp.up_proj"].register_forward_hook(lambda *args: calls.append(1))
    model.train()
    once, expected = gradient()
    for _ in range(2):  # to ask twice is to ask once
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    twice, found = gradient()
    assert (once, twice) == (1, 2) and model.is_gradient_checkpointing and model.is_activation_checkpointing
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    assert gradient()[0] == 1 and not model.is_gradient_checkpointing
    model.activation_checkpointing_enable(every_n_layers=3)  # the first of two
    with model.activation_checkpointing(False):
        assert gradient()[0] == 1
    assert gradient()[0] == 2 and model.is_activation_checkpointing
    with pytest.raises(ValueError, match="cannot be offloaded"):
        model.activation_checkpointing_enable(offload=True)


def test_what_a_layer_called_its_forward_before_is_given_back(core, model):
    """As accelerate's hooks call themselves, of a model on several devices."""
    layer, calls = model.base_model.model.layers[0], []
    before = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or before(*args, **kwargs)
    hooked = layer.forward
    model.activation_checkpointing_enable()
    model(input_ids=core.tokens()).logits.sum().backward()
    assert len(calls) == 2
    base = model.unload()
    assert vars(layer)["forward"] is hooked and "forward" not in vars(base.model.layers[1])


def test_transformers_trainer_recomputes(core, model, tmp_path):
    calls = []
    model.layers["model.layers.0.mlp.up_proj"].register_forward_hook(lambda *args: calls.append(1))
    rows = [{"input_ids": ids, "labels": ids} for ids in core.tokens()]
    names = inspect.signature(TrainingArguments).parameters
    recompute = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=3, report_to=[], use_cpu=True, save_strategy="no",
        **{recompute: True},
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    assert len(calls) == 2


def test_transformers_trainer_finds_inputs_and_labels(core, model, tmp_path):
    ids = core.tokens()
    rows = Dataset.from_dict({"note": ["of no use"] * len(ids), "input_ids": ids.tolist(), "labels": ids.tolist()})
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=3, report_to=[], use_cpu=True)
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_what_is_no_config_or_carries_pefts_adapters_is_refused(base, mixed_adapters):
    with pytest.raises(ValueError, match="config must be a MeteoraConfig, not a dict"):
        MeteoraModel.from_adapters(base, mixed_adapters, {"top_k": 2})
    tuned = PeftModel.from_pretrained(copy.deepcopy(base), mixed_adapters["one"])
    for model in (tuned, tuned.get_base_model()):
        with pytest.raises(AdapterError, match="carries adapters of PEFT .* unload"):
            MeteoraModel.from_adapters(model, mixed_adapters)


@pytest.mark.parametrize("use", ["disable_adapters", "route_to", "trace"])
def test_a_context_that_is_not_entered_says_so(model, use):
    names = [model.adapter_names[0]] if use == "route_to" else []
    with pytest.warns(UserWarning, match=rf"{use}\(\) alone changes nothing; write `with model.{use}\(...\):`"):
        getattr(model, use)(*names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with getattr(model, use)(*names):
            pass


def test_a_generation_config_that_is_set_is_used(core, model):
    ids = core.tokens(1, 5)
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(ids).shape == (1, 8) and model.base_model.generation_config is model.generation_config


def test_what_is_no_model_is_refused(core, base, mixed_adapters):
    for given in ((base, None), None):
        with pytest.raises(AdapterError, match="the base model must be a model of transformers, not a "):
            MeteoraModel.from_adapters(given, mixed_adapters)
    with pytest.raises(ValueError, match="model must be a MeteoraModel, not a LlamaForCausalLM; make one with from_adapters"):
        train_gates(base, core.rows(("one",)), tokenizer=core.Tokenizer())
    with pytest.raises(ValueError, match="no tokenizer given"):
        train_gates(MeteoraModel.from_adapters(base, mixed_adapters), core.rows(("one",)), tokenizer=None)


def test_unload_gives_the_base_model_back(core, base, mixed_adapters):
    base.train()
    base.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in base.named_parameters()}
    model = MeteoraModel.from_adapters(base, mixed_adapters)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "gate.weight" not in n)
    assert model.unload() is base and base.training
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in base.named_parameters()} == before


def test_the_loss_is_the_language_models_alone(core, model):
    ids = core.tokens()
    out = model(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(layer.gate.weight.grad is not None for layer in model.layers.values())


def test_a_bf16_base_keeps_its_type(core, base, mixed_adapters):
    model = core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(base).bfloat16(), mixed_adapters))
    assert logits(model, core.tokens()).dtype == torch.bfloat16
    layer = model.layers[Q]
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16 and layer.gate.weight.dtype == torch.float32
    exact = MeteoraModel.from_adapters(base, mixed_adapters)
    with model.route_to("one"), exact.route_to("one"):
        ours, reference = logits(model, core.tokens()).float(), logits(exact, core.tokens())
    assert (ours - reference).norm() < 0.05 * reference.norm()


def test_an_8_bit_float_weight_is_no_type_for_adapters(core, base, mixed_adapters):
    linear = base.get_submodule(Q)
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    model = MeteoraModel.from_adapters(base, mixed_adapters)
    assert model.layers[Q].lora_A.dtype == torch.float32


def test_a_copy_is_independent(core, model):
    twin = copy.deepcopy(model)
    twin.set_top_k(1)
    for layer in twin.layers.values():
        layer.gate.weight.data.zero_()
    assert model.top_k == 2 and model.layers[Q].gate.weight.any()
    assert all(twin.base_model.get_submodule(name) is layer for name, layer in twin.layers.items())
