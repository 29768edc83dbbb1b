"""Method lorahub: sums of factors as written out, a search that finds a known optimum, stock PEFT directories."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights

from data_prep.base_models import load_base_model
from data_prep.toy import toy_examples
from meteora.adapters import adapter_directory
from meteora.study import lorahub
from meteora.study.lorahub import BOUND, NOTE, WeightedSum, compose_adapters, lorahub_method, search_weights

TASKS = ["toy_echo", "toy_first_letter", "toy_parity"]


@pytest.fixture(scope="module")
def base():
    model, tokenizer = load_base_model("tiny")
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base[0]), config).save_pretrained(folder / task)
    return {task: folder / task for task in TASKS}


@pytest.fixture(scope="module")
def examples():
    return {task: toy_examples(task)[:3] for task in TASKS[:2]}


def compose(base, adapters, examples, folder, **changes):
    options = {"evaluations": 8, "progress": False} | changes
    return compose_adapters(base[0], adapters, examples, tokenizer=base[1], output_dir=folder, **options)


def test_the_search_finds_an_optimum_within_the_bounds_from_its_seed_alone():
    wanted = np.array([0.8, -0.4, 0.0, 1.2])

    def loss(weights):
        assert max(map(abs, weights)) <= BOUND
        return float(np.square(weights - wanted).sum())

    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    found, value = search_weights(loss, 4, evaluations=400, seed=0)
    assert np.abs(np.array(found) - wanted).max() < 0.1 and value < 0.1
    assert (np.random.get_state()[1] == state).all(), "NumPy's own generator is left as it was"
    np.random.seed(2)
    assert search_weights(loss, 4, evaluations=400, seed=0) == (found, value)
    calls = []
    search_weights(lambda weights: calls.append(weights) or 0.0, 4, evaluations=16, seed=1)
    assert len(calls) == 16


def test_factors_are_added_up_each_for_itself(base, adapters):
    total = WeightedSum(base[0], adapters)
    weights = [0.5, -1.0, 2.0]
    total.set(weights)
    files = [load_peft_weights(str(path), device="cpu") for path in adapters.values()]
    for module, layer in total.model.layers.items():
        torch.testing.assert_close((layer.lora_A.data, layer.lora_B.data), total.factors(weights, module))
        for half, factor, scale in (("lora_A", layer.lora_A, 1.0), ("lora_B", layer.lora_B, 3.0)):
            key = f"base_model.model.{module}.{half}.weight"
            expected = sum(w * file[key] for w, file in zip(weights, files, strict=True)) * scale
            torch.testing.assert_close(factor.data, expected)


def test_composed_directories_are_stock_peft(base, adapters, examples, tmp_path):
    model, _ = base
    composed = compose(base, adapters, examples, tmp_path)
    assert list(composed) == TASKS[:2]
    method = lorahub_method(model, composed)
    assert method.told_task
    ids = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
    stock = {}
    for task, path in composed.items():
        note = json.loads((path / NOTE).read_text())
        assert list(note["weights"]) == TASKS and any(note["weights"].values())
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), path).eval()
        with torch.no_grad(), method.active(task):
            stock[task] = theirs(input_ids=ids).logits
            torch.testing.assert_close(method.model(input_ids=ids).logits, stock[task], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), method.active(TASKS[:2]):
        mixed = method.model(input_ids=ids).logits
    expected = torch.stack([stock[TASKS[0]][0], stock[TASKS[1]][1]])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)


def notes(composed):
    return {task: json.loads((path / NOTE).read_text()) for task, path in composed.items()}


def test_an_evaluation_that_could_be_recorded_finds_the_same(core, base, adapters, examples, tmp_path, monkeypatch):
    expected = compose(base, adapters, examples, tmp_path / "plain")
    made = core.repeat_recordings(monkeypatch, lorahub)
    assert notes(compose(base, adapters, examples, tmp_path / "recorded")) == notes(expected)
    assert [recordings.keys for recordings in made] == [["loss"] * 8] * 2, "one recording a task"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_recorded_evaluations_find_the_same_on_a_gpu(base, adapters, examples, tmp_path, monkeypatch, caplog):
    on_gpu = copy.deepcopy(base[0]).float().cuda(), base[1]
    recorded = notes(compose(on_gpu, adapters, examples, tmp_path / "recorded"))
    assert not [line for line in caplog.records if line.name == "meteora.recording"]
    monkeypatch.setattr(lorahub, "can_be_recorded", lambda model, device: False)
    plain = notes(compose(on_gpu, adapters, examples, tmp_path / "plain"))
    for task, note in plain.items():
        assert recorded[task]["loss"] == pytest.approx(note["loss"], rel=1e-3)
        assert recorded[task]["weights"] == pytest.approx(note["weights"], abs=1e-2)


def test_only_what_changed_is_composed_again(base, adapters, examples, tmp_path, monkeypatch):
    first = compose(base, adapters, examples, tmp_path)
    searched = []
    search = lorahub.search_weights
    monkeypatch.setattr(lorahub, "search_weights", lambda *a, **k: searched.append(k) or search(*a, **k))
    identity = lorahub_method(base[0], first).identity()
    assert lorahub_method(base[0], compose(base, adapters, examples, tmp_path)).identity() == identity
    assert not searched
    changed = {**examples, TASKS[1]: examples[TASKS[1]][:2]}
    compose(base, adapters, changed, tmp_path)
    assert len(searched) == 1
    (adapter_directory(tmp_path, TASKS[0]) / "adapter_model.safetensors").unlink()
    compose(base, adapters, changed, tmp_path)
    assert len(searched) == 2, "what lacks its weights"
    compose(base, adapters, changed, tmp_path, seed=1)
    assert len(searched) == 4


def test_adapters_that_cannot_be_added_up_are_named(base, adapters, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    get_peft_model(copy.deepcopy(base[0]), config).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="'small' differs from 'toy_echo'"):
        WeightedSum(base[0], {"toy_echo": adapters["toy_echo"], "small": tmp_path / "small"})
