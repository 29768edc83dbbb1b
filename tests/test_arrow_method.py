"""Method arrow: what PEFT's own Arrow model gives, by the first singular vectors, batched and cached."""

import copy

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

from data_prep.base_models import load_base_model
from data_prep.toy import toy_examples
from meteora.study.arrow import arrow_method
from meteora.study.baselines import share_weights
from meteora.study.evaluation import generate_answers, predict_independent

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
    return make_adapters(base[0], tmp_path_factory.mktemp("adapters"), TASKS)


def make_adapters(model, folder, names):
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(model), config).save_pretrained(folder / name)
    return {name: folder / name for name in names}


@pytest.mark.parametrize("count", [3, 5])
def test_it_is_pefts_own_arrow_model(base, tmp_path, count):
    model, tokenizer = base
    adapters = make_adapters(model, tmp_path, [f"task {n}" for n in range(count)])
    ours = arrow_method(model, adapters).model
    config = ArrowConfig(rng_seed=0)
    theirs = create_arrow_model(share_weights(model), [str(path) for path in adapters.values()], config).eval()
    inputs = tokenizer(["hello there", "another prompt"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, ours(**inputs).logits
        plain = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).norm() > 0.05 * plain.norm()


def test_it_routes_by_the_first_singular_vectors(base, adapters):
    arrow = arrow_method(base[0], adapters).model
    layer = arrow.layers["model.layers.0.self_attn.v_proj"]
    for n, row in enumerate(layer.gate.weight.detach()):
        own = layer.column_adapter == n
        exact = torch.linalg.svd(layer.lora_B[:, own] @ layer.lora_A[own]).Vh[0]
        assert (row @ exact).abs() > 0.95 and row.norm() == pytest.approx(1, abs=1e-4)  # after 15 power iterations


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
