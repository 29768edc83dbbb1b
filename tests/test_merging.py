"""Merged adapters: PEFT's own merging, checked by hand; written as stock PEFT, kept, and drawn from a seed alone."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights

from data_prep.base_models import load_base_model
from meteora import MeteoraModel
from meteora.study.baselines import build_methods, share_weights
from meteora.study.merging import MERGINGS, Merging, merge_adapters

TASKS = ["first", "second", "third"]


@pytest.fixture(scope="module")
def base():
    return load_base_model("tiny")[0].eval()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Three PEFT directories with random factors."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / task)
    return {task: folder / task for task in TASKS}


def merge(base, adapters, name, folder, seed=0):
    return merge_adapters(base, adapters, {name: MERGINGS[name]}, folder, seed=seed)[name]


def factors(directory):
    weights = load_peft_weights(str(directory), device="cpu")
    return {name.split("lora_")[0] + "A": (weights[name], weights[name.replace("lora_A", "lora_B")])
            for name in weights if "lora_A" in name}  # fmt: skip


def test_linear_is_the_average_of_the_scaled_factors(base, adapters, tmp_path):
    merged = factors(merge(base, adapters, "linear", tmp_path))
    single = [factors(adapters[task]) for task in TASKS]
    assert merged
    for name, (a, b) in merged.items():
        root = (2.0 / 3) ** 0.5  # PEFT: square root of weight * scaling on both factors; scaling = alpha / r = 2
        torch.testing.assert_close(a, sum(own[name][0] for own in single) * root)
        torch.testing.assert_close(b, sum(own[name][1] for own in single) * root)


def test_ties_keeps_the_largest_fifth_of_each_factor(base, adapters, tmp_path):
    merged = factors(merge(base, adapters, "ties", tmp_path))
    for a, b in merged.values():
        for factor in (a, b):
            assert 0 < (factor != 0).float().mean() <= 3 * MERGINGS["ties"].density + 0.01


def test_merged_directories_are_stock_peft_kept_and_renewed(base, adapters, tmp_path):
    before = copy.deepcopy(base.state_dict())
    target = merge(base, adapters, "linear", tmp_path / "out")
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])}
    model = MeteoraModel.from_adapters(share_weights(base), {"linear": target})
    stock = PeftModel.from_pretrained(copy.deepcopy(base), target).eval()
    with torch.no_grad(), build_methods(["linear"], model, model)["linear"].active("first"):
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)

    made = (target / "adapter_model.safetensors").stat().st_mtime_ns
    merge(base, adapters, "linear", tmp_path / "out")
    assert (target / "adapter_model.safetensors").stat().st_mtime_ns == made
    (target / "adapter_model.safetensors").unlink()
    merge(base, adapters, "linear", tmp_path / "out")
    assert (target / "adapter_model.safetensors").is_file(), "what lacks its weights is made anew"
    two = {task: adapters[task] for task in TASKS[:2]}
    merge(base, two, "linear", tmp_path / "out")
    assert list(json.loads((target / "merge.json").read_text())["adapters"]) == TASKS[:2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["linear"]


def test_other_mergings_need_no_code(base, adapters, tmp_path):
    mergings = {"pruned": Merging("magnitude_prune", density=0.5)}
    target = merge_adapters(base, adapters, mergings, tmp_path)["pruned"]
    assert target.name == "pruned" and factors(target)
    with pytest.raises(ValueError, match="no adapters to merge into 'pruned'"):
        merge_adapters(base, {}, mergings, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        merge(base, {"x": tmp_path / "nowhere"}, "linear", tmp_path)


def test_together_they_are_what_they_are_alone(base, adapters, tmp_path):
    together = merge_adapters(base, adapters, MERGINGS, tmp_path / "together", seed=7)
    assert list(together) == list(MERGINGS)
    for name in reversed(MERGINGS):
        alone = merge(base, adapters, name, tmp_path / "alone", seed=7)
        assert json.loads((alone / "merge.json").read_text()) == json.loads((together[name] / "merge.json").read_text())
        one, other = factors(together[name]), factors(alone)
        assert one.keys() == other.keys()
        assert all(torch.equal(x, y) for module in one for x, y in zip(one[module], other[module]))


def test_dare_drops_half_of_each_factor_at_random_and_rescales(base, adapters, tmp_path):
    merged = factors(merge(base, adapters, "dare", tmp_path))
    single = [factors(adapters[task]) for task in TASKS]
    for name, (a, _) in merged.items():
        # what no adapter kept, or only with the losing sign, is zero; what one alone kept is its own, times root(2) / 0.5
        assert 0.05 < (a == 0).float().mean() < 0.3
        own = torch.stack([factor[name][0] for factor in single]) * 2.0**0.5 / MERGINGS["dare"].density
        alone = torch.isclose(own, a).any(0) & (a != 0)
        assert alone.float().mean() > 0.3


def test_what_is_drawn_depends_on_the_seed_alone(base, adapters, tmp_path):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    one = factors(merge(base, adapters, "dare", tmp_path / "one", seed=5))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left as it was"
    torch.manual_seed(456)
    two, other = (factors(merge(base, adapters, "dare", tmp_path / f"{n}", seed=n)) for n in (5, 6))
    assert all(torch.equal(one[name][0], two[name][0]) for name in one)
    assert not any(torch.equal(one[name][0], other[name][0]) for name in one)
    made = (tmp_path / "one" / "dare" / "adapter_model.safetensors").stat().st_mtime_ns
    merge(base, adapters, "dare", tmp_path / "one", seed=5)
    assert (tmp_path / "one" / "dare" / "adapter_model.safetensors").stat().st_mtime_ns == made
    merge(base, adapters, "dare", tmp_path / "one", seed=6)
    assert (tmp_path / "one" / "dare" / "adapter_model.safetensors").stat().st_mtime_ns != made
