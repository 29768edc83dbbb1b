"""Adapters and gates from artifacts/ to results/, and from there to another machine's artifacts/."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.base_models import load_base_model
from data_prep.prepare import MANIFEST
from data_prep.sources import BIGBENCH
from meteora import MeteoraModel
from meteora.adapters import adapter_directory, file_sha256
from meteora.study import shipped
from meteora.study.artifacts import ArtifactError, Workspace, find_stage
from meteora.study.collection import HISTORY, load_collection
from meteora.study.profiles import PROFILES
from meteora.study.records import Records
from meteora.study.run import write_manifest
from meteora.study.shipped import main, ship, take

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(collected, tmp_path_factory):
    """A workspace of profile smoke with what 01 and 02 leave and a manifest that says so, shipped."""
    root = tmp_path_factory.mktemp("trained")
    settings = yaml.safe_load((PROFILES / "smoke.yaml").read_text(encoding="utf-8")) | {"root": str(root)}
    settings["data"] |= {"train": 24, "valid": 4, "test": 6}
    (root / "smoke.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    workspace = collected(Workspace(root / "smoke.yaml"), train=24)
    workspace.write_csv(HISTORY, [{"step": 1, "task": "toy_echo", "split": "train", "loss": 1.0}])
    records = Records(workspace)
    for stage in map(find_stage, ("01", "02")):
        records.start(stage)
        records.finish(stage, 12.5, device="a GPU", git_revision="abc", versions={"torch": "2.0"})
    write_manifest(workspace, records)
    ship(workspace)
    return workspace


@pytest.fixture
def elsewhere(trained, tmp_path):
    """The same profile on a machine that has results/ alone."""
    shutil.copytree(trained.results, tmp_path / "results" / trained.profile.name)
    return Workspace(trained.profile, root=tmp_path)


def tree(*folders: Path) -> dict[Path, str]:
    return {path: file_sha256(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_what_ships_is_a_checkpoint_and_a_source_of_adapters(trained):
    base, tokenizer = load_base_model(trained.profile.model.source)
    inputs = tokenizer("hello", return_tensors="pt")
    outputs = []
    for folder in (trained.gates, trained.results / "gates"):
        model = MeteoraModel.from_pretrained(base, folder)
        with torch.no_grad():
            outputs.append(model(**inputs).logits)
        model.unload()
    assert torch.equal(*outputs)
    settings = json.loads((trained.results / "gates" / "meteora_config.json").read_text())
    assert all(len(entry["config_sha256"]) == 64 for entry in settings["adapters"])
    adapters = trained.results / "adapters"
    assert sorted(p.name for p in adapters.iterdir()) == sorted([*trained.profile.tasks, "lora_b", "lora_f", HISTORY])
    assert MeteoraModel.from_adapters(base, {"echo": adapters / "toy_echo"}).adapter_names == ["echo"]


def test_what_ships_is_taken_in_place_of_training(trained, elsewhere):
    take(elsewhere)
    for collection in (load_collection(elsewhere), load_collection(trained)):
        assert list(collection.tasks) == list(trained.profile.tasks) and sorted(collection.single) == ["lora_b", "lora_f"]
    for name in ("gates.safetensors", "README.md"):
        assert file_sha256(elsewhere.gates / name) == file_sha256(trained.gates / name)
    base, _ = load_base_model(trained.profile.model.source)
    assert MeteoraModel.from_pretrained(base, elsewhere.gates).adapter_names == list(trained.profile.tasks)
    assert (elsewhere.data / MANIFEST).is_file()


def test_what_is_taken_need_not_run_and_keeps_its_origin(trained, elsewhere):
    stages = [find_stage(number) for number in ("01", "02", "03")]
    records = Records(elsewhere)
    records.start(stages[0])  # an interrupted run, which had left nothing
    take(elsewhere)
    assert [records.why_run(stage) for stage in stages] == [None, None, "it has not run yet"]
    before, after = (json.loads(write_manifest(w, Records(w)).read_text()) for w in (trained, elsewhere))
    assert after["notebooks"]["01_adapter_collection"]["device"] == "a GPU" and after["notebooks"] == before["notebooks"]
    weights = {name: sha for name, sha in before["inputs"]["files"].items() if not name.startswith("gates/adapters/")}
    assert after["inputs"]["files"] == weights and after["inputs"]["data"]["tasks"] == before["inputs"]["data"]["tasks"]


def test_taking_can_be_repeated_also_after_a_failure(trained, elsewhere, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shipped, "_copy_gates", full)
    with pytest.raises(OSError, match="No space"):
        take(elsewhere)
    assert not tree(elsewhere.adapters, elsewhere.gates)
    monkeypatch.undo()
    (elsewhere.adapters / ".toy_echo.77.new").mkdir()  # a killed process's
    take(elsewhere)
    shutil.rmtree(elsewhere.gates)  # as if it had been killed between the two
    take(elsewhere)
    take(elsewhere)
    assert Records(elsewhere).why_run(find_stage("02")) is None


def test_the_cards_say_once_what_big_bench_examples_were_seen(trained):
    card = adapter_directory(trained.results / "adapters", "toy_echo") / "README.md"
    assert "BIG-bench" not in card.read_text()
    own = adapter_directory(trained.adapters, "toy_echo") / "README.md"
    file, kept = trained.data / MANIFEST, own.read_text()
    before = file.read_text()
    manifest = json.loads(before)
    for facts in manifest["tasks"].values():
        facts["source"] = BIGBENCH.filename
    try:
        file.write_text(json.dumps(manifest))
        ship(trained)
        text = card.read_text()
        assert text.endswith("are no training examples.\n") and "- `toy_parity`" not in text
        everything = adapter_directory(trained.results / "adapters", "lora_b") / "README.md"
        assert all(f"- `{task}`" in everything.read_text() for task in trained.profile.tasks)
        own.write_text(text)  # as it is after it was taken
        ship(trained)
        assert card.read_text() == text
    finally:
        file.write_text(before)
        own.write_text(kept)
        ship(trained)


def test_what_cannot_be_shipped_is_told_and_changes_nothing(trained, elsewhere):
    with pytest.raises(ArtifactError, match="run notebook 01"):
        ship(elsewhere)
    settings = dataclasses.replace(trained.profile.adapters, source=str(trained.adapters))
    with pytest.raises(ArtifactError, match="has its adapters from"):
        ship(Workspace(dataclasses.replace(trained.profile, adapters=settings), root=trained.root))
    take(elsewhere)
    shutil.copyfile(*(adapter_directory(elsewhere.adapters, task) / WEIGHTS for task in ("toy_parity", "toy_echo")))
    index = elsewhere.adapters / "adapters.json"
    entries = json.loads(index.read_text())
    entries["tasks"]["toy_echo"]["sha256"] = entries["tasks"]["toy_parity"]["sha256"]
    index.write_text(json.dumps(entries))
    before = tree(elsewhere.results)
    with pytest.raises(ArtifactError, match="trained with other adapters; run notebook 02 again"):
        ship(elsewhere)
    assert tree(elsewhere.results) == before


@pytest.mark.parametrize("adapter", ["toy_echo", "lora_b"])
def test_an_adapter_that_is_another_is_not_taken(elsewhere, adapter):
    weights = adapter_directory(elsewhere.results / "adapters", adapter) / WEIGHTS
    shutil.copyfile(adapter_directory(elsewhere.results / "adapters", "toy_parity") / WEIGHTS, weights)
    with pytest.raises(ArtifactError, match=f"{adapter}.*is missing or another than was recorded"):
        take(elsewhere)
    weights.unlink()
    with pytest.raises(ArtifactError, match="is missing or another"):
        take(elsewhere)
    assert not tree(elsewhere.adapters, elsewhere.gates)


def test_what_cannot_be_taken_is_told(trained, elsewhere, tmp_path, caplog):
    take(elsewhere)
    (elsewhere.gates / "gates.safetensors").write_bytes(b"another")
    with pytest.raises(ArtifactError, match="is of a run here; move it away"):
        take(elsewhere)
    other = dataclasses.replace(trained.profile, tasks=trained.profile.tasks[::-1])
    with pytest.raises(ArtifactError, match="of other tasks"):
        take(Workspace(other, root=elsewhere.root))
    with pytest.raises(ArtifactError, match="ships no gates.*train them with ./run_all.sh"):
        take(Workspace(trained.profile, root=tmp_path / "bare"))
    (elsewhere.results / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="manifest.json cannot be read"):
        take(elsewhere)
    file = tmp_path / "bare.yaml"
    text = (trained.root / "smoke.yaml").read_text().replace(str(trained.root), str(tmp_path / "nothing"))
    file.write_text(text)
    assert main(["--profile", str(file), "--take"]) == 2 and "error: profile 'smoke' ships no gates" in caplog.text


def test_the_command_ships(trained, caplog):
    caplog.set_level("INFO")
    (trained.results / "gates" / "gates.safetensors").unlink()
    assert main(["--profile", str(trained.root / "smoke.yaml")]) == 0
    assert file_sha256(trained.results / "gates" / "gates.safetensors") == file_sha256(trained.gates / "gates.safetensors")
    assert "shipped in" in caplog.text
