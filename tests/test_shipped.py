"""Adapters and gates from artifacts/ to results/, and from there to another machine's artifacts/."""

import json
import shutil

import pytest
import torch
import yaml

from data_prep.base_models import load_base_model
from data_prep.prepare import MANIFEST
from data_prep.sources import BIGBENCH
from meteora import AdapterError, MeteoraModel
from meteora.adapters import adapter_directory, file_sha256
from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.collection import HISTORY, load_collection
from meteora.study.profiles import PROFILES
from meteora.study.shipped import main, ship, take


@pytest.fixture(scope="module")
def trained(collected, tmp_path_factory):
    """A workspace of profile smoke with what 01 and 02 leave, shipped."""
    root = tmp_path_factory.mktemp("trained")
    settings = yaml.safe_load((PROFILES / "smoke.yaml").read_text(encoding="utf-8")) | {"root": str(root)}
    settings["data"] |= {"train": 24, "valid": 4, "test": 6}
    (root / "smoke.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    workspace = collected(Workspace(root / "smoke.yaml"), train=24)
    workspace.write_csv(HISTORY, [{"step": 1, "task": "toy_echo", "split": "train", "loss": 1.0}])
    ship(workspace)
    return workspace


@pytest.fixture
def elsewhere(trained, tmp_path):
    """The same profile on a machine that has results/ alone."""
    shutil.copytree(trained.results, tmp_path / "results" / trained.profile.name)
    return Workspace(trained.profile, root=tmp_path)


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
    adapters = trained.results / "adapters"
    assert sorted(p.name for p in adapters.iterdir()) == sorted([*trained.profile.tasks, "lora_b", "lora_f", HISTORY])
    assert MeteoraModel.from_adapters(base, {"echo": adapters / "toy_echo"}).adapter_names == ["echo"]


def test_what_ships_is_taken_in_place_of_training(trained, elsewhere):
    take(elsewhere)
    elsewhere.require("01")
    for collection in (load_collection(elsewhere), load_collection(trained)):
        assert list(collection.tasks) == list(trained.profile.tasks) and sorted(collection.single) == ["lora_b", "lora_f"]
    for name in ("gates.safetensors", "README.md"):
        assert file_sha256(elsewhere.gates / name) == file_sha256(trained.gates / name)
    base, _ = load_base_model(trained.profile.model.source)
    assert MeteoraModel.from_pretrained(base, elsewhere.gates).adapter_names == list(trained.profile.tasks)
    assert (elsewhere.data / MANIFEST).is_file()


def test_the_cards_say_what_big_bench_examples_were_seen(trained):
    card = adapter_directory(trained.results / "adapters", "toy_echo") / "README.md"
    assert "BIG-bench" not in card.read_text()
    file = trained.data / MANIFEST
    before = file.read_text()
    manifest = json.loads(before)
    for facts in manifest["tasks"].values():
        facts["source"] = BIGBENCH.filename
    try:
        file.write_text(json.dumps(manifest))
        ship(trained)
        assert card.read_text().endswith("are no training examples.\n") and "- `toy_parity`" not in card.read_text()
        everything = adapter_directory(trained.results / "adapters", "lora_b") / "README.md"
        assert all(f"- `{task}`" in everything.read_text() for task in trained.profile.tasks)
    finally:
        file.write_text(before)
        ship(trained)


def test_what_cannot_be_shipped_or_taken_is_told(trained, elsewhere, tmp_path, caplog):
    with pytest.raises(ArtifactError, match="run notebook 01"):
        ship(elsewhere)
    weights = adapter_directory(elsewhere.results / "adapters", "toy_echo") / "adapter_model.safetensors"
    shutil.copyfile(adapter_directory(elsewhere.results / "adapters", "toy_parity") / weights.name, weights)
    with pytest.raises(AdapterError, match="'toy_echo'.*is not the one the gates"):
        take(elsewhere)
    assert not any(elsewhere.adapters.iterdir()) and not any(elsewhere.gates.iterdir())
    with pytest.raises(ArtifactError, match="is of a run here; move it away"):
        take(trained)
    assert main(["--profile", str(trained.root / "smoke.yaml"), "--take"]) == 2 and "move it away" in caplog.text
    with pytest.raises(ArtifactError, match="ships no gates"):
        take(Workspace(trained.profile, root=tmp_path / "bare"))


def test_the_command_ships(trained, caplog):
    caplog.set_level("INFO")
    (trained.results / "gates" / "gates.safetensors").unlink()
    assert main(["--profile", str(trained.root / "smoke.yaml")]) == 0
    assert file_sha256(trained.results / "gates" / "gates.safetensors") == file_sha256(trained.gates / "gates.safetensors")
    assert "shipped in" in caplog.text
