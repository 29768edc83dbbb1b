"""Routing shares against the trace of one prompt at a time, and against gates whose choice is known."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from data_prep.base_models import load_base_model
from meteora import MeteoraModel
from meteora.study.routing import routing_rows, split_module, token_routing

NAMES = ["first", "second", "third"]
PROMPTS = {"second": ["abc", "a longer prompt of this task", "x"], "first": ["some text"]}


@pytest.fixture
def tiny(tmp_path):
    base, tokenizer = load_base_model("tiny")
    torch.manual_seed(0)
    for name in NAMES:
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / name)
    model = MeteoraModel.from_adapters(base, {name: tmp_path / name for name in NAMES})
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.gate.weight)
    return model.eval(), tokenizer


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_shares_are_the_mean_weights_over_real_tokens(tiny, top_k, batch_size):
    model, tokenizer = tiny
    model.set_top_k(top_k)
    rows = routing_rows(model, tokenizer, PROMPTS, batch_size=batch_size, progress=False)
    assert len(rows) == 2 * 2 * len(PROMPTS) * len(NAMES)  # layers x modules x tasks x adapters
    assert {tuple(row) for row in rows} == {("layer", "module", "task", "adapter", "share")}
    expected = {}
    for task, prompts in PROMPTS.items():
        tokens = 0
        for prompt in prompts:
            with torch.no_grad(), model.trace() as trace:
                model(**tokenizer(prompt, return_tensors="pt"))
            for module, indices in trace.indices.items():
                for choice, weight in zip(indices.flatten().tolist(), trace.weights[module].flatten().tolist()):
                    key = (*split_module(module), task, NAMES[choice])
                    expected[key] = expected.get(key, 0.0) + weight
            tokens += indices.shape[1]
        expected |= {key: value / tokens for key, value in expected.items() if key[2] == task}
    for row in rows:
        key = (row["layer"], row["module"], row["task"], row["adapter"])
        assert row["share"] == pytest.approx(expected.get(key, 0.0), abs=1e-5)


def test_gates_with_one_choice(tiny):
    model, tokenizer = tiny
    with torch.no_grad():
        for layer in model.layers.values():
            layer.gate.weight.zero_()
    model.set_top_k(1)
    rows = routing_rows(model, tokenizer, {"first": ["a b c"]}, progress=False)
    # equal logits: one adapter gets every token, and the shares still sum to 1
    assert sorted({row["share"] for row in rows}) == [0.0, 1.0]


def test_a_texts_routing_is_the_mean_over_modules(tiny):
    model, tokenizer = tiny
    tokens = tokenizer("some text of a few tokens")["input_ids"]
    found = token_routing(model, tokens)
    with torch.no_grad(), model.trace() as trace:
        model(input_ids=torch.tensor([tokens]))
    for position in (0, 5, len(tokens) - 1):
        mass = [0.0] * len(NAMES)
        for module in trace.indices:
            for n, w in zip(trace.indices[module][0, position].tolist(), trace.weights[module][0, position].tolist()):
                mass[n] += w / len(trace.indices)
        assert found.mass[position].tolist() == pytest.approx(mass, abs=1e-5)
        assert found.dominant[position] == mass.index(max(mass))
        assert found.weight[position] == pytest.approx(max(mass), abs=1e-5)
    torch.testing.assert_close(found.mass.sum(1), torch.ones(len(tokens)))


def test_modules_are_named_by_layer_and_last_part():
    assert split_module("model.layers.12.self_attn.q_proj") == (12, "q_proj")
    assert split_module("transformer.h.0.mlp.c_fc") == (0, "c_fc")
    assert split_module("lm_head") == (0, "lm_head")
