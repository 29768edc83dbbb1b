"""How well the gates know the task: the counting, checked by gates that are made to be right or wrong."""

import pytest
import torch

from meteora import GateTrainingConfig, MeteoraModel, train_gates
from meteora.study.figures_gates import accuracy_by_position, gate_accuracy_heatmap
from meteora.study.gates import gate_accuracy, pooled_accuracy, training_tokens

TASKS = ("one", "two")


@pytest.fixture
def model(tiny_llama, core, tmp_path):
    adapters = {task: core.make_adapter(tmp_path / task, tiny_llama, seed=n) for n, task in enumerate(TASKS)}
    return MeteoraModel.from_adapters(tiny_llama, adapters)


@pytest.fixture
def examples(core):
    return {task: [row for row in core.rows(TASKS) if row["task"] == task] for task in TASKS}


def test_gates_that_always_say_one(model, core, examples):
    found = gate_accuracy(model, core.Tokenizer(), examples, progress=False)  # zero gates: the first adapter wins ties
    for rows in (found.gates, found.votes):
        assert {(row["task"], row["accuracy"]) for row in rows} == {("one", 1.0), ("two", 0.0)}
    lengths = [len(row["prompt"]) + 1 + len(row["response"]) + 1 for task in TASKS for row in examples[task]]
    assert sum(row["tokens"] for row in found.votes) == sum(row["tokens"] for row in found.positions) == sum(lengths)
    assert sum(row["tokens"] for row in found.gates) == sum(lengths) * len(model.layers)
    assert len(found.positions) == max(lengths)
    assert pooled_accuracy(found.votes) == pytest.approx(sum(lengths[:6]) / sum(lengths))
    responses = [row["tokens"] for row in found.votes if row["part"] == "response"]
    assert sum(responses) == sum(len(row["response"]) + 1 for task in TASKS for row in examples[task])


def test_counts_agree_with_one_text_at_a_time(model, core, examples):
    core.randomize_gates(model)
    tokenizer = core.Tokenizer()
    row = examples["two"][3]
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = tokenizer(row["prompt"])["input_ids"] + response
    with torch.no_grad(), model.trace() as trace:
        model(input_ids=torch.tensor([ids]))
    right = torch.stack([logits[0].argmax(-1) == 1 for logits in trace.logits.values()])  # (modules, tokens)
    found = gate_accuracy(model, tokenizer, {"two": [row]}, progress=False)
    assert pooled_accuracy(found.gates) == pytest.approx(right.float().mean().item())
    majority = right.sum(0) > len(right) / 2
    assert [bool(row["accuracy"]) for row in found.positions] == majority.tolist()
    # the same in a padded batch
    alone = {r["module"]: r for r in found.gates if r["layer"] == 0 and r["part"] == "response"}
    both = gate_accuracy(model, tokenizer, {"two": examples["two"]}, progress=False)
    parts = [gate_accuracy(model, tokenizer, {"two": [r]}, progress=False) for r in examples["two"]]
    assert pooled_accuracy(both.gates) == pytest.approx(pooled_accuracy([r for part in parts for r in part.gates]))
    assert alone.keys() == {name.rpartition(".")[2] for name in model.layers}


def test_forcing_gives_the_gates_other_inputs(model, core, examples):
    core.randomize_gates(model)
    own, forced = (gate_accuracy(model, core.Tokenizer(), examples, forced=f, progress=False) for f in (False, True))
    assert own.gates != forced.gates
    first = [[r for r in found.gates if r["layer"] == 0 and r["module"] == "q_proj"] for found in (own, forced)]
    assert first[0] == first[1], "before the first adapter nothing depends on it"
    with model.route_to("one"):
        assert model.state.forced is not None
    assert model.state.forced is None


def test_tokens_of_a_training(model, core, examples):
    rows = [row for task in TASKS for row in examples[task]]
    config = GateTrainingConfig(objective="gate", max_steps=3, samples_per_step=6)  # all six of a task, in every step
    history = train_gates(model, rows, config, tokenizer=core.Tokenizer())
    each = sum(len(row["prompt"]) + len(row["response"]) + 2 for row in rows)
    assert training_tokens(model, core.Tokenizer(), rows, config) == 3 * each and len(history) == 3
    epochs = GateTrainingConfig(epochs=2.0, samples_per_step=6, first=config)
    assert training_tokens(model, core.Tokenizer(), rows, epochs) == 5 * each


def test_figures(model, core, examples):
    import pandas as pd

    found = gate_accuracy(model, core.Tokenizer(), examples, progress=False)
    heatmap = gate_accuracy_heatmap(pd.DataFrame(found.gates))
    assert [axes.get_title() for axes in heatmap.axes[:2]] == ["prompt tokens", "response tokens"]
    few = {"position": len(found.positions), "accuracy": 0.0, "tokens": 0.04 * found.positions[0]["tokens"]}
    curve = accuracy_by_position(pd.DataFrame([*found.positions, few]), adapters=2)
    assert list(curve.axes[0].lines[0].get_ydata()) == [row["accuracy"] for row in found.positions]
    with pytest.raises(ValueError, match="positions"):
        accuracy_by_position(pd.DataFrame({"position": [1]}), adapters=2)
