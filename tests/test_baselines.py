"""Every method is what its name says: checked against the plain base model and stock PEFT."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from data_prep.base_models import load_base_model
from meteora import MeteoraModel
from meteora.study.baselines import Method, build_methods, share_weights, with_temperature
from meteora.study.predictions import model_fingerprints

TASKS = ["first", "second", "third"]


def write_adapter(base, directory, seed, rank=4):
    """A PEFT directory with random factors."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base():
    return load_base_model("tiny")[0].eval()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {task: write_adapter(base, folder / task, seed) for seed, task in enumerate(TASKS)}


@pytest.fixture
def models(base, adapters):
    model = MeteoraModel.from_adapters(share_weights(base), adapters)
    torch.manual_seed(9)
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.gate.weight)
    singles = {"lora_b": adapters["second"], "linear": adapters["third"]}
    return model, MeteoraModel.from_adapters(share_weights(base), singles)


@pytest.fixture(scope="module")
def batch():
    return {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def stock_peft(base, directory, batch):
    return logits(PeftModel.from_pretrained(copy.deepcopy(base), directory).eval(), batch)


def test_methods_equal_their_definitions(base, adapters, models, batch):
    model, single = models
    methods = build_methods(["base", "peft", "lora_b", "linear", "meteora_top1", "meteora_top2"], model, single)

    def run(name, tasks=()):
        with methods[name].active(tasks):
            return logits(methods[name].model, batch)

    assert torch.equal(run("base"), logits(base, batch))
    own = {task: stock_peft(base, adapters[task], batch) for task in TASKS}
    torch.testing.assert_close(run("peft", "third"), own["third"])
    torch.testing.assert_close(run("peft", ("third", "first")), torch.stack([own["third"][0], own["first"][1]]))
    torch.testing.assert_close(run("lora_b", "first"), own["second"])
    assert not torch.allclose(run("meteora_top1"), run("meteora_top2"))
    model.set_top_k(1)
    assert torch.equal(run("meteora_top1"), logits(model, batch))


def test_a_method_leaves_the_settings_as_they_were(models):
    model, single = models
    model.set_top_k(3)
    model.set_temperature(5.0)
    method = build_methods(["meteora_top1"], model, single, temperature=2.0)["meteora_top1"]
    with pytest.raises(KeyError), method.active():
        assert (model.top_k, model.state.temperature) == (1, 2.0)
        raise KeyError
    assert (model.top_k, model.state.temperature) == (3, 5.0)


def test_temperature_changes_gated_methods_only(models, batch):
    methods = build_methods(["meteora_top2", "lora_b"], *models)
    hot = with_temperature(methods["meteora_top2"], 15.0)
    assert with_temperature(build_methods(["meteora_top1"], *models)["meteora_top1"], 15.0).gated is False
    with methods["meteora_top2"].active():
        cold_logits = logits(hot.model, batch)
    with hot.active():
        assert hot.model.state.temperature == 15.0
        assert not torch.allclose(logits(hot.model, batch), cold_logits)
    assert with_temperature(methods["lora_b"], 15.0) is methods["lora_b"]


def test_any_number_of_adapters_and_methods_made_elsewhere(models, batch):
    model, single = models
    elsewhere = Method("mine", single, lambda tasks: nullcontext(), ("settings",), _weights=lambda: {"settings": "x"})
    methods = build_methods(["meteora_top3", "mine"], model, single, others={"mine": elsewhere})
    with methods["meteora_top3"].active():
        assert model.top_k == 3
        three = logits(model, batch)
    with build_methods(["meteora_top2"], model)["meteora_top2"].active():
        assert not torch.allclose(logits(model, batch), three)
    assert methods["mine"] is elsewhere and elsewhere.identity() == {"method": "mine", "weights": {"settings": "x"}}


def test_unknown_methods_are_named(models):
    for name in ("meteora_top0", "meteora_topx", "meteora_top"):
        with pytest.raises(ValueError, match=repr(name)):
            build_methods([name], *models)
    with pytest.raises(ValueError, match="'lora_z'.*lora_b, linear"):
        build_methods(["base", "lora_z"], *models)
    with pytest.raises(ValueError, match="'lora_b'"):
        build_methods(["lora_b"], models[0])


def test_shared_weights_are_the_same_tensors_in_other_modules(base):
    twin = share_weights(base)
    assert all(a is b for a, b in zip(base.parameters(), twin.parameters(), strict=True))
    assert not {id(m) for m in base.modules()} & {id(m) for m in twin.modules()}


def test_fingerprints_tell_base_adapters_and_gates_apart(models):
    model, single = models
    before = model_fingerprints(model)
    assert before == model_fingerprints(model)
    assert model_fingerprints(single)["base"] == before["base"]
    assert model_fingerprints(single)["adapters"] != before["adapters"]
    layer = next(iter(model.layers.values()))

    def changed(tensor):
        with torch.no_grad():
            tensor.view(-1)[0] += 1
            now = model_fingerprints(model)
            tensor.view(-1)[0] -= 1
        return {part for part in now if now[part] != before[part]}

    assert changed(layer.gate.weight) == {"gates"}
    assert changed(layer.lora_B) == {"adapters"}
    assert changed(layer.base_layer.weight) == {"base"}
    assert changed(model.get_input_embeddings().weight) == {"base"}
