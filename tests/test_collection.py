"""The adapters of a run: copied or trained, and the index that says which they are."""

import json
import shutil

import pandas as pd
import pytest
import torch
import yaml

from data_prep.base_models import load_base_model
from data_prep.prepare import load_split, prepare_tasks
from meteora import AdapterError
from meteora.adapters import file_sha256
from meteora.study import collection
from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.collection import (
    HISTORY,
    INDEX,
    Collection,
    adapter_losses,
    adapter_table,
    card_facts,
    collect,
    collect_adapters,
    load_collection,
    write_index,
)
from meteora.study.profiles import PROFILES, load_profile

TASKS = ("toy_echo", "toy_first_letter", "toy_parity")
WEIGHTS = "adapter_model.safetensors"


def _workspace(folder, **changes):
    values = yaml.safe_load((PROFILES / "smoke.yaml").read_text(encoding="utf-8")) | {"root": str(folder)} | changes
    trained = [name for name in ("lora_b", "lora_f") if values.get(name)]  # methods whose adapters the profile has
    for section in ("evaluation", "composite"):
        methods = values[section]["methods"]
        values[section]["methods"] = [m for m in methods if m in trained or not m.startswith("lora_")]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return Workspace(load_profile(path))


@pytest.fixture(scope="module")
def base():
    return load_base_model("tiny")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_tasks(TASKS, folder, sizes={"train": 12, "valid": 4, "test": 1})
    return tuple({task: load_split(folder, task, split) for task in TASKS} for split in ("train", "valid"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, examples):
    """A workspace with adapters that were trained in it."""
    workspace = _workspace(tmp_path_factory.mktemp("trained"), lora_f=None)
    found = collect_adapters(workspace, *base, *examples)
    write_index(workspace, found)
    return workspace, found


def test_training_leaves_every_tasks_adapter_and_lora_b(trained):
    workspace, found = trained
    assert not (workspace.artifacts / "data_all").exists(), "which LoRA-F alone needs"
    assert tuple(found.tasks) == TASKS and tuple(found.single) == ("lora_b",)
    assert all(path == workspace.adapters / name for name, path in (found.tasks | found.single).items())
    assert {row["task"] for row in found.history} == {*TASKS, "lora_b"}


def test_lora_b_sees_the_union_of_the_samples_in_as_large_steps(trained, examples):
    facts = {name: card_facts(path) for name, path in (trained[1].tasks | trained[1].single).items()}
    assert {facts[task]["training samples"] for task in TASKS} == {"12"}
    assert facts["lora_b"]["training samples"] == "36"
    assert [facts[name]["samples per step"] for name in ("toy_echo", "lora_b")] == ["2", "6"]
    assert facts["lora_b"]["steps"] == facts["toy_echo"]["steps"] == "6"


def test_nothing_is_trained_twice_unless_something_changed(trained, base, examples, monkeypatch):
    workspace, found = trained

    def called(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(collection, "train_adapters", called)
    assert collect_adapters(workspace, *base, *examples) == found
    train, valid = examples
    changed = {**train, "toy_echo": train["toy_echo"][:-1]}
    with pytest.raises(InterruptedError):
        collect_adapters(workspace, *base, changed, valid)
    weights = found.tasks["toy_echo"] / WEIGHTS
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1])
        with pytest.raises(InterruptedError):
            collect_adapters(workspace, *base, *examples)
    finally:
        weights.write_bytes(kept)


def test_adapters_of_a_folder_are_copied_as_they_are(trained, base, examples, tmp_path):
    source = tmp_path / "shelf" / "adapters"
    shutil.copytree(trained[0].adapters, source)
    curve = pd.DataFrame([{"step": 1, "task": "toy_echo", "split": "train", "loss": 2.5}])
    curve.to_csv(source / HISTORY, index=False)
    lora_b = {"source": str(source / "lora_b")}
    workspace = _workspace(tmp_path / "run", adapters={"source": str(source)}, lora_b=lora_b, lora_f=None)
    found = collect_adapters(workspace, *base, *examples)
    for name, path in (found.tasks | found.single).items():
        assert path.parent == workspace.adapters
        for file in ("adapter_config.json", WEIGHTS, "README.md"):
            assert (path / file).read_bytes() == (source / name / file).read_bytes()
    assert found.history == [{"step": 1, "task": "toy_echo", "split": "train", "loss": 2.5}]
    shutil.rmtree(source / "toy_parity")
    with pytest.raises(AdapterError, match="toy_parity"):
        collect_adapters(workspace, *base, *examples)


