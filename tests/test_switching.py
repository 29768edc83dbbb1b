"""Switching at the junctions: the counting, checked by gates that are made to be right or wrong, and by hand."""

import pandas as pd
import pytest
import torch

from data_prep.composite import CompositeItem
from meteora import MeteoraModel
from meteora.study.baselines import build_methods
from meteora.study.figures_gates import switching_curves
from meteora.study.routing import token_routing
from meteora.study.sequential import transcript
from meteora.study.switching import _places, trace_switching

TASKS = ("one", "two", "three")


@pytest.fixture
def model(tiny_llama, core, tmp_path):
    adapters = {task: core.make_adapter(tmp_path / task, tiny_llama, seed=n) for n, task in enumerate(TASKS)}
    return MeteoraModel.from_adapters(tiny_llama, adapters)


@pytest.fixture
def items():
    examples = [{"task": task, "prompt": f"{task}? ", "response": "yes"} for task in TASKS]
    return [CompositeItem(str(n), list(TASKS), "", "", examples) for n in range(2)]


def trace(model, core, items, answers, method="meteora_top2"):
    active = build_methods([method], model)[method].active
    return trace_switching(model, core.Tokenizer(), items, answers, active=active, progress=False)


def test_places_count_from_the_first_token_of_each_part():
    found = _places([0, 0, 0, 1, 1, 1, 1, 2], [False, False, True, False, False, True, True, False])
    assert found == [
        ("problem", 0), ("problem", 1), ("answer", 0), ("problem", 0), ("problem", 1), ("answer", 0), ("answer", 1),
        ("problem", 0),
    ]  # fmt: skip


def test_gates_that_always_say_one(model, core, items):
    for layer in model.layers.values():
        layer.gate.weight.data.zero_()  # ties: the first of them
    found = trace(model, core, items, [["a", "bb", "ccc"]] * 2, method="meteora_top1")
    # adapter 0 always: never the own one of problems 2 and 3, the previous one of problem 2 alone
    by_place = {(row["part"], row["distance"]): row for row in found.rows}
    assert {row["own"] for row in found.rows} == {0.0}
    assert by_place["problem", 0]["previous"] == 0.5 and by_place["problem", 0]["tokens"] == 4
    assert by_place["answer", 2]["previous"] == 0.5  # "bb" and its end, "ccc"
    assert by_place["answer", 0]["weight"] == 0.0
    assert [(row["part"], row["value"], row["n"]) for row in found.totals] == [("problem", 0.0, 2), ("answer", 0.0, 2)]
    tokens = {task: len(f"\n{task}? ") for task in TASKS}
    problem = sum(row["tokens"] for row in found.rows if row["part"] == "problem")
    assert problem == 2 * (tokens["two"] + tokens["three"])


def test_counts_agree_with_one_token_after_another(model, core, items):
    core.randomize_gates(model)
    answers = [["a", None, "cc"], ["", "bbb", "c"]]
    found = trace(model, core, items, answers)
    tokenizer = core.Tokenizer()
    expected = {part: [] for part in ("problem", "answer")}
    for item, texts in zip(items, answers, strict=True):
        ids = [tokenizer(text or "", add_special_tokens=False)["input_ids"] for text in texts]
        whole = transcript(tokenizer, [example["prompt"] for example in item.examples], ids)
        model.set_top_k(2)
        dominant = token_routing(model, whole.tokens).dominant
        right = {"problem": [], "answer": []}
        for token, problem in enumerate(whole.problem):
            if problem:
                right["answer" if whole.is_answer[token] else "problem"].append(dominant[token] == problem)
        for part, values in right.items():
            expected[part].append(sum(values) / len(values))
    for total in found.totals:
        assert total["composite"] == 3 and total["low"] <= total["value"] <= total["high"]
        assert total["value"] == pytest.approx(sum(expected[total["part"]]) / 2)
    assert torch.tensor([row["own"] + row["previous"] for row in found.rows]).max() <= 1


def test_figure(model, core, items):
    core.randomize_gates(model)
    rows = trace(model, core, items, [["a", "bb", "ccc"]] * 2).rows
    figure = switching_curves(pd.DataFrame([*rows, *({**row, "composite": 5} for row in rows)]), adapters=3)
    assert [axes.get_title() for axes in figure.axes] == ["problem tokens", "answer tokens"]
    own = figure.axes[0].lines[0]
    assert list(own.get_ydata()) == [row["own"] for row in rows if row["part"] == "problem"]
    assert list(own.get_xdata())[:2] == [1, 2]
    with pytest.raises(ValueError, match="own"):
        switching_curves(pd.DataFrame({"composite": [3]}), adapters=3)
