"""Adapters trained side by side are the adapters one would train alone, written as stock PEFT directories."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM, get_cosine_schedule_with_warmup

from meteora import (
    AdapterError, AdapterTrainingConfig, GateTrainingConfig, MeteoraConfig, MeteoraModel, adapter_training, passes,
    train_adapters, training_loop,
)  # fmt: skip
from meteora.adapters import load_adapter


@pytest.fixture
def train(core, tiny_llama, tmp_path):
    def run(tasks=("one", "two"), folder="out", base=None, validation=None, **settings):
        datasets = {task: core.rows((task,)) for task in tasks}
        options = {"max_steps": 4, "samples_per_step": 2, "learning_rate": 0.02, "rank": 2, "alpha": 6}
        config = AdapterTrainingConfig(**{**options, "dtype": "float32", **settings})
        history = train_adapters(
            base or copy.deepcopy(tiny_llama), datasets, config,
            tokenizer=core.Tokenizer(), output_dir=tmp_path / folder, validation=validation,
        )  # fmt: skip
        return history, {task: load_adapter(task, tmp_path / folder / task).modules for task in tasks}

    return run


def close(a, b, tolerance=1e-2):
    """By norm: where a gradient is nearly zero, AdamW turns its rounding error into a whole step."""
    assert a.keys() == b.keys()
    for name in a:
        for x, y in ((a[name].A, b[name].A), (a[name].B, b[name].B)):
            assert (x - y).norm() <= tolerance * y.norm(), name


def losses(history, task, split="train"):
    return [row["loss"] for row in history if row["task"] == task and row["split"] == split]


def test_together_is_as_good_as_alone(train):
    together, both = train(max_grad_norm=0.05)
    alone, one = train(("one",), folder="alone", max_grad_norm=0.05)
    assert losses(together, "one") == pytest.approx(losses(alone, "one"), rel=1e-4)
    close(both["one"], one["one"])
    assert (
        both["two"]["model.layers.0.mlp.up_proj"].B - both["one"]["model.layers.0.mlp.up_proj"].B
    ).abs().max() > 1e-3


def test_micro_batches_do_not_change_the_result(train):
    whole, first = train()
    cut, second = train(folder="cut", tokens_per_batch=12)
    for task in ("one", "two"):
        assert losses(whole, task) == pytest.approx(losses(cut, task), rel=1e-4)
        close(second[task], first[task])


def test_it_learns_and_gives_the_base_model_back(core, train, tiny_llama):
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in tiny_llama.named_parameters()}
    history, _ = train(base=tiny_llama, max_steps=30, learning_rate=0.1)
    for task in ("one", "two"):
        # The random base's logits are too small for a loss below about 3.5; it starts at log 64 = 4.16.
        assert losses(history, task)[-1] < losses(history, task)[0] - 0.3
    after = dict(tiny_llama.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].cpu(), p) and after[n].requires_grad == flag for n, (p, flag) in before.items())


def test_every_adapter_keeps_its_own_best_weights(core, train, tmp_path):
    validation = {"one": core.rows(("one",), 3)}
    history, adapters = train(validation=validation, max_steps=8, evaluate_every=3, learning_rate=0.5)
    rows = [row for row in history if row["split"] == "valid"]
    assert [(row["step"], row["task"]) for row in rows] == [(3, "one"), (6, "one"), (8, "one")]
    assert {type(row["loss"]) for row in history} == {float}
    best = min(rows, key=lambda row: row["loss"])
    card = (tmp_path / "out" / "one" / "README.md").read_text()
    assert f"| kept step | {best['step']} |" in card and f"| validation loss | {round(best['loss'], 4)} |" in card
    assert "kept step" not in (tmp_path / "out" / "two" / "README.md").read_text()
    plain = train(folder="plain", max_steps=8, learning_rate=0.5)[1]
    close(adapters["two"], plain["two"], 1e-6)  # no validation: the last weights
    if best["step"] != 8:
        assert any((adapters["one"][n].A - plain["one"][n].A).abs().max() > 1e-3 for n in plain["one"])


def test_an_interrupted_run_goes_on_where_it_was(core, train, tmp_path, monkeypatch):
    validation = {"two": core.rows(("two",), 3)}
    expected, weights = train(folder="whole", validation=validation, evaluate_every=1)
    monkeypatch.setattr(training_loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    real, steps = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(validation=validation, evaluate_every=1)
    assert not (tmp_path / "out").exists()
    history, again = train(validation=validation, evaluate_every=1)
    assert len(steps) == 3 + 2 and history == expected
    for task in weights:
        close(again[task], weights[task], 0)


def test_the_files_are_stock_peft_with_a_card(train, tmp_path):
    train(("one",), dtype="bfloat16")
    directory = tmp_path / "out" / "one"
    assert sorted(p.name for p in directory.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 2, 6, 0.0)
    assert load_adapter("one", directory).modules["model.layers.0.mlp.up_proj"].A.dtype == torch.bfloat16


def test_bad_input_is_named(core, train, tiny_llama, tmp_path):
    call = {"tokenizer": core.Tokenizer(), "output_dir": tmp_path}
    with pytest.raises(ValueError, match="no datasets given"):
        train_adapters(tiny_llama, {}, **call)
    with pytest.raises(ValueError, match="dataset 'two': the dataset is empty"):
        train_adapters(tiny_llama, {"one": core.rows(("one",)), "two": []}, **call)
    with pytest.raises(ValueError, match="dataset 'one': the dataset is empty"):
        train_adapters(tiny_llama, {"one": []}, **call)
    with pytest.raises(ValueError, match="dataset 'two': row 1 of the dataset is a str; .* a list of rows"):
        train_adapters(tiny_llama, {"one": core.rows(("one",)), "two": [*core.rows(("two",), 1), "text"]}, **call)
    with pytest.raises(ValueError, match="validation data for 'two'"):
        train_adapters(tiny_llama, {"one": core.rows(("one",))}, validation={"two": []}, **call)
    with pytest.raises(ValueError, match="target_modules names 'c_attn'"):
        train(target_modules=("q_proj", "c_attn"))


def everything_in(folder):
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["", 3])
def test_a_name_that_is_none_replaces_nothing(core, tiny_llama, tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"an adapter's name must be a non-empty string, not {name!r}"):
        train_adapters(tiny_llama, {name: core.rows(("one",))}, tokenizer=core.Tokenizer(), output_dir=tmp_path)
    assert list(everything_in(tmp_path).values()) == ["mine"]


def test_only_an_adapter_or_an_empty_folder_is_replaced(core, train, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "two" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="out/two holds something else than an adapter of PEFT, whose README.md would"):
        train()
    assert list(everything_in(tmp_path).values()) == ["mine"]  # nor was anything trained
    (tmp_path / "out" / "two" / "README.md").rename(tmp_path / "out" / "two" / "notes.txt")
    train(max_steps=1)
    train(max_steps=1)
    assert (tmp_path / "out" / "two" / "notes.txt").read_text() == "mine"


def test_the_working_directory_may_be_the_output(core, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = {"tokenizer": core.Tokenizer(), "output_dir": "."}
    train_adapters(tiny_llama, {"one": core.rows(("one",))}, AdapterTrainingConfig(max_steps=1), **options)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")) == ["here/one"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("tokens_per_batch", [4096, 128])
def test_passes_that_could_be_recorded_train_the_same(core, train, monkeypatch, tokens_per_batch):
    validation = {"one": core.rows(("one",), 3)}
    options = {"validation": validation, "evaluate_every": 2, "max_grad_norm": 0.05, "samples_per_step": 5}
    plain, first = train(**options)
    made = core.repeat_recordings(monkeypatch, passes)
    fixed, second = train(folder="fixed", tokens_per_batch=tokens_per_batch, **options)
    for task in ("one", "two"):
        assert losses(plain, task) == pytest.approx(losses(fixed, task), rel=1e-4)
        assert losses(plain, task, "valid") == pytest.approx(losses(fixed, task, "valid"), rel=1e-4)
        close(second[task], first[task])
    assert {key[-1] for key in made[0].keys} == {True, False}


def test_a_step_over_all_layers_is_a_few_operations(core, tiny_llama):
    """Of all that does not belong to a batch, views included: what a GPU would be given one by one."""
    few, many = (_operations_of_a_step(core, copy.deepcopy(tiny_llama), layers) for layers in (1, 2))
    assert few == many < 100


def _operations_of_a_step(core, base, layers):
    base.model.layers = base.model.layers[:layers]
    names, config = ["one", "two"], AdapterTrainingConfig(rank=2)
    groups = adapter_training._encode({name: core.rows((name,)) for name in names}, names, core.Tokenizer(), 100)
    model = MeteoraModel(base, adapter_training._fresh_adapters(base, names, config), MeteoraConfig(top_k=1))
    trainer = adapter_training._AdapterTrainer(model, config, groups, {}, core.Tokenizer(), None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer._step([], [])
    return sum(event.name.startswith("aten::") and event.cpu_parent is None for event in profiler.events())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_passes_train_the_same_on_a_gpu(core, train, tiny_llama, monkeypatch, caplog, compiled):
    made = core.watch_recordings(monkeypatch)
    validation = {"one": core.rows(("one",), 3)}
    options = {"validation": validation, "evaluate_every": 3, "max_steps": 12, "max_grad_norm": 0.05}
    monkeypatch.setattr(adapter_training, "worth_compiling", lambda model, device: compiled)
    recorded, first = train(folder="recorded", **options)
    assert len(made) == 1 and made[0] > 1, "of steps and of validations"
    assert not [line for line in caplog.records if line.name == "meteora.recording"]
    monkeypatch.setattr(passes, "can_be_recorded", lambda model, device: False)
    plain, second = train(folder="plain", **options)
    assert len(made) == 1
    for task in ("one", "two"):
        assert losses(recorded, task) == pytest.approx(losses(plain, task), rel=1e-3)
        close(first[task], second[task])


def test_what_cannot_be_trained_is_told_before(core, tiny_llama, tmp_path):
    rows, options = {"one": core.rows(("one",))}, {"tokenizer": core.Tokenizer(), "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="config must be an AdapterTrainingConfig, not a GateTrainingConfig"):
        train_adapters(tiny_llama, rows, GateTrainingConfig(), **options)
    with pytest.raises(AdapterError, match="the base model must be a model of transformers, not a str"):
        train_adapters("tiny", rows, **options)
    carrying = get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="carries adapters of PEFT"):
        train_adapters(carrying.base_model.model, rows, **options)
    opt = OPTForCausalLM(OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64, ffn_dim=64,
        word_embed_proj_dim=32,
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"fc1' gets tokens of shape \(\d+,\), where .* leave it out of target_modules"):
        train_adapters(opt, rows, AdapterTrainingConfig(max_steps=1, target_modules=("fc1",)), **options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))
    train_adapters(opt, rows, AdapterTrainingConfig(max_steps=1, target_modules=("q_proj",)), **options)


@pytest.mark.parametrize("scaling", [3.0, 0.01])
def test_together_is_what_peft_trains_alone(core, tiny_llama, train, tmp_path, monkeypatch, scaling):
    """Step by step: AdamW with its epsilon, warm-up, clipping and decay, from the same A, at any scaling."""
    settings = {"rank": 2, "alpha": 2 * scaling, "max_steps": 6, "weight_decay": 0.1, "max_grad_norm": 0.5}
    seen, mean_losses = [], adapter_training._AdapterTrainer._mean_losses

    def watched(self, samples, batches, *, backward):
        seen.append([sample for sample in samples if sample.task == 0])
        return mean_losses(self, samples, batches, backward=backward)

    monkeypatch.setattr(adapter_training._AdapterTrainer, "_mean_losses", watched)
    begin = adapter_training._fresh_adapters(tiny_llama, ["one", "two"], AdapterTrainingConfig(rank=2, alpha=1))[0]
    _, together = train(**settings)
    config = AdapterTrainingConfig(**settings, learning_rate=0.02)
    lora = LoraConfig(r=2, lora_alpha=2 * scaling, target_modules=list(config.target_modules))
    alone = get_peft_model(copy.deepcopy(tiny_llama), lora).train(False)
    layers = {name: module for name, module in alone.base_model.model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(begin.modules[name].A)
    parameters = [p for p in alone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(6 * config.warmup), 6)
    for samples in seen:
        count = sum(sample.response_tokens for sample in samples)
        for sample in samples:
            ids = torch.tensor([sample.ids])
            labels = torch.where(torch.tensor([sample.is_response]), ids, -100)
            loss = alone(input_ids=ids, labels=labels).loss * sample.response_tokens / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, layer in layers.items():
        for half in ("A", "B"):
            weight = getattr(layer, f"lora_{half}")["default"].weight
            difference = (getattr(together["one"][name], half) - weight).norm() / weight.norm()
            assert difference < 2e-3, (name, half, difference)


def test_a_loss_that_is_none_is_named_before_it_spoils_the_others(core, tiny_llama, train, tmp_path):
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[core.Tokenizer()("#")["input_ids"][-1]] = math.nan
    rows = {"good": core.rows(("good",)), "bad": [{"prompt": "a#", "response": "b"}]}
    options = {"tokenizer": core.Tokenizer(), "output_dir": tmp_path / "out"}
    with pytest.raises(FloatingPointError, match="the loss of adapter 'bad' is nan; look for what its examples have"):
        train_adapters(tiny_llama, rows, AdapterTrainingConfig(max_steps=2), **options)
    assert not list((tmp_path / "out").glob("[!.]*"))
    options["validation"] = {"bad": rows["bad"]}
    with pytest.raises(FloatingPointError, match="the loss of adapter 'bad' is nan"):
        train_adapters(tiny_llama, {**rows, "bad": rows["good"]}, AdapterTrainingConfig(max_steps=2), **options)


def test_autocast_does_not_round_the_losses(core, tiny_llama, tmp_path):
    rows = {"one": core.rows(("one",))}
    options = {"tokenizer": core.Tokenizer(), "output_dir": tmp_path / "out", "validation": rows}
    config = AdapterTrainingConfig(max_steps=4, evaluate_every=1, learning_rate=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        history = train_adapters(tiny_llama, rows, config, **options)
    found = losses(history, "one", "valid")
    assert len(set(found)) == 4 and any(loss != torch.tensor(loss).bfloat16().item() for loss in found)
