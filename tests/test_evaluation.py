"""Independent evaluation: answers do not depend on batching or reuse, are kept and resumed, and are counted right."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import meteora.study.evaluation as evaluation
from data_prep.base_models import load_base_model
from data_prep.toy import toy_examples
from meteora import MeteoraModel
from meteora.study.baselines import build_methods
from meteora.study.decoding import TranscriptBatch
from meteora.study.evaluation import (
    answer_budget,
    evaluate_independent,
    generate_answers,
    paired_rows,
    predict_independent,
)
from meteora.study.measures import published_rows, strict_scores, task_rows
from meteora.study.scoring import corpus_bleu, corpus_bleu_published

TASKS = ("toy_echo", "toy_first_letter", "toy_parity")
NEW = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny MeteoRA model in float64, so that equality is exact, with lively weights, adapters and gates."""
    base, tokenizer = load_base_model("tiny")
    torch.manual_seed(1)
    for weights in base.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.4)
    base = base.double().eval()
    folder = tmp_path_factory.mktemp("adapters")
    for task in TASKS:
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / task)
    model = MeteoraModel.from_adapters(base, {task: folder / task for task in TASKS})
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.gate.weight)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def examples():
    return {task: toy_examples(task)[:5] for task in TASKS}


@pytest.fixture
def methods(tiny):
    return build_methods(["base", "peft", "meteora_top2"], tiny[0])


def predict(methods, examples, tiny, folder, **changes):
    settings = {"batch_size": 2, "max_new_tokens": NEW, "progress": False} | changes
    return predict_independent(methods, examples, tokenizer=tiny[1], predictions_dir=folder, **settings)


def count_rows(monkeypatch, stop_after=None):
    """Count decoded rows, and interrupt before the batch after `stop_after` batches."""
    rows, decode = [], TranscriptBatch.decode

    def counted(self, limits, **options):
        if len(rows) == stop_after:
            raise KeyboardInterrupt
        rows.append(len(limits))
        return decode(self, limits, **options)

    monkeypatch.setattr(TranscriptBatch, "decode", counted)
    return rows


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("apart", [True, False], ids=["prefix apart", "prefix in every row"])
def test_answers_equal_generate_whatever_the_batch(tiny, examples, top_k, batch_size, apart, monkeypatch):
    monkeypatch.setattr(evaluation, "_worth_a_pass", lambda model, tokens: apart)
    model, tokenizer = tiny
    prompts = [row["prompt"] for rows in examples.values() for row in rows[:2]] + ["[INST] x"]
    model.set_top_k(top_k)
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    assert expected == generate_answers(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=NEW)


def test_a_prefix_is_encoded_apart_on_a_gpu_only_if_it_saves_more_than_a_pass_costs(tiny, monkeypatch):
    model, _ = tiny
    assert [evaluation._worth_a_pass(model, tokens) for tokens in (0, 1)] == [False, True]
    monkeypatch.setattr(evaluation, "model_device", lambda model: torch.device("cuda"))
    assert [evaluation._worth_a_pass(model, tokens) for tokens in (0, 1, 10**9)] == [False, False, True]


def test_common_prefix_is_encoded_once(tiny, examples, monkeypatch):
    model, tokenizer = tiny
    prompts = [row["prompt"] for row in examples["toy_parity"]]
    fed = []
    forward = MeteoraModel.forward

    def counted(self, *args, **kwargs):
        fed.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MeteoraModel, "forward", counted)
    generate_answers(model, tokenizer, prompts, batch_size=5, max_new_tokens=1)
    shared = len(tokenizer("[INST] Odd or even: ")["input_ids"])
    assert fed[0] >= shared - 1
    assert sum(fed) <= shared + sum(len(tokenizer(p)["input_ids"]) - shared + 2 for p in prompts)


def test_every_method_answers_as_itself(tiny, examples, methods, tmp_path):
    model, tokenizer = tiny
    answers = predict(methods, examples, tiny, tmp_path)

    def run(rows):
        return generate_answers(model, tokenizer, [r["prompt"] for r in rows], batch_size=5, max_new_tokens=NEW)

    for task, rows in examples.items():
        with model.disable_adapters():
            assert answers["base"][task] == run(rows)
        with model.route_to(task):
            assert answers["peft"][task] == run(rows)
    assert len({str(answers[name]) for name in methods}) == len(methods)


@pytest.mark.parametrize("tokens_per_batch", [None, 40])
def test_tasks_are_answered_together_where_batches_have_room(tiny, examples, tmp_path, monkeypatch, tokens_per_batch):
    model, tokenizer = tiny
    methods = build_methods(["base", "peft", "meteora_top2"], model)
    limits = {"toy_echo": 6, "toy_first_letter": 9, "toy_parity": 5}  # the first and the last are about equally long
    expected = predict(methods, examples, tiny, tmp_path / "alone", max_new_tokens=limits)
    rows, prompts = count_rows(monkeypatch), {}
    extend = TranscriptBatch.extend

    def seen(self, segments):
        prompts.setdefault(len(rows), [len(segment) for segment in segments])
        return extend(self, segments)

    monkeypatch.setattr(TranscriptBatch, "extend", seen)
    options = {"batch_size": 16, "max_new_tokens": limits, "tokens_per_batch": tokens_per_batch}
    assert predict(methods, examples, tiny, tmp_path / "together", **options) == expected
    if tokens_per_batch is None:
        assert rows == [10, 5, 5, 5, 5, 10, 5]  # base; peft, which is told the task, by task; MeteoRA
    else:
        assert all(max(lengths) * len(lengths) <= 40 for lengths in prompts.values()) and len(rows) > 7
    del rows[:]
    del_file = tmp_path / "together" / "independent" / "base" / "toy_parity.jsonl"
    del_file.unlink()
    assert predict(methods, examples, tiny, tmp_path / "together", **options) == expected
    assert sum(rows) == 5, "only what is missing is answered"


