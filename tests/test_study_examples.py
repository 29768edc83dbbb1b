"""The examples of a run: prepared once, and anew for other settings, also where the last preparation was incomplete."""

import dataclasses

import pytest

from data_prep import hub
from meteora.study import examples
from meteora.study.artifacts import Workspace
from meteora.study.examples import prepare_examples
from meteora.study.profiles import load_profile


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A function that prepares a profile of this seed and these tasks; it returns the manifest, and whether it had to."""
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    made = []
    prepare = examples.prepare_tasks
    monkeypatch.setattr(examples, "prepare_tasks", lambda *a, **k: made.append(k["seed"]) or prepare(*a, **k))

    def run(seed, *more):
        made.clear()
        smoke = load_profile("smoke")
        profile = dataclasses.replace(smoke, seed=seed, tasks=(*smoke.tasks, *more), root=str(tmp_path))
        return prepare_examples(Workspace(profile))[1], bool(made)

    return run


def test_examples_are_kept_as_long_as_nothing_that_decides_them_changes(prepared):
    first, made = prepared(0)
    assert made and prepared(0) == (first, False)
    other, made = prepared(1)
    assert made and other["seed"] == 1


def test_an_incomplete_preparation_is_taken_for_no_other(prepared):
    first, _ = prepared(0)
    second, _ = prepared(7, "gsm8k")
    assert second["unavailable"]
    again, made = prepared(0)
    assert made and again == first