def test_each_adapter_may_lie_in_a_place_of_its_own(trained, base, examples, tmp_path):
    for task in TASKS:
        shutil.copytree(trained[0].adapters / task, tmp_path / f"llama-{task}-lora")
    adapters = {"source": str(tmp_path / "llama-{task}-lora")}
    workspace = _workspace(tmp_path / "run", adapters=adapters, lora_b=None, lora_f=None)
    found = collect_adapters(workspace, *base, *examples)
    for task in TASKS:
        assert (found.tasks[task] / WEIGHTS).read_bytes() == (tmp_path / f"llama-{task}-lora" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("per_task", "seen"), [(2, 2 * 6), (200, 3 * 360)])
def test_lora_f_sees_all_training_examples_there_are_or_as_many_as_it_draws(
    trained, base, examples, tmp_path, per_task, seen
):
    training = {"max_steps": 2, "samples_per_step": per_task, "learning_rate": 0.01, "evaluate_every": 1}
    source, lora_f = {"source": str(trained[0].adapters)}, {"source": "train", "rank": 4, "training": training}
    workspace = _workspace(tmp_path, adapters=source, lora_b=None, lora_f=lora_f)
    found = collect_adapters(workspace, *base, *examples)
    assert list(found.single) == ["lora_f"]
    facts = card_facts(found.single["lora_f"])
    # 500 of each toy task, less a fifth for the test and a tenth of the rest for validation
    assert facts["training samples"] == str(seen) and facts["samples per step"] == str(3 * per_task)
    assert facts["validation samples"] == str(sum(map(len, examples[1].values())))


def test_a_broken_adapter_leaves_the_old_copy(trained, tmp_path):
    source = trained[1].tasks["toy_echo"]
    copy = collect("a name", source, tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / WEIGHTS).write_bytes(b"no")
    with pytest.raises(AdapterError, match="'a name'.*corrupt"):
        collect("a name", broken, tmp_path)
    assert (copy / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_the_index_keeps_order_and_single_adapters_apart(trained):
    workspace, found = trained
    index = json.loads((workspace.adapters / INDEX).read_text(encoding="utf-8"))
    assert list(index["tasks"]) == list(TASKS) and list(index["single"]) == ["lora_b"]
    assert index["tasks"]["toy_echo"]["path"] == "artifacts/smoke/adapters/toy_echo"
    assert index["tasks"]["toy_echo"]["sha256"] == file_sha256(found.tasks["toy_echo"] / WEIGHTS)
    again = load_collection(workspace)
    assert (again.tasks, again.single) == (found.tasks, found.single)


def test_the_index_moves_with_its_folder_and_tells_changed_files(trained, tmp_path):
    shutil.copytree(trained[0].root, tmp_path / "moved")
    workspace = _workspace(tmp_path / "moved")
    moved = load_collection(workspace).tasks["toy_echo"]
    assert moved.is_relative_to(tmp_path)
    shutil.copy(moved.parent / "toy_parity" / WEIGHTS, moved / WEIGHTS)
    with pytest.raises(ArtifactError, match="toy_echo is gone or was changed: run notebook 01_adapter_collection"):
        load_collection(workspace)
    shutil.rmtree(moved)
    with pytest.raises(ArtifactError, match="toy_echo is gone"):
        load_collection(workspace)
    with pytest.raises(ArtifactError, match="01_adapter_collection first"):
        load_collection(_workspace(tmp_path / "empty"))


def test_table_says_what_each_adapter_is(trained, core, tiny_llama, tmp_path):
    row = adapter_table(trained[1].tasks)[0]
    size = (trained[1].tasks["toy_echo"] / WEIGHTS).stat().st_size
    assert (row["adapter"], row["rank"], row["alpha"], row["modules"]) == ("toy_echo", "4", 8, 14)
    assert (row["bytes"], row["steps"]) == (size, "6") and len(row["sha256"]) == 64
    mixed = core.make_adapter(tmp_path / "mixed", tiny_llama, rank_pattern={"up_proj": 6})
    (mixed / "README.md").unlink(missing_ok=True)
    assert [(r["rank"], r["steps"]) for r in adapter_table({"mixed": mixed})] == [("4..6", "")]


def test_losses_tell_the_right_adapter_from_a_wrong_one(trained, base, examples):
    model, tokenizer = base
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right = adapter_losses(model, trained[1].tasks, examples[1], tokenizer)
    assert [row["task"] for row in right] == list(TASKS)
    assert all(row["adapter"] < row["base"] for row in right)
    tasks = trained[1].tasks
    swapped = adapter_losses(model, {**tasks, "toy_echo": tasks["toy_parity"]}, examples[1], tokenizer)
    assert swapped[0]["base"] == pytest.approx(right[0]["base"])
    assert swapped[0]["adapter"] > right[0]["adapter"]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_collections_without_single_adapters(trained, tmp_path):
    workspace = _workspace(tmp_path)
    write_index(workspace, Collection({"toy_echo": trained[1].tasks["toy_echo"]}))
    assert load_collection(workspace).single == {}