def test_stored_answers_are_reused_and_survive_other_batch_sizes(tiny, examples, methods, tmp_path, monkeypatch):
    first = predict(methods, examples, tiny, tmp_path)
    rows = count_rows(monkeypatch)
    assert predict(methods, examples, tiny, tmp_path, batch_size=3) == first
    assert rows == []


def test_an_interrupted_evaluation_resumes(tiny, examples, methods, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count_rows(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            predict(methods, examples, tiny, tmp_path / "interrupted")
    rows = count_rows(monkeypatch)
    resumed = predict(methods, examples, tiny, tmp_path / "interrupted")
    # four batches stood: three of the first task (2 + 2 + 1) and one of the second
    assert sum(rows) == 3 * 3 * 5 - (2 + 2 + 1) - 2
    assert resumed == predict(methods, examples, tiny, tmp_path / "whole")


def test_only_what_depends_on_a_change_is_predicted_again(tiny, examples, tmp_path, monkeypatch):
    model, _ = tiny
    names = ["base", "peft", "meteora_top2"]
    predict(build_methods(names, model), examples, tiny, tmp_path)

    def predicted_again(task_examples=examples, **changes):
        with monkeypatch.context() as patch:
            rows = count_rows(patch)
            predict(build_methods(names, model), task_examples, tiny, tmp_path, **changes)
            return sum(rows)

    layer = next(iter(model.layers.values()))
    with torch.no_grad():
        layer.gate.weight.add_(0.5)
    assert predicted_again() == 15  # meteora_top2 alone
    with torch.no_grad():
        layer.lora_B.mul_(1.5)
    assert predicted_again() == 30  # peft as well
    other = copy.deepcopy(examples)
    other["toy_parity"][0]["prompt"] = "[INST] Odd or even: 12345 [/INST]\n"
    assert predicted_again(other) == 15  # one task, three methods
    assert predicted_again(other, max_new_tokens={"toy_echo": 3, "toy_first_letter": NEW, "toy_parity": NEW}) == 15
    assert predicted_again(other, max_new_tokens={"toy_echo": 3, "toy_first_letter": NEW, "toy_parity": NEW}) == 0


def test_rows_and_paired_differences(tiny, examples, methods, tmp_path, monkeypatch):
    """Answers put into the models' mouths: base right on the first sample of every task, peft on all."""
    right = {task: [row["response"] for row in rows] for task, rows in examples.items()}
    wrong = {task: [answers[0], *["nothing of the kind"] * 4] for task, answers in right.items()}
    monkeypatch.setattr(evaluation, "predict_independent", lambda *a, **k: {"base": wrong, "peft": right})
    result = evaluate_independent(
        {"base": None, "peft": None}, examples, tokenizer=tiny[1], predictions_dir=tmp_path, batch_size=2,
        max_new_tokens=4,
    )
    assert {tuple(row) for row in result.rows} == {("task", "method", "metric", "value", "low", "high", "n")}
    accuracy = {(row["task"], row["method"]): row for row in result.rows if row["metric"] == "accuracy"}
    assert len(accuracy) == 6
    for task in TASKS:
        assert accuracy[task, "peft"]["value"] == 1.0 and accuracy[task, "peft"]["n"] == 5
        base = accuracy[task, "base"]
        assert base["value"] == pytest.approx(strict_scores(examples[task], wrong[task]).count(1.0) / 5)
        assert base["low"] <= base["value"] <= base["high"] and base["low"] < base["high"]
    assert {row["metric"] for row in result.rows if row["task"] == "toy_echo"} == {
        "accuracy", "bleu", "bleu_published", "rouge1", "rouge2", "rougeL",
    }  # fmt: skip
    (row,) = paired_rows(result.accuracies, [("peft", "base")])
    assert row["method"] == "peft" and row["other"] == "base"
    assert row["low"] <= row["value"] <= row["high"]
    assert row["value"] == pytest.approx(1 - sum(accuracy[task, "base"]["value"] for task in TASKS) / 3)


def test_bleu_of_task_rows_is_corpus_bleu(examples):
    rows = examples["toy_echo"]
    answers = [row["response"].upper() if i % 2 else row["response"] + " blue" for i, row in enumerate(rows)]
    references = [row["response"] for row in rows]
    by_metric = {row["metric"]: row for row in task_rows(rows, answers)}
    assert by_metric["bleu"]["value"] == pytest.approx(corpus_bleu(answers, references))
    assert by_metric["bleu_published"]["value"] == pytest.approx(corpus_bleu_published(answers, references))
    assert by_metric["bleu_published"]["low"] is None


def test_answer_budget_follows_the_training_responses(tiny):
    _, tokenizer = tiny
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in ("abcdefghijkl", "x")]
    assert answer_budget(tokenizer, ["abcdefghijkl", "x"], cap=100) == 2 * max(lengths)
    assert answer_budget(tokenizer, ["x"], cap=100) == 8
    assert answer_budget(tokenizer, ["abcdefghijkl"], cap=5) == 5
    assert answer_budget(tokenizer, [], cap=100) == 8


def test_the_authors_scoring_stands_beside_ours():
    examples = {"object_counting": [{"task": "object_counting", "response": "1", "choices": None}] * 2}
    answers = {"base": {"object_counting": ["1", "11"]}}
    (row,) = published_rows(examples, answers)
    assert row["task"] == "object_counting" and row["method"] == "base" and row["metric"] == "accuracy"
    assert (row["value"], row["n"]) == (1, 2)
    assert strict_scores(examples["object_counting"], answers["base"]["object_counting"]) == [1.0, 0.0]
