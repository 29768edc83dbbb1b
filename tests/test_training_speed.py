"""The speed of gate training: it times `train_gates` on what it says it does."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from meteora.batches import encode
from meteora.study import training_speed
from meteora.study.artifacts import Workspace
from meteora.study.model_settings import TrainingSpeed
from meteora.study.profiles import PROFILES
from meteora.study.training_speed import BUDGET, COLUMNS, CodePoints, main, measure_training, random_samples

CPU = torch.device("cpu")
WHOLE = Workspace("smoke").profile.benchmark.model
STUDY = WHOLE.training


def test_samples_are_of_the_asked_length_and_of_every_task():
    rows = random_samples(["a", "b"], replace(STUDY, samples_per_step=2, steps=3), vocabulary=128_256)
    assert [row["task"] for row in rows] == ["a"] * 10 + ["b"] * 10
    samples = encode(rows, {"a": 0, "b": 1}, CodePoints(), 1000)
    assert {(len(s.ids), s.response_tokens) for s in samples} == {(16, 4)}
    ids = {token for sample in samples for token in sample.ids[:-1]}
    assert min(ids) > 1 and max(ids) > 1000 and len(ids) > 200, "random, and never the end of a text"
    small = encode(random_samples(["a"], STUDY, vocabulary=64), {"a": 0}, CodePoints(), 1000)
    assert max(token for sample in small for token in sample.ids) < 64


def test_what_is_timed_is_training_as_anyone_calls_it(monkeypatch):
    calls = []
    real = training_speed.train_gates

    def watched(model, rows, config, **options):
        calls.append((config, len(rows)))
        history = real(model, rows, config, **options)
        assert len(history) == 2 + STUDY.steps
        return history

    monkeypatch.setattr(training_speed, "train_gates", watched)
    rows = pd.DataFrame(measure_training(WHOLE, "float32", CPU))
    assert [(c.objective, c.gradient_checkpointing) for c, _ in calls] == [("gate", False), ("joint", True)]
    assert {count for _, count in calls} == {3 * (2 + STUDY.steps)}
    wide = rows.pivot(index="objective", columns="metric", values="value")
    assert (wide > 0).all().all()
    tokens = BUDGET * (STUDY.prompt_tokens + STUDY.response_tokens)
    assert (wide["hours"] * 3600 * wide["tokens_per_s"]).tolist() == pytest.approx([tokens, tokens])
    assert set(rows["sample_tokens"]) == {16} and set(rows["samples_per_step"]) == {3}


def test_the_first_two_steps_do_not_count(monkeypatch):
    """Four steps that end at 10, 100, 103 and 106: two steps in 6 seconds."""
    ticks = iter([10, 100, 103, 106])
    monkeypatch.setattr(training_speed.time, "perf_counter", lambda: next(ticks))
    whole = replace(WHOLE, training=TrainingSpeed(12, 4, tokens_per_batch=32, steps=2))
    monkeypatch.setattr(training_speed, "VARIANTS", (("gate", False),))
    rows = {row["metric"]: row["value"] for row in measure_training(whole, "float32", CPU)}
    assert rows["tokens_per_s"] == pytest.approx(3 * 16 / 3)


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch):
    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training_speed, "train_gates", too_large)
    rows = pd.DataFrame(measure_training(WHOLE, "float32", CPU))
    assert len(rows) == 6 and rows["value"].isna().all() and set(rows["unit"]) == {"out of memory"}


def test_the_command_line(tmp_path, caplog):
    path = tmp_path / "smoke.yaml"
    path.write_text((PROFILES / "smoke.yaml").read_text(encoding="utf-8") + f"\nroot: {tmp_path}\n", encoding="utf-8")
    assert main(["--profile", str(path)]) == 0
    frame = pd.read_csv(tmp_path / "results" / "smoke" / "metrics" / "training_speed.csv")
    assert tuple(frame.columns) == COLUMNS and len(frame) == 6 and set(frame["layers"]) == {2}
    assert main(["--profile", "laptop"]) == 2
    assert caplog.messages[-1] == "error: profile 'laptop' has no section benchmark.model.training; give it one."
