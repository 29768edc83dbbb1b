"""Gate training: its losses and gradients against what they are by definition, and its loop against interruptions."""

import copy
import json
import math
import shutil

import pytest
import torch

from meteora import GateTrainingConfig, MeteoraConfig, MeteoraModel, passes, train_gates, training, training_loop
from meteora.batches import by_task, collate, encode
from meteora.passes import gate_inputs
from meteora.training import _forward_joint, _GateTrainer
from meteora.training_loop import TrainingRun

CPU = torch.device("cpu")
KEYS = ["step", "loss", "lm_loss", "gate_loss", "gate_accuracy"]


@pytest.fixture
def make(core, tiny_llama, mixed_adapters):
    def make_model(**settings):
        adapters = {"one": mixed_adapters["one"], "two": mixed_adapters["three"]}
        model = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), adapters, MeteoraConfig(**settings))
        return core.randomize_gates(model, std=0.3)

    return make_model


def gates(model):
    return {name: layer.gate.weight.detach().clone() for name, layer in model.layers.items()}


def run(model, core, tmp_path=None, **settings):
    config = GateTrainingConfig(**{"max_steps": 3, "samples_per_step": 2, "learning_rate": 0.01, **settings})
    return train_gates(model, core.rows(), config, tokenizer=core.Tokenizer(), output_dir=tmp_path)


def batch_of(core, rows=None):
    samples = encode(rows or core.rows(count=2), {"one": 0, "two": 1}, core.Tokenizer(), 100)
    tokens, responses = (sum(n) for n in zip(*((len(s.ids), s.response_tokens) for s in samples), strict=True))
    return collate(samples, 2, CPU), tokens, responses


def written_out(model, batch, beta):
    """L_LM + beta * L_gate from a trace-free forward pass: the gates' inputs are caught by hooks."""
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in model.layers.items()
    ]
    lm_loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    for hook in hooks:
        hook.remove()
    real = batch.attention_mask.bool()
    labels = batch.token_tasks[real]
    losses = [torch.nn.functional.cross_entropy(model.layers[n].gate(x)[real], labels) for n, x in inputs.items()]
    right = [(model.layers[n].gate(x)[real].argmax(-1) == labels).float().mean() for n, x in inputs.items()]
    gate_loss = torch.stack(losses).mean()
    return lm_loss + beta * gate_loss, lm_loss, gate_loss, torch.stack(right).mean()


