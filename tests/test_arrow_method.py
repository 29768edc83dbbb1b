"""Method arrow: PEFT's own Arrow, checked against routing by singular vectors written out, batched and cached."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from data_prep.base_models import load_base_model
from data_prep.toy import toy_examples
from meteora import MeteoraModel
from meteora.study.arrow import arrow_method
from meteora.study.baselines import share_weights
from meteora.study.evaluation import generate_answers, predict_independent
from meteora.study.xlora import GivenRouting

TASKS = ["toy_echo", "toy_first_letter", "toy_parity"]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(1)
    model, tokenizer = load_base_model("tiny")
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.4)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base[0]), config).save_pretrained(folder / task)
    return {task: folder / task for task in TASKS}


def test_it_routes_by_the_first_singular_vectors(base, adapters):
    model, _ = base
    arrow = arrow_method(model, adapters).model
    ours = MeteoraModel.from_adapters(share_weights(model), adapters)
    layer = ours.layers["model.layers.0.self_attn.v_proj"]
    torch.manual_seed(0)
    x = torch.randn(1, 9, layer.in_features)
    prototypes = []
    for n in range(3):
        own = layer.column_adapter == n
        prototypes.append(torch.linalg.svd(layer.lora_B[:, own] @ layer.lora_A[own]).Vh[0])
    # all three adapters are within Arrow's top-k
    ours.state.forced = GivenRouting(torch.softmax((x[0] @ torch.stack(prototypes).T).abs(), -1))
    with torch.no_grad():
        expected = layer(x)
        found = arrow.base_model.model.model.layers[0].self_attn.v_proj(x)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-3)  # PEFT stops after 15 power iterations
    assert not torch.allclose(found, layer.base_layer(x), rtol=1e-2)


def test_answers_are_those_of_one_prompt_at_a_time_and_are_kept(base, adapters, tmp_path):
    model, tokenizer = base
    method = arrow_method(model, adapters)
    examples = {task: toy_examples(task)[:3] for task in TASKS[:2]}
    options = {"tokenizer": tokenizer, "predictions_dir": tmp_path, "max_new_tokens": 6, "progress": False}
    answers = predict_independent({"arrow": method}, examples, batch_size=8, **options)["arrow"]
    for task, rows in examples.items():
        alone = [
            generate_answers(method.model, tokenizer, [row["prompt"]], batch_size=1, max_new_tokens=6)[0] for row in rows
        ]
        assert answers[task] == alone
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    again = arrow_method(model, adapters)
    assert again.identity() == method.identity()
    predict_independent({"arrow": again}, examples, batch_size=8, **options)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}


def test_another_seed_or_adapter_is_another_method(base, adapters):
    model, _ = base
    two = {task: adapters[task] for task in TASKS[:2]}
    methods = [arrow_method(model, adapters), arrow_method(model, adapters, seed=1), arrow_method(model, two)]
    assert len({str(method.identity()) for method in methods}) == 3


def test_it_leaves_the_base_model_alone(base, adapters):
    model, _ = base
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arrow_method(model, adapters)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(model.model.layers[0].self_attn.v_proj, torch.nn.Linear)
