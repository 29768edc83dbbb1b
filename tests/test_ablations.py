"""Ablations: variants that are kept, studies that do what they say, on a tiny model with made-up tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
import yaml

from data_prep.base_models import load_base_model
from data_prep.prepare import load_split
from meteora import MeteoraModel, train_gates
from meteora.adapters import load_adapter
from meteora.batches import by_task, collate, encode
from meteora.study import ablation_studies
from meteora.study import ablations as core
from meteora.study import figures_ablations as figures
from meteora.study.ablation_studies import STUDIES, run_studies
from meteora.study.ablations import COLUMNS, Ablations, Variant, methods_of, row
from meteora.study.ablations_composites import answer_all_composites
from meteora.study.ablations_formats import training_data
from meteora.study.ablations_gates import nested_tasks
from meteora.study.ablations_routing import deciding_alone, silent_in, told_in, unsure
from meteora.study.ablations_speed import OUT_OF_MEMORY, measure, model_of_copies, perturbed_copies
from meteora.study.ablations_tasks import SHRINKAGE, only_rows_trained, set_row
from meteora.study.artifacts import Workspace
from meteora.study.baselines import share_weights
from meteora.study.collection import collect_adapters, write_index
from meteora.study.examples import prepare_examples
from meteora.study.profiles import PROFILES, ProfileError
from meteora.study.transcripts import gate_examples

CPU = torch.device("cpu")


def make_workspace(folder, **changes) -> Workspace:
    """What notebooks 01 and 02 leave of profile smoke, with some of its values replaced."""
    values = yaml.safe_load((PROFILES / "smoke.yaml").read_text(encoding="utf-8")) | {"root": str(folder)}
    methods = {"evaluation": ["base", "peft"], "composite": ["base"]}
    for section, names in methods.items():
        values[section] = values[section] | {"methods": names}
    values["lora_f"] = None
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values[section] | {name: value} if name else value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "smoke.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    workspace = Workspace(folder / "smoke.yaml")
    prepare_examples(workspace)
    tasks = workspace.profile.tasks
    train, valid = ({t: load_split(workspace.data, t, split) for t in tasks} for split in ("train", "valid"))
    base, tokenizer = load_base_model("tiny")
    found = collect_adapters(workspace, base, tokenizer, train, valid)
    write_index(workspace, found)
    model = MeteoraModel.from_adapters(base, found.tasks)
    dataset = gate_examples(train, 8)
    history = train_gates(
        model, dataset, workspace.profile.gate_config(), tokenizer=tokenizer, output_dir=workspace.gates
    )
    workspace.write_csv("gate_training.csv", history)
    return workspace


def copied(workspace, folder) -> Workspace:
    """All of a workspace in ``folder``, for the profile ``folder/smoke.yaml``."""
    shutil.copytree(workspace.root, folder / "files")
    values = yaml.safe_load((workspace.root / "smoke.yaml").read_text(encoding="utf-8"))
    (folder / "smoke.yaml").write_text(yaml.safe_dump(values | {"root": str(folder / "files")}), encoding="utf-8")
    return Workspace(folder / "smoke.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("study"))


@pytest.fixture
def ablations(workspace):
    return Ablations(workspace, device=CPU)


@pytest.fixture(scope="module")
def whole(workspace) -> pd.DataFrame:
    """The rows of every study of the profile."""
    ablations = Ablations(workspace, device=CPU)
    for name, study in STUDIES.items():
        assert list(ablations.run(name, study(ablations)).columns) == list(COLUMNS)
    return ablations.all()


def of(frame, **wanted):
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame


def with_random_gates(model):
    """Gates that choose one adapter here and another there, and two texts to choose for."""
    for n, layer in enumerate(model.layers.values()):
        torch.nn.init.normal_(layer.gate.weight, generator=torch.Generator().manual_seed(n))
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


# Variants are kept ----------------------------------------------------------------------------------------------------


def test_a_variant_is_run_once_until_something_it_depends_on_changes(tmp_path, workspace):
    mine = copied(workspace, tmp_path)
    calls = []

    def variants(setting=1):
        for name in ("a/b", "c"):
            yield Variant(name, {"setting": setting}, lambda name=name: calls.append(name) or [row("accuracy", 0.5, n=2)])

    def run(**options):
        calls.clear()
        return Ablations(mine, device=CPU).run("mine", variants(**options))

    frame = run()
    assert calls == ["a/b", "c"]
    assert frame["variant"].tolist() == ["a/b", "a/b", "c", "c"]
    assert frame["metric"].tolist() == ["accuracy", "seconds"] * 2
    again = run()
    assert calls == [] and again.equals(frame)
    assert run(setting=2) is not None and calls == ["a/b", "c"]
    (mine.artifacts / "ablations" / "mine" / "c.json").write_text("{not json")
    run(setting=2)
    assert calls == ["c"], "the other one still stands"
    gates = mine.gates / "gates.safetensors"
    gates.write_bytes(gates.read_bytes() + b" ")
    run(setting=2)
    assert calls == ["a/b", "c"], "other gates"


def test_times_are_kept_on_their_machine_and_those_of_another_only_if_they_are_asked_for(tmp_path, workspace, monkeypatch):
    mine, produced = copied(workspace, tmp_path), []

    def variant(timed=True, runs=True):
        def produce():
            produced.append(1)
            return [row("prefill", 0.5, unit="s")]

        return Variant("v", {}, produce if runs else None, timed)

    def run(**options):
        produced.clear()
        return Ablations(mine, device=CPU).run("mine", [variant(**options)])

    first = run()
    assert produced and not run().empty and not produced
    monkeypatch.setattr(core, "where_measured", lambda device: {"device": "another", "torch": "1", "triton": ""})
    assert not run(timed=False).empty and not produced, "answers are the same anywhere"
    assert run(runs=False).empty
    there = Ablations(mine, device=CPU)
    assert there.take("mine", variant(runs=False), first)
    taken = run(runs=False)
    assert set(taken["device"]) == set(first["device"]) and taken["value"].tolist() == first["value"].tolist()
    assert run().equals(taken) and not produced, "what was taken stands in for what could be measured"
    (mine.artifacts / "ablations" / "mine" / "v.json").unlink()
    assert set(run()["device"]) == {"another"} and produced


def test_what_is_kept_loads_no_model(workspace, whole, monkeypatch):
    monkeypatch.setattr(core, "open_study", None)
    monkeypatch.setattr("meteora.study.ablations_composites.open_study", None)
    again = Ablations(workspace, device=CPU)
    for name, study in STUDIES.items():
        again.run(name, study(again))
    assert len(again.all()) == len(whole)


def test_trained_gates_are_kept_by_name_and_recipe(ablations, monkeypatch):
    config = ablations.profile.gate_config(max_steps=2)
    first = ablations.trained("mine", ablations.model_with(ablations.tasks[:2]), config)
    with monkeypatch.context() as patch:
        patch.setattr(core, "train_gates", None)
        again = ablations.trained("mine", ablations.model_with(ablations.tasks[:2]), config)
        assert again.seconds == pytest.approx(first.seconds, abs=0.01) and again.peak_bytes is None
        for name, layer in first.model.layers.items():
            assert torch.equal(again.model.layers[name].gate.weight, layer.gate.weight)
        with pytest.raises(TypeError):
            ablations.trained("mine", ablations.model_with(ablations.tasks[1:]), config)
        with pytest.raises(TypeError):
            ablations.trained("mine", ablations.model_with(ablations.tasks[:2]), dataclasses.replace(config, seed=9))


def test_what_comes_first_is_trained_once_for_all_that_begin_alike(ablations, whole, monkeypatch):
    assert set(of(whole, study="gates")["variant"]) == {"joint", "joint, then gate"}
    config = ablations.profile.gate_config(**ablations.settings.gates["joint, then gate"])
    other = dataclasses.replace(config, learning_rate=0.003)
    trained = []

    def counted(model, dataset, config, **options):
        trained.append((config.objective, config.learning_rate, config.first))
        return train_gates(model, dataset, config, **options)

    monkeypatch.setattr(core, "train_gates", counted)
    kept = ablations.trained("gates joint, then gate", ablations.model_with(ablations.tasks), config)
    assert not trained, "as the study ran"
    found = ablations.trained("mine", ablations.model_with(ablations.tasks), other)
    assert trained == [("gate", 0.003, None)]
    both = ablations.model_with(ablations.tasks)
    dataset = gate_examples(ablations.examples("train"), ablations.profile.data.transcripts, seed=ablations.profile.seed)
    train_gates(both, dataset, config, tokenizer=ablations.study.tokenizer)
    for name, layer in both.layers.items():
        assert torch.equal(kept.model.layers[name].gate.weight, layer.gate.weight)
    assert kept.seconds > 0 and found.seconds > 0 and kept.peak_bytes is None


def test_studies_run_without_a_notebook_until_the_time_is_up(workspace, ablations, whole, caplog, monkeypatch):
    caplog.set_level("INFO")
    assert run_studies(ablations, ["reference", "top_k"])
    assert "top_k: k=1" in caplog.text and "accuracy" in caplog.text
    produced = []
    monkeypatch.setitem(STUDIES, "mine", lambda ablations: (Variant(f"v{n}", {"n": n}, produced.append) for n in range(3)))
    assert not run_studies(ablations, ["mine"], time_limit=-1) and not produced


def test_shares_are_all_of_the_variants_and_each_once(ablations, monkeypatch):
    for study, count in (("few", 2), ("many", 5)):
        variants = [Variant(f"{study} {n}", {}, list) for n in range(count)]
        monkeypatch.setitem(STUDIES, study, lambda ablations, variants=variants: iter(variants))
    done = []
    empty = pd.DataFrame(columns=COLUMNS)
    monkeypatch.setattr(ablations, "run", lambda name, variants: done.append(variants[0].name) or empty)
    assert run_studies(ablations, ["few", "many"])
    whole, shares = list(done), []
    for n in (1, 2, 3):
        done.clear()
        assert run_studies(ablations, ["few", "many"], share=(n, 3))
        shares.append(list(done))
    assert sorted(sum(shares, [])) == sorted(whole) and max(map(len, shares)) == 3
    assert shares[0] == ["few 0", "many 1", "many 4"]


def test_shares_want_the_reference_first(tmp_path, workspace, whole, caplog):
    mine = copied(workspace, tmp_path)
    options = ["--profile", str(tmp_path / "smoke.yaml"), "--time-limit", "-1", "--share", "1/2"]
    assert ablation_studies.main(options) == 0
    shutil.rmtree(mine.artifacts / "ablations" / "reference")
    assert ablation_studies.main(options) == 2
    assert "every share needs the reference; run this with --studies reference" in caplog.text


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b"])
def test_what_is_no_share_is_told(text, capsys):
    with pytest.raises(SystemExit):
        ablation_studies.main(["--share", text])
    assert f"'{text}' is no share; write 1/4" in capsys.readouterr().err


def test_the_command_writes_what_is_kept_of_every_study(tmp_path, workspace, whole, caplog, monkeypatch):
    caplog.set_level("INFO")
    mine = copied(workspace, tmp_path)
    (mine.artifacts / "ablations" / "top_k" / "k%3D3.json").unlink()
    outdated = mine.artifacts / "ablations" / "gates" / "joint.json"
    outdated.write_text(outdated.read_text(encoding="utf-8").replace('"fingerprint": "', '"fingerprint": "not '))
    finished = whole[~whole["variant"].isin(["k=3", "joint"])]
    monkeypatch.setattr(core, "open_study", None)  # nothing can be produced
    monkeypatch.setattr("meteora.study.ablations_composites.open_study", None)
    for options in (["--time-limit", "-1"], ["--studies", "seeds", "reference"]):
        caplog.clear()
        assert ablation_studies.main(["--profile", str(tmp_path / "smoke.yaml"), *options]) == 0
        written = mine.metrics / "ablations.csv"
        assert written.read_text(encoding="utf-8") == finished.to_csv(index=False, lineterminator="\n")
        assert "not yet: top_k: k=3, gates: joint" in caplog.messages
        written.unlink()
    assert caplog.messages[-1] == "complete"


def test_a_record_of_the_same_inputs_is_taken_instead_of_measuring(tmp_path, workspace, whole, caplog, monkeypatch):
    caplog.set_level("INFO")
    mine = copied(workspace, tmp_path)
    shutil.rmtree(mine.artifacts / "ablations")
    elsewhere, outdated = whole["variant"] == "k=3", whole["variant"] == "k=1"
    device, fingerprint = whole["device"].mask(elsewhere, "another"), whole["fingerprint"].mask(outdated, "other")
    record = whole.assign(device=device, fingerprint=fingerprint)
    record.to_csv(tmp_path / "ablations.csv", index=False)
    monkeypatch.setattr(core, "open_study", None)  # nothing can be produced
    monkeypatch.setattr("meteora.study.ablations_composites.open_study", None)
    options = ["--profile", str(tmp_path / "smoke.yaml"), "--time-limit", "-1", "--recorded"]
    assert ablation_studies.main([*options, str(tmp_path / "ablations.csv")]) == 0
    assert "not yet: top_k: k=1" in caplog.messages
    text = record[~outdated].to_csv(index=False, lineterminator="\n")
    assert (mine.metrics / "ablations.csv").read_text(encoding="utf-8") == text
    caplog.clear()
    assert ablation_studies.main([*options, str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in caplog.text
    record.drop(columns="fingerprint").to_csv(tmp_path / "ablations.csv", index=False)
    assert ablation_studies.main([*options, str(tmp_path / "ablations.csv")]) == 2
    assert "lacks fingerprint" in caplog.text


def test_studies_of_a_profile_without_them(caplog):
    assert ablation_studies.main(["--profile", "laptop"]) == 2
    assert "laptop" in caplog.text and "ablations" in caplog.text


# What the rows say ----------------------------------------------------------------------------------------------------


def test_every_study_of_the_profile_leaves_rows(whole, workspace):
    assert set(whole["study"]) == set(STUDIES)
    keys = [column for column in COLUMNS if column not in ("value", "low", "high", "n", "unit")]
    assert not whole.duplicated(keys).any()
    settings = workspace.profile.ablations
    assert set(of(whole, study="top_k")["variant"]) == {f"k={k}" for k in settings.top_k}
    assert set(of(whole, study="adapters")["variant"]) == {"2 adapters", "3 adapters"}
    assert set(of(whole, study="seeds")["split"].dropna()) == {"test"}
    assert set(of(whole, study="added")["variant"]) == {
        "before", "closed form", "its row trained", "all trained anew",
    }  # fmt: skip


def test_means_are_those_of_the_tasks(whole, workspace):
    added = workspace.profile.ablations.added_task
    rows = of(whole, study="added", variant="closed form", metric="accuracy", method="meteora_top2").set_index("task")
    tasks = [task for task in workspace.profile.tasks]
    assert rows.loc["ALL", "value"] == pytest.approx(rows.loc[tasks, "value"].mean())
    assert rows.loc["ADDED", "value"] == pytest.approx(rows.loc[added, "value"])
    others = [task for task in tasks if task != added]
    assert rows.loc["OTHERS", "value"] == pytest.approx(rows.loc[others, "value"].mean())
    assert (rows["low"] <= rows["value"]).all() and (rows["value"] <= rows["high"]).all()


def test_k_1_is_meteora_top1(whole):
    one = of(whole, study="top_k", variant="k=1", metric="accuracy").set_index("task")["value"]
    same = of(whole, study="reference", method="meteora_top1", metric="accuracy").set_index("task")["value"]
    assert one.to_dict() == same.to_dict()


def test_shares_of_unknown_prompts_are_over_the_adapters_that_are_left(whole, workspace):
    shares = of(whole, study="unknown", metric="share")
    (task,) = workspace.profile.ablations.held_out
    assert set(shares["task"]) == {task} and task not in set(shares["adapter"])
    assert shares["value"].sum() == pytest.approx(1, abs=1e-3)
    losses = of(whole, study="unknown", metric="response_loss").set_index("method")["value"]
    assert set(losses.index) == {"base", "meteora_top2", "peft"} and losses["peft"] < losses["base"]


def test_foreign_prompts_are_prepared_and_met(tmp_path):
    changes = {
        "ablations": {"samples": 2, "foreign": ["toy_parity"], "composite_items": 1},
        "composite__sizes": {2: ["toy_echo", "toy_first_letter"]},
        "composite__temperature": {},
    }
    mine = make_workspace(tmp_path, tasks=["toy_echo", "toy_first_letter"], **changes)
    ablations = Ablations(mine, device=CPU)
    frame = ablations.run("unknown", STUDIES["unknown"](ablations))
    assert set(frame["variant"]) == {"foreign"}
    assert set(of(frame, metric="share")["adapter"]) == {"toy_echo", "toy_first_letter"}
    assert set(of(frame, metric="response_loss")["task"]) == {"toy_parity"}
    empty = [name for name, study in STUDIES.items() if ablations.run(name, study(ablations)).empty]
    assert empty == [name for name in STUDIES if name not in ("reference", "unknown")], "what is not set is left out"


def test_trainings_of_gates_are_compared_on_composites_of_validation_problems(ablations, whole, workspace):
    rows = whole[whole["study"].isin(["reference", "gates"]) & (whole["metric"] == "correct")]
    assert set(rows["split"]) == {"valid"} and set(rows["protocol"]) == {"sequential"}
    assert set(rows["composite"]) == set(workspace.profile.composite.sizes)
    methods = rows.groupby(["study", "variant"])["method"].unique().map(sorted).to_dict()
    assert methods.pop(("reference", "as trained")) == ["base", "lora_b", "meteora_top1", "meteora_top2", "peft"]
    assert methods == {("gates", name): ["meteora_top1", "meteora_top2"] for name in workspace.profile.ablations.gates}
    asked = json.loads((workspace.predictions / "ablations/reference/composite-2/sequential/peft.jsonl").open().readline())
    valid = {example["prompt"] for rows in ablations.examples("valid").values() for example in rows}
    assert {prompt for prompts in asked["prompts"].values() for prompt in prompts} <= valid


def test_unsure_gates_answer_the_composites_without_adapters(ablations, whole):
    least = ablations.settings.weights_tested
    rows = of(whole, study="composites")
    assert list(rows["variant"].unique()) == [*ablations.settings.composite_methods, f"none below {least:g}"]
    found = of(rows, variant=f"none below {least:g}", metric="correct")
    assert set(found["method"]) == {"meteora_top1, none where unsure", "meteora_top2, none where unsure"}
    usual = of(rows, variant="arrow", metric="correct")
    keys = ["composite", "protocol", "shots", "temperature", "n"]
    assert set(found[keys].itertuples(index=False)) == set(usual[keys].itertuples(index=False))
    # Gates that prefer no adapter are nowhere sure enough: the answers are the base model's.
    ablations.settings = dataclasses.replace(ablations.settings, weights=(0.9,), weights_tested=0.9)
    model = ablations.study.model
    with torch.no_grad():
        for layer in model.layers.values():
            layer.gate.weight.zero_()
    *_, variant = STUDIES["composites"](ablations)
    silent = of(pd.DataFrame(variant.produce()), metric="correct")
    base, count = {"base": ablations.study.methods["base"]}, ablations.profile.composite.count
    base = answer_all_composites(ablations, base, count, ablations.answers_folder("base"))
    expected = of(pd.DataFrame(base), metric="correct")["value"].tolist()
    for _, values in silent.groupby("method"):
        assert values["value"].tolist() == expected


def test_training_on_composites_is_compared_on_the_same_items(whole, workspace):
    rows = of(whole, study="formats")
    assert list(rows["variant"].unique()) == ["own questions", "own questions and composites"]
    settings = ["composite", "protocol", "shots", "method", "metric", "n"]
    own, both = (of(rows, variant=name).query("task == 'ALL' and composite == composite") for name in rows["variant"].unique())
    assert own[settings].values.tolist() == both[settings].values.tolist() != []
    assert set(own["protocol"]) == set(workspace.profile.composite.protocols)
    assert set(of(own, protocol="sequential")["method"]) == {"base", "peft", "meteora_top2", "lora_b"}
    base = [of(part, method="base")["value"].tolist() for part in (own, both)]
    assert base[0] == base[1], "what is not trained answers alike"
    folder = workspace.artifacts / "ablations" / "formats"
    tasks = {task for chosen in workspace.profile.composite.sizes.values() for task in chosen}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*tasks, "lora_b"}
    taken = workspace.adapters / "toy_echo" / "adapter_model.safetensors"
    assert (folder / "toy_echo" / taken.name).read_bytes() != taken.read_bytes()


def test_lora_b_sees_composites_too(ablations):
    examples = ablations.examples("train")
    rows, for_gates = training_data(examples, ablations.settings.formats, 5, seed=0)
    own = {task: len(of_task) for task, of_task in examples.items()}
    answers = sum(len(of_task) - own[task] for task, of_task in rows.items())
    texts = for_gates[sum(own.values()) + 5 :]
    assert len(texts) == ablations.settings.formats.texts and all("segments" in row for row in texts)
    assert 2 * len(texts) <= answers <= 3 * len(texts), "an answer for every task of a text"
    assert all(rows[task][: own[task]] == of_task for task, of_task in examples.items())


# One more task --------------------------------------------------------------------------------------------------------


def test_only_the_added_row_is_trained(ablations):
    *others, added = ablations.tasks
    model = ablations.trained("without", ablations.model_with(others), ablations.profile.gate_config(max_steps=3)).model
    model.add_adapter(added, ablations.study.adapters[added])
    before = {name: layer.gate.weight.detach().clone() for name, layer in model.layers.items()}
    assert all((weight[2] == 0).all() and weight[:2].any() for weight in before.values())
    config = ablations.profile.gate_config(max_steps=3)
    with only_rows_trained(model, [2]):
        ablations.trained("row", model, config, tasks=ablations.tasks)
    for name, layer in model.layers.items():
        assert torch.equal(layer.gate.weight[:2], before[name][:2]), "bit by bit"
        assert layer.gate.weight[2].any()
    other = ablations.model_with(ablations.tasks)
    ablations.trained("after", other, config)
    assert all(layer.gate.weight.any(1).all() for layer in other.layers.values()), "the hook is gone"


def test_a_row_in_closed_form_is_the_ridge_regression_on_the_inputs(ablations):
    *others, added = ablations.tasks
    model = ablations.trained("without", ablations.model_with(others), ablations.profile.gate_config(max_steps=3)).model
    model.add_adapter(added, ablations.study.adapters[added])
    shown = {task: ablations.valid[task] for task in ablations.tasks}
    tokenizer, layer = ablations.study.tokenizer, next(iter(model.layers.values()))
    inputs, owners = [], []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].detach()))
    names = {name: n for n, name in enumerate(model.adapter_names)}
    samples = encode([r for rows in shown.values() for r in rows], names, tokenizer, 1024)
    for sample in samples:
        batch = collate([sample], tokenizer.pad_token_id, CPU)
        with torch.no_grad(), model.route_to(model.adapter_names[sample.task]):
            model(input_ids=batch.input_ids)
        owners += [sample.task] * len(sample.ids)
    hook.remove()
    x, owner = torch.cat(inputs).double(), torch.tensor(owners)
    logits = x @ layer.gate.weight.detach().double().T
    new = owner == 2
    own = logits[~new].gather(1, owner[~new, None]).mean()
    other = logits[~new][:, :2].sum(1).mean() - own  # of the one other trained row
    weight = torch.where(new, 1 / new.sum(), 1 / (~new).sum()).double()
    target = torch.where(new, own, other)
    second = (x * weight[:, None]).T @ x
    ridge = SHRINKAGE * second.diagonal().mean() * torch.eye(len(second))
    expected = torch.linalg.solve(second + ridge, (x * (weight * target)[:, None]).sum(0))
    set_row(model, tokenizer, shown, added, max_length=1024)
    torch.testing.assert_close(layer.gate.weight[2].detach().double(), expected, rtol=1e-2, atol=1e-3)
    assert model.state.gate_observer is None and model.state.forced is None
    assert len(by_task(samples)) == 3


# Who decides ----------------------------------------------------------------------------------------------------------


def test_other_layers_follow_the_last_decision(ablations):
    model = ablations.study.model
    ids = with_random_gates(model)

    def choices(*context):
        with torch.no_grad(), model.trace() as trace:
            if context:
                with context[0]:
                    model(input_ids=ids)
            else:
                model(input_ids=ids)
        return trace.indices

    free, led = choices(), choices(deciding_alone(model, ["o_proj", "down_proj"]))
    names = list(model.layers)
    parts = [name.rpartition(".")[2] for name in names]
    ahead = parts.index("o_proj")
    assert all(torch.equal(led[name], free[name]) for name in names[: ahead + 1]), "nothing was decided before them"
    for n in range(ahead + 1, len(names)):
        if parts[n] not in ("o_proj", "down_proj"):
            leader = max(m for m in range(n) if parts[m] in ("o_proj", "down_proj"))
            assert torch.equal(led[names[n]], led[names[leader]])
    assert any(not torch.equal(led[name], free[name]) for name in names)
    assert model.state.forced is None and model.state.gate_observer is None
    assert all(torch.equal(a, b) for a, b in zip(choices().values(), free.values(), strict=True))
    with deciding_alone(model, ["q_proj"]):
        cached, plain = (
            model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
        )
    assert torch.equal(cached, plain), "also token by token"
    everything = choices(deciding_alone(model, set(parts)))
    assert all(torch.equal(everything[name], free[name]) for name in names)


def test_some_layers_are_told_and_the_others_choose(ablations):
    model = ablations.study.model
    ids = with_random_gates(model)
    tasks, own = ["toy_parity", "toy_echo"], torch.tensor([model.adapter_names.index(n) for n in ("toy_parity", "toy_echo")])

    def run(*contexts):
        with contextlib.ExitStack() as stack, torch.no_grad():
            for context in contexts:
                stack.enter_context(context)
            return model(input_ids=ids).logits

    with model.trace() as free:
        before = run()
    model.set_top_k(1)  # a trace holds one k
    with model.trace() as trace:
        run(told_in(model, tasks, range(1, 2)))
    model.set_top_k(2)
    for name in model.layers:
        first = trace.indices[name][..., 0]
        if ".layers.1." in name:
            assert (first == own[:, None]).all()
    assert any((trace.indices[name][..., 0] != own[:, None]).any() for name in model.layers if ".layers.0." in name)
    assert torch.equal(run(told_in(model, tasks, ())), before)
    assert torch.equal(run(told_in(model, tasks, range(2))), run(model.route_to(tasks)))
    assert model.state.forced is None and torch.equal(run(), before) and free.indices
    with told_in(model, tasks, [0]):
        cached, plain = (
            model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
        )
    assert torch.equal(cached, plain), "also token by token"


def test_unsure_gates_add_less(ablations):
    model = ablations.study.model
    ids = with_random_gates(model)

    def run(context=contextlib.nullcontext()):
        with context, torch.no_grad(), model.trace() as trace:
            return model(input_ids=ids).logits, trace.weights, trace.indices

    model.set_top_k(1)
    usual, weights, _ = run()
    (name, first), *_ = weights.items()
    assert (first == 1).all()
    soft, weights, indices = run(unsure(model))
    caught = {}
    hook = model.layers[name].register_forward_pre_hook(lambda _, inputs: caught.setdefault("x", inputs[0]))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    logits = caught["x"].float() @ model.layers[name].gate.weight.t()
    torch.testing.assert_close(weights[name][..., 0].flatten(), logits.softmax(-1).amax(-1).flatten())
    assert torch.equal(indices[name][..., 0], logits.argmax(-1)) and not torch.allclose(soft, usual)
    share = weights[name]
    some = share.median().item()
    _, weights, _ = run(unsure(model, some))
    assert torch.equal(weights[name], (share >= some).float()) and weights[name].mean() not in (0, 1)
    model.set_top_k(2)
    usual, weights, _ = run()
    _, half, _ = run(unsure(model))
    torch.testing.assert_close(half[name] / half[name].sum(-1, keepdim=True), weights[name])
    assert half[name].sum(-1).max() < 1.0001 and half[name].sum(-1).mean() < 0.999
    model.set_top_k(3)
    torch.testing.assert_close(run(unsure(model))[0], run()[0], msg="of all adapters, nothing is left out")
    model.set_top_k(2)
    assert not model.state.watched and torch.equal(run()[0], usual)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.gate.weight.zero_()
    base = run(model.disable_adapters())[0]
    torch.testing.assert_close(run(unsure(model, 0.9))[0], base)


@pytest.mark.parametrize("study", ["deciding", "modules"])
def test_modules_that_the_model_does_not_have_are_refused(ablations, study):
    ablations.settings = dataclasses.replace(ablations.settings, modules={"attention": ("q_proj", "k_prj")})
    (variant,) = STUDIES[study](ablations)
    with pytest.raises(ProfileError, match=r"ablations.modules\['attention'\] has 'k_prj', but the model's adapters are in q"):
        variant.produce()


def test_half_a_recorded_variant_is_none(ablations, whole):
    variant = next(STUDIES["top_k"](ablations))
    rows = of(whole, study="top_k", variant=variant.name)
    assert ablations.take("top_k", variant, rows) and not ablations.take("top_k", variant, rows.iloc[: len(rows) // 2])


@pytest.mark.parametrize("study", ["told", "silent"])
def test_layers_that_the_model_does_not_have_are_refused(ablations, study):
    ablations.settings = dataclasses.replace(ablations.settings, **{study: {"the second": (1, 2), "the third": (2, 3)}})
    good, bad = STUDIES[study](ablations)
    assert good.produce()
    with pytest.raises(ProfileError, match=rf"ablations.{study}\['the third'\] ends behind layer 2, but .* last is 1"):
        bad.produce()


def test_some_layers_are_silent(ablations):
    model = ablations.study.model
    ids = with_random_gates(model)

    def run(context=contextlib.nullcontext()):
        with context, torch.no_grad():
            return model(input_ids=ids).logits

    before = run()
    first = [layer for name, layer in model.layers.items() if ".layers.0." in name]
    kept = [layer.lora_B.data.clone() for layer in first]
    for layer in first:
        layer.lora_B.data.zero_()
        layer.forget_packed()
    without = run()
    for layer, weights in zip(first, kept, strict=True):
        layer.lora_B.data.copy_(weights)
        layer.forget_packed()
    assert not torch.allclose(without, before)
    torch.testing.assert_close(run(silent_in(model, (), [0])), without)
    assert model.state.enabled and torch.equal(run(), before)
    assert torch.equal(run(silent_in(model, (), ())), before)
    base = run(model.disable_adapters())
    assert torch.equal(run(silent_in(model, (), range(2))), base)
    with model.disable_adapters():
        assert torch.equal(run(silent_in(model, (), [0])), base) and not model.state.enabled
    with pytest.raises(RuntimeError), silent_in(model, (), [0]):
        first[0](torch.zeros(1, 1, 1))  # its hook that comes after is not called
    assert model.state.enabled and torch.equal(run(), before)
    with silent_in(model, (), [0]):
        cached, plain = (
            model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
        )
    assert torch.equal(cached, plain), "also token by token"


def test_sets_of_tasks_are_nested():
    tasks = [f"task {n}" for n in range(22)]
    sets = [nested_tasks(tasks, count, 0) for count in (4, 8, 16, 22)]
    assert [len(s) for s in sets] == [4, 8, 16, 22] and sets[-1] == tasks
    for small, large in zip(sets, sets[1:]):
        assert set(small) < set(large) and small == [task for task in tasks if task in small]
    assert nested_tasks(tasks, 4, 1) != sets[0]


# Time and memory ------------------------------------------------------------------------------------------------------


def test_copies_differ_a_little_and_count_as_many(ablations):
    loaded = [load_adapter(task, path) for task, path in ablations.study.adapters.items()]
    copies = perturbed_copies(loaded, 7)
    assert len({adapter.name for adapter in copies}) == 7
    assert copies[:3] == loaded
    for n in range(3, 7):
        for module, weights in copies[n].modules.items():
            original = loaded[n % 3].modules[module]
            distance = (weights.A.float() - original.A.float()).norm() / original.A.float().norm()
            assert 0 < distance < 0.05 and weights.A.dtype == original.A.dtype
    model = model_of_copies(ablations, 7)
    assert len(model.adapter_names) == 7 and model.top_k == 2
    assert all(len(layer.gate.weight) == 7 for layer in model.layers.values())
    assert model_of_copies(ablations, 1).top_k == 1


def test_a_measurement_that_does_not_fit_is_a_row_that_says_so(ablations):
    model = model_of_copies(ablations, 3)
    options = {"batch": 2, "tokens": 5, "repeats": 2, "device": CPU}
    rows = measure(model, model.disable_adapters, **options)
    assert [r["metric"] for r in rows] == ["prefill", "decode", "peak_bytes"] and all(r["value"] > 0 for r in rows)

    class Small(torch.nn.Module):
        config = model.config

        def forward(self, **inputs):
            raise torch.OutOfMemoryError

    rows = measure(Small(), model.disable_adapters, **options)
    assert {(r["value"], r["unit"]) for r in rows} == {(None, OUT_OF_MEMORY)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_can_be_in_a_graph_is(ablations):
    model = model_of_copies(ablations, 3).to("cuda")
    options = {"batch": 2, "tokens": 16, "repeats": 2, "device": torch.device("cuda")}
    for backend, ending in (("dense", ""), ("loop", ", eager")):
        model.set_backend(backend)
        units = [r["unit"] for r in measure(model, nullcontext, **options)]
        assert units == [f"s{ending}", f"ms per step{ending}", "bytes"]


def test_backends_that_cannot_run_here_are_left_out(workspace, whole, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    variants = of(whole, study="latency")["variant"].unique()
    assert list(variants) == ["auto", "loop"]
    speed = dataclasses.replace(workspace.profile.ablations.speed, backends=("loop", "triton"))
    settings = dataclasses.replace(workspace.profile.ablations, speed=speed)
    mine = Ablations(Workspace(dataclasses.replace(workspace.profile, ablations=settings)), device=CPU)
    runs = {variant.name: variant.produce is not None for variant in STUDIES["latency"](mine)}
    assert runs == {"loop": True, "triton": False}


def test_methods_share_one_model(ablations):
    model = ablations.model_with(ablations.tasks)
    found = methods_of(model, "base", "meteora_top2")
    assert all(method.model is model for method in found.values())
    plain = share_weights(ablations.study.plain)
    with torch.no_grad(), found["base"].active():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


# Figures --------------------------------------------------------------------------------------------------------------


def test_figures_show_what_the_rows_say(whole):
    figure = figures.variant_accuracy(whole, ["top_k", "gates", "seeds", "not there"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "adapters per token (k)", "training of the gates", "seeds (test split)",
    ]  # fmt: skip
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["k=3", "k=1"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "PEFT (told the task)" in texts and "MeteoRA top-3" in texts and len(set(texts)) == len(texts)
    figure = figures.added_adapter(whole)
    assert [axes.get_title() for axes in figure.axes] == ["the added task", "mean over the other tasks"]
    assert figures.accuracy_over_adapters(whole).axes[0].get_xlabel() == "adapters in the model"
    assert len(figures.unknown_tasks(whole).axes) == 2
    assert [axes.get_title() for axes in figures.shots_curves(whole).axes] == [
        "composite-2, numbered (test split, n = 1)", "composite-2, guided (test split, n = 1)",
    ]  # fmt: skip
    panel = figures.formats_curves(whole).axes[0]
    assert panel.get_title() == "numbered" and panel.get_ylim() == (0, 1)
    assert "Base model, own questions and composites" in [line.get_label() for line in panel.get_lines()]
    figure = figures.speed_curves(whole)
    assert figure.axes[0].get_ylabel() == "prefill (s)"
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    expected = of(whole, study="scale", metric="prefill", method="meteora_top2", batch=1, tokens=8)
    assert list(lines["MeteoRA top-2"]) == expected.sort_values("adapters")["value"].tolist()


def test_a_study_that_was_not_run_is_named(whole):
    with pytest.raises(ValueError, match="no rows of study 'added'"):
        figures.added_adapter(whole[whole["study"] == "top_k"])
    with pytest.raises(ValueError, match="no accuracy of gates; run"):
        figures.variant_accuracy(whole[whole["study"] == "top_k"], ["gates"])
    with pytest.raises(ValueError, match="lacks the columns"):
        figures.added_adapter(pd.DataFrame({"study": ["added"]}))


def test_few_prompts_train_gates_of_their_own(ablations, whole):
    config, count = ablations.profile.gate_config(), ablations.settings.prompts[0]
    few = ablations.trained("few", ablations.model_with(ablations.tasks), config, prompts=count).model
    again = ablations.model_with(ablations.tasks)
    train = {task: rows[:count] for task, rows in ablations.examples("train").items()}
    dataset = gate_examples(train, ablations.profile.data.transcripts, seed=config.seed)
    train_gates(again, dataset, config, tokenizer=ablations.study.tokenizer)
    for name, layer in few.layers.items():
        assert torch.equal(layer.gate.weight, again.layers[name].gate.weight)
        assert not torch.equal(layer.gate.weight, ablations.study.model.layers[name].gate.weight)
    rows = of(whole, study="prompts", task="ALL", metric="accuracy", method="meteora_top2")
    assert rows["prompts"].tolist() == [count, len(ablations.examples("train")[ablations.tasks[0]])]
    reference = of(whole, study="reference", task="ALL", metric="accuracy", method="meteora_top2")
    assert rows["value"].iloc[-1] == reference["value"].iloc[0]
    figure = figures.accuracy_over_prompts(whole)
    assert figure.axes[0].lines[0].get_xdata().tolist() == sorted(rows["prompts"])


def test_arrow_gates_are_not_the_trained_ones(whole):
    rows = of(whole, study="arrow", metric="accuracy", task="ALL")
    assert rows["method"].tolist() == ["meteora_top1", "meteora_top2"] and not len(of(whole, study="arrow", metric="training_seconds"))
    own, trained = (of(whole, study=study, metric="gate_accuracy")["value"].iloc[0] for study in ("arrow", "reference"))
    assert own != trained