@pytest.mark.parametrize("top_k", [1, 2])
def test_joint_is_the_loss_written_out(core, make, top_k):
    model, reference = make(top_k=top_k), make(top_k=top_k)
    batch, tokens, responses = batch_of(core)
    weights = batch.attention_mask / tokens / len(model.layers)
    parts = _forward_joint(model, gate_inputs(batch, weights, 1 / responses), 3.0)
    expected = written_out(reference, batch, 3.0)
    torch.testing.assert_close(parts, torch.stack([p.detach() for p in expected[1:]]), rtol=1e-4, atol=1e-5)
    expected[0].backward()
    for name, layer in model.layers.items():
        assert layer.gate.weight.grad.abs().max() > 0
        torch.testing.assert_close(
            layer.gate.weight.grad, reference.layers[name].gate.weight.grad, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("balance", ["token", "turn"])
def test_the_local_gradient_is_autograds(core, make, balance):
    model = make()
    rows = [{"task": "one", "prompt": "abcdefgh", "response": "x"}, *core.rows(count=1)]
    rows.append({"turns": [rows[0], rows[-1]]})
    groups = by_task(encode(rows, {"one": 0, "two": 1}, core.Tokenizer(), 100))
    config = GateTrainingConfig(objective="gate", balance=balance, max_grad_norm=1e9)
    trainer = _GateTrainer(model, config, TrainingRun(model, groups, config, core.Tokenizer(), None))
    drawn = [sample for samples in groups.values() for sample in samples]
    mixed, long = drawn[:2]
    turns = [[len(long.ids), len(mixed.ids) - len(long.ids)], *([len(sample.ids)] for sample in drawn[1:])]
    batch = collate(drawn, 2, trainer.run.device)
    for gate in trainer.gates:
        gate.grad = torch.zeros_like(gate)
    row = trainer._step([batch], drawn)
    loss, accuracy = torch.tensor(row["loss"]), row["gate_accuracy"]
    found = {name: layer.gate.weight.grad for name, layer in model.layers.items()}
    inputs = {}
    for name, layer in model.layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    means = []
    for name, layer in model.layers.items():
        layer.gate.weight.grad = None
        parts = []  # each turn's losses
        of_rows = layer.gate(inputs[name]), batch.attention_mask.bool(), batch.token_tasks, turns
        for logits, real, labels, lengths in zip(*of_rows, strict=True):
            losses = torch.nn.functional.cross_entropy(logits[real], labels[real], reduction="none")
            parts += losses.split(lengths)
        means.append(torch.cat(parts).mean() if balance == "token" else torch.stack([p.mean() for p in parts]).mean())
    expected = torch.stack(means).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach().cpu())
    for name, layer in model.layers.items():
        torch.testing.assert_close(found[name], layer.gate.weight.grad, rtol=1e-4, atol=1e-6)
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_training_learns_the_tasks_and_moves_nothing_else(core, make, objective):
    model = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    history = run(model, core, objective=objective, max_steps=40, learning_rate=0.05)
    assert [list(row) for row in history] == [KEYS] * 40 and [row["step"] for row in history] == list(range(1, 41))
    assert history[-1]["gate_loss"] < 0.6 * history[0]["gate_loss"] and history[-1]["gate_accuracy"] > 0.75
    if objective == "joint":
        assert all(row["loss"] == pytest.approx(row["lm_loss"] + row["gate_loss"]) for row in history)
    else:
        assert all(math.isnan(row["lm_loss"]) and row["loss"] == row["gate_loss"] for row in history)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.cpu(), before[n])}
    assert moved == {n for n in before if n.endswith("gate.weight")}
    assert all(p.grad is None for p in model.parameters()) and model.state.gate_observer is None
    assert model.state.warning is None


@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_micro_batches_do_not_change_the_result(core, make, objective):
    whole, cut = make(), make()
    rows = [run(whole, core, objective=objective), run(cut, core, objective=objective, tokens_per_batch=12)]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4, nan_ok=True)
    for name, gate in gates(whole).items():
        torch.testing.assert_close(gates(cut)[name], gate, rtol=1e-3, atol=1e-4)


def test_the_local_objective_keeps_nothing_for_a_way_back(core, make):
    def kept(tensor):
        pytest.fail(f"{tuple(tensor.shape)} was kept for a backward pass")

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        run(make(), core, objective="gate", gradient_checkpointing=True)


def test_gradient_checkpointing_gives_the_same_history(core, make, recwarn):
    plain, checkpointed = make(), make()
    calls = []
    layer = checkpointed.layers["model.layers.0.mlp.up_proj"]
    layer.register_forward_hook(lambda *args: calls.append(1))
    first = run(plain, core)
    second = run(checkpointed, core, gradient_checkpointing=True)
    assert len(calls) == 6  # each of three steps' forward passes, and again on the way back
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, gate in gates(plain).items():
        torch.testing.assert_close(gates(checkpointed)[name], gate)
    assert all("forward" not in vars(module) for module in checkpointed.modules())
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


