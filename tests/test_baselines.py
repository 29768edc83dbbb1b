"""Every method is what its name says: checked against the plain base model, stock PEFT, and merging by hand."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights

from data_prep.base_models import load_base_model
from meteora import MeteoraModel
from meteora.study.baselines import MERGINGS, Merging, build_methods, merge_adapters, share_weights, with_temperature
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
def models(base, adapters, tmp_path):
    twin = share_weights(base)
    merged = merge_adapters(base, adapters, "linear", tmp_path)
    model = MeteoraModel.from_adapters(share_weights(base), adapters)
    torch.manual_seed(9)
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.gate.weight)
    return model, MeteoraModel.from_adapters(twin, {"lora_b": adapters["second"], "linear": merged})


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
    with methods["meteora_top2"].active():
        cold_logits = logits(hot.model, batch)
    with hot.active():
        assert hot.model.state.temperature == 15.0
        assert not torch.allclose(logits(hot.model, batch), cold_logits)
    assert with_temperature(methods["lora_b"], 15.0) is methods["lora_b"]


def test_unknown_methods_are_named(models):
    with pytest.raises(ValueError, match="'lora_z'.*lora_b, linear"):
        build_methods(["base", "lora_z"], *models)
    with pytest.raises(ValueError, match="'lora_b'"):
        build_methods(["lora_b"], models[0])


def test_shared_weights_are_the_same_tensors_in_other_modules(base):
    twin = share_weights(base)
    assert all(a is b for a, b in zip(base.parameters(), twin.parameters(), strict=True))
    assert not {id(m) for m in base.modules()} & {id(m) for m in twin.modules()}


def factors(directory):
    weights = load_peft_weights(str(directory), device="cpu")
    return {name.split("lora_")[0] + "A": (weights[name], weights[name.replace("lora_A", "lora_B")])
            for name in weights if "lora_A" in name}  # fmt: skip


def test_linear_is_the_average_of_the_scaled_factors(base, adapters, tmp_path):
    merged = factors(merge_adapters(base, adapters, "linear", tmp_path))
    single = [factors(adapters[task]) for task in TASKS]
    assert merged
    for name, (a, b) in merged.items():
        root = (2.0 / 3) ** 0.5  # PEFT: square root of weight * scaling on both factors; scaling = alpha / r = 2
        torch.testing.assert_close(a, sum(own[name][0] for own in single) * root)
        torch.testing.assert_close(b, sum(own[name][1] for own in single) * root)


def test_ties_keeps_the_largest_fifth_of_each_factor(base, adapters, tmp_path):
    merged = factors(merge_adapters(base, adapters, "ties", tmp_path))
    for a, b in merged.values():
        for factor in (a, b):
            assert 0 < (factor != 0).float().mean() <= 3 * MERGINGS["ties"].density + 0.01


def test_merged_directories_are_stock_peft_kept_and_renewed(base, adapters, models, batch, tmp_path):
    before = copy.deepcopy(base.state_dict())
    target = merge_adapters(base, adapters, "linear", tmp_path / "out")
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    methods = build_methods(["linear"], *models)
    with methods["linear"].active("first"):
        torch.testing.assert_close(logits(methods["linear"].model, batch), stock_peft(base, target, batch))

    made = (target / "adapter_model.safetensors").stat().st_mtime_ns
    merge_adapters(base, adapters, "linear", tmp_path / "out")
    assert (target / "adapter_model.safetensors").stat().st_mtime_ns == made
    two = {task: adapters[task] for task in TASKS[:2]}
    merge_adapters(base, two, "linear", tmp_path / "out")
    assert list(json.loads((target / "merge.json").read_text())["adapters"]) == TASKS[:2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["linear"]


def test_other_mergings_need_no_code(base, adapters, tmp_path):
    target = merge_adapters(base, adapters, "pruned", tmp_path, merging=Merging("magnitude_prune", density=0.5))
    assert target.name == "pruned" and factors(target)
    with pytest.raises(ValueError, match="'pruned'.*linear, ties"):
        merge_adapters(base, adapters, "pruned", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        merge_adapters(base, {"x": tmp_path / "nowhere"}, "linear", tmp_path)


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
