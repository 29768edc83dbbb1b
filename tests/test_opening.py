"""What the evaluation notebooks start from: the right models over one copy of the weights, or what is missing."""

import dataclasses
import json

import pytest

from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.collection import INDEX
from meteora.study.opening import open_study
from meteora.study.profiles import load_profile


@pytest.fixture(scope="module")
def workspace(collected, tmp_path_factory):
    """What notebooks 01 and 02 leave for profile smoke."""
    profile = dataclasses.replace(load_profile("smoke"), root=str(tmp_path_factory.mktemp("study")))
    return collected(Workspace(profile), train=8)


def test_all_methods_over_one_copy_of_the_weights(workspace):
    settings = workspace.profile
    study = open_study(workspace, settings.evaluation.methods)
    assert tuple(study.methods) == settings.evaluation.methods
    assert study.model.adapter_names == list(settings.tasks) == list(study.adapters)
    assert study.methods["lora_b"].model.adapter_names == ["lora_f", "lora_b", "linear", "ties", "dare"]
    weights = study.plain.get_input_embeddings().weight
    for name, method in study.methods.items():
        model = method.model.model if name == "xlora" else method.model  # which wraps a model
        assert model.get_input_embeddings().weight is weights
    name, layer = next(iter(study.model.layers.items()))
    assert layer.base_layer.weight is study.plain.get_submodule(name).weight
    assert {task: len(rows) for task, rows in study.tests.items()} == dict.fromkeys(settings.tasks, 4)
    limits = study.answer_limits(cap=9)
    assert set(limits) == set(settings.tasks) and set(limits.values()) <= {8, 9}


def test_only_what_is_asked_for_is_loaded(workspace):
    study = open_study(workspace, ["base", "meteora_top2"])
    assert {method.model for method in study.methods.values()} == {study.model}


def test_what_is_missing_is_named(workspace, tmp_path):
    empty = Workspace(dataclasses.replace(workspace.profile, root=str(tmp_path)))
    with pytest.raises(ArtifactError, match="01_adapter_collection"):
        open_study(empty, ["base"])
    index = workspace.adapters / INDEX
    text = index.read_text()
    try:
        index.write_text(json.dumps(json.loads(text) | {"single": {}}))
        with pytest.raises(ArtifactError, match="'lora_b'.*01_adapter_collection"):
            open_study(workspace, ["base", "lora_b"])
    finally:
        index.write_text(text)