@pytest.mark.parametrize("balance", ["token", "turn"])
@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_passes_that_could_be_recorded_train_the_same(core, make, monkeypatch, objective, balance):
    options = {"objective": objective, "balance": balance, "samples_per_step": 5}
    plain, fixed = make(), make()
    expected = run(plain, core, **options)
    made = core.repeat_recordings(monkeypatch, passes)
    for row, other in zip(expected, run(fixed, core, tokens_per_batch=128, **options), strict=True):
        assert row == pytest.approx(other, rel=1e-4, nan_ok=True)
    for name, gate in gates(plain).items():
        torch.testing.assert_close(gates(fixed)[name], gate, rtol=1e-3, atol=1e-4)
    assert made[0].keys


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_recorded_passes_train_the_same_on_a_gpu(core, make, monkeypatch, caplog, objective, compiled):
    made = core.watch_recordings(monkeypatch)
    monkeypatch.setattr(training, "worth_compiling", lambda model, device: compiled)
    options = {"objective": objective, "max_steps": 12}
    recorded, plain = make(), make()
    first = run(recorded, core, **options)
    assert len(made) == 1 and made[0]
    assert not [line for line in caplog.records if line.name == "meteora.recording"]
    monkeypatch.setattr(passes, "can_be_recorded", lambda model, device: False)
    for row, other in zip(first, run(plain, core, **options), strict=True):
        assert row == pytest.approx(other, rel=1e-3, nan_ok=True)
    assert len(made) == 1
    for name, gate in gates(plain).items():
        torch.testing.assert_close(gates(recorded)[name], gate, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_an_interrupted_run_goes_on_where_it_was(core, make, tmp_path, monkeypatch, objective):
    whole = make()
    expected = run(whole, core, tmp_path / "whole", objective=objective, max_steps=5)
    monkeypatch.setattr(training_loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    steps = 0

    class Interrupted(Exception):
        pass

    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Interrupted
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    again = make()
    before = gates(again)
    with pytest.raises(Interrupted):
        run(again, core, tmp_path / "cut", objective=objective, max_steps=5)
    assert [p.name for p in tmp_path.iterdir() if "cut" in p.name] == [".cut.unfinished.pt"]
    for name, gate in gates(again).items():
        assert torch.equal(before[name], gate), "so that the same call of the same model goes on"
    steps = 10
    if objective == "joint":
        again = make()  # or that of another process
    history = run(again, core, tmp_path / "cut", objective=objective, max_steps=5)
    assert steps == 12  # three steps were not repeated
    assert json.dumps(history) == json.dumps(expected)  # as text, since lm_loss may be NaN
    for name, gate in gates(whole).items():
        assert torch.equal(gates(again)[name], gate)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_gates_without_training_outlive_a_training_that_fails(core, tiny_llama, mixed_adapters, monkeypatch):
    model = MeteoraModel.from_adapters(tiny_llama, mixed_adapters, gates="arrow")
    before = gates(model)

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(torch.OutOfMemoryError):
        train_gates(model, core.rows(tasks=("one", "three")), GateTrainingConfig(max_steps=1), tokenizer=core.Tokenizer())
    assert model.state.absolute_logits and not model.state.untrained
    for name, gate in gates(model).items():
        assert torch.equal(before[name], gate)


def test_few_steps_train_and_are_warned_of(core, make, caplog):
    model = make()
    before = gates(model)
    run(model, core, max_steps=1, learning_rate=1.0)
    assert all((gates(model)[name] != gate).any() for name, gate in before.items()), "not at a rate of 0"
    assert "1 steps are few for gates; set max_steps" in caplog.text
    caplog.clear()
    few = training.FEW_STEPS // 2
    run(make(), core, max_steps=few, first=GateTrainingConfig(objective="gate", max_steps=few - 1))
    assert f"{2 * few - 1} steps are few for gates" in caplog.text
    caplog.clear()
    run(make(), core, max_steps=training.FEW_STEPS)
    assert "steps are few for gates" not in caplog.text


def test_an_output_that_is_there_keeps_the_unfinished_run_inside(core, make, tmp_path, monkeypatch):
    """It may be a mount point, or all that may be written to."""
    monkeypatch.setattr(training_loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    (tmp_path / "there").mkdir()
    seen = []
    real = training_loop.TrainingRun._save

    def save(self, *args):
        real(self, *args)
        seen.append([sorted(p.name for p in folder.iterdir()) for folder in (tmp_path, tmp_path / "there")])

    monkeypatch.setattr(training_loop.TrainingRun, "_save", save)
    run(make(), core, tmp_path / "there")
    assert seen[-1] == [["there"], [".there.unfinished.pt"]]
    assert not [p.name for p in (tmp_path / "there").iterdir() if p.name.startswith(".")]


def test_a_second_stage_goes_on_with_the_firsts_gates(core, make):
    first = GateTrainingConfig(objective="gate", max_steps=2, samples_per_step=2, learning_rate=0.1)
    both, one_by_one = make(), make()
    history = run(both, core, first=first)
    alone = train_gates(one_by_one, core.rows(), first, tokenizer=core.Tokenizer())
    then = run(one_by_one, core)
    assert json.dumps(history) == json.dumps(alone + [{**row, "step": 2 + row["step"]} for row in then])
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5]
    for name, gate in gates(both).items():
        assert torch.equal(gates(one_by_one)[name], gate)


def test_an_interrupted_second_stage_does_not_repeat_the_first(core, make, tmp_path, monkeypatch):
    first = GateTrainingConfig(objective="gate", max_steps=2, samples_per_step=2, learning_rate=0.1)
    whole, again = make(), make()
    expected = run(whole, core, first=first)
    real, steps = torch.optim.AdamW.step, []

    class Interrupted(Exception):
        pass

    def step(self, *args, **kwargs):
        steps.append(self)
        if len(steps) == 4:  # the second of the second stage
            raise Interrupted
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(Interrupted):
        run(make(), core, tmp_path / "cut", first=first)
    assert [p.name for p in tmp_path.iterdir()] == [".cut.unfinished.pt"]
    history = run(again, core, tmp_path / "cut", first=first)
    assert len(steps) == 4 + 3, "all of the second stage, whose state was not kept yet, and none of the first"
    assert json.dumps(history) == json.dumps(expected)
    for name, gate in gates(whole).items():
        assert torch.equal(gates(again)[name], gate)
    assert [p.name for p in tmp_path.iterdir()] == ["cut"]


def test_a_run_with_other_arguments_starts_anew(core, make, tiny_llama, mixed_adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    monkeypatch.setattr(training_loop.TrainingRun, "forget_checkpoint", lambda self: None)
    run(make(), core, tmp_path / "a")
    left = (tmp_path / ".a.unfinished.pt").read_bytes()
    one = shutil.copytree(mixed_adapters["one"], tmp_path / "adapter")
    config = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    adapters = {"one": one, "two": mixed_adapters["three"]}
    other = core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), adapters), std=0.3)
    others = (({"learning_rate": 0.02}, make()), ({}, make(top_k=1)), ({}, make(temperature=2.0)), ({}, other))
    for settings, model in others:
        expected = run(copy.deepcopy(model), core, **settings)
        (tmp_path / ".a.unfinished.pt").write_bytes(left)
        assert run(model, core, tmp_path / "a", **settings) == expected


def test_the_result_is_saved_whole(core, make, tiny_llama, tmp_path):
    model = make()
    run(model, core, tmp_path / "out" / "gates")
    again = MeteoraModel.from_pretrained(tiny_llama, tmp_path / "out" / "gates")
    assert again.state.warning is None
    for name, gate in gates(model).items():
        assert torch.equal(gates(again)[name], gate.cpu())


def test_accelerates_name_of_a_cpu_is_no_obstacle(core, make, tmp_path, monkeypatch):
    """Among several processes it is cpu:0, which torch.load does not know."""
    monkeypatch.setattr(training_loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    monkeypatch.setattr(training_loop.TrainingRun, "forget_checkpoint", lambda self: None)
    monkeypatch.setattr(training_loop.Accelerator, "device", torch.device("cpu", 0))
    expected = run(make(), core, tmp_path / "a")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("it was done already"))
    assert json.dumps(run(make(), core, tmp_path / "a")) == json.dumps(expected)


def test_another_base_model_starts_anew(core, make, tmp_path, monkeypatch):
    """Also where it differs in what has no adapter, or behind a weight's first values."""
    monkeypatch.setattr(training_loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    monkeypatch.setattr(training_loop.TrainingRun, "forget_checkpoint", lambda self: None)
    run(make(), core, tmp_path / "a")
    left = (tmp_path / ".a.unfinished.pt").read_bytes()
    for change in ("model.norm.weight", "model.layers.0.self_attn.q_proj.base_layer.weight"):
        other = make()
        with torch.no_grad():
            weight = other.base_model.get_parameter(change)
            weight[len(weight) // 2 :] *= 2
        expected = run(copy.deepcopy(other), core)
        (tmp_path / ".a.unfinished.pt").write_bytes(left)
        assert run(other, core, tmp_path / "a") == expected


@pytest.mark.parametrize("use", ["route_to", "trace"])
def test_gates_that_do_not_choose_freely_are_not_trained(core, make, use):
    model = make()
    names = ["one"] if use == "route_to" else []
    with getattr(model, use)(*names), pytest.raises(ValueError, match=rf"leave {use}\(\) first"):
        run(model, core)


def test_float16_is_warned_of_where_gradients_go_through_the_model(core, make, caplog):
    model = make()
    run(model.half(), core, objective="gate")
    assert "underflow" not in caplog.text
    run(model, core, objective="joint")
    assert "in float16 gradients through the model underflow; load the base model in bfloat16 or float32" in caplog.text


def test_a_full_output_directory_is_refused_before_the_work(core, make, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(training_loop.TrainingRun, "loop", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(FileExistsError, match="something else than a checkpoint"):
        run(make(), core, tmp_path)


def test_what_counts_alike_and_how_many_mixed_rows_decide(core, make):
    rows = core.rows(count=4)
    long = {"task": "one", "prompt": "abcdefghijkl", "response": "x"}
    rows += [long, {"turns": [rows[0], rows[-1]]}, {"turns": [long, rows[-1]]}]
    config = {"objective": "gate", "max_steps": 2, "samples_per_step": 4, "learning_rate": 0.01}

    def losses(**changes):
        history = train_gates(make(), rows, GateTrainingConfig(**config, **changes), tokenizer=core.Tokenizer())
        return [row["gate_loss"] for row in history]

    found = [losses(), losses(mixed_per_step=4), losses(mixed_per_step=9), losses(balance="turn")]
    assert found[0] == found[1] and len({tuple(f) for f in found}) == 3


def test_the_seed_decides(core, make):
    first, same, other = (run(make(), core, seed=seed) for seed in (3, 3, 4))
    assert first == same != other


def test_rows_of_unknown_tasks_are_named(core, make):
    with pytest.raises(ValueError, match="row 0 .* of task 'three', for which there is no adapter"):
        train_gates(make(), core.rows(("three",)), tokenizer=core.Tokenizer())


@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_a_model_in_half_precision_trains(core, make, objective):
    model = make().half()
    assert all(math.isfinite(row["loss"]) for row in run(model, core, objective=objective))
    assert all(torch.isfinite(gate).all() for gate in gates(model).values())


def test_gates_are_trained_for_the_tasks_that_were_there(core, make):
    model = make()
    name = model.adapter_names[0]
    config = GateTrainingConfig(max_steps=2)
    with model.disable_adapters(), pytest.raises(ValueError, match="the adapters are disabled"):
        train_gates(model, core.rows([name]), config, tokenizer=core.Tokenizer())
    assert model.state.untrained == set(model.adapter_names)
    train_gates(model, core.rows([name]), config, tokenizer=core.Tokenizer())
    others = set(model.adapter_names) - {name}
    assert model.state.untrained == others and all(repr(other) in model.state.warning for other in others)
    turns = [{"turns": core.rows(others, count=1)}]
    train_gates(model, turns, config, tokenizer=core.Tokenizer())
    assert not model.state.untrained and model.state.warning is None


def test_a_dict_is_no_config(core, make):
    with pytest.raises(ValueError, match="config must be a GateTrainingConfig, not a dict"):
        train_gates(make(), core.rows(), {"max_steps": 2}, tokenizer=core.Tokenizer())


def test_a_bf16_model_trains_float32_gates(core, make):
    model = make()
    model.base_model.to(torch.bfloat16)
    for layer in model.layers.values():
        layer.gate.float()
    for objective in ("gate", "joint"):
        history = run(model, core, objective=objective, max_steps=8, learning_rate=0.05)
        assert history[-1]["gate_loss"] < history[0]["gate_loss"]
    assert all(layer.gate.weight.dtype == torch.float32 for layer in model.layers.values())
