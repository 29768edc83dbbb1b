"""Which batches fit: it runs what a run runs, as far as memory goes."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from meteora.study import batch_sizes, estimates
from meteora.study.batch_sizes import COLUMNS, advice, main, measure_batches
from meteora.study.profiles import PROFILES, ProfileError, load_profile

CPU = torch.device("cpu")
PHASES = ["training adapters", "training LoRA-B", "training gates, gate", "training gates, joint"]
PHASES += ["answering", "answering composites"]


@pytest.fixture
def profile(monkeypatch):
    """Profile smoke with a shape, and short texts."""
    monkeypatch.setattr(estimates, "INDEPENDENT_PROMPT", 30)
    monkeypatch.setattr(estimates, "COMPOSITE_PROMPT", 40)
    monkeypatch.setattr(batch_sizes, "LARGEST", 2)
    found = load_profile("smoke")
    gates = found.gates | {"objective": "joint", "gradient_checkpointing": True, "first": {"objective": "gate"}}
    short = {"max_length": 32, "tokens_per_batch": 64}
    trained = (found.adapters, found.lora_b, found.lora_f)
    adapters, lora_b, lora_f = (replace(one, training=one.training | short) for one in trained)
    model = replace(found.model, shape=found.benchmark.model.shape)
    return replace(found, model=model, gates=gates | short, adapters=adapters, lora_b=lora_b, lora_f=lora_f)


def measured(profile):
    return pd.DataFrame(measure_batches(profile, CPU))


def test_every_phase_is_measured_at_its_own_batch_and_a_larger_one(profile, monkeypatch):
    trained, answered = [], []
    for name in ("train_adapters", "train_gates"):

        def watched(*arguments, real=getattr(batch_sizes, name), name=name, **options):
            config = arguments[2]
            trained.append((name, config.tokens_per_batch, config.rank if name == "train_adapters" else config.objective))
            return real(*arguments, **options)

        monkeypatch.setattr(batch_sizes, name, watched)

    class Watched(batch_sizes.TranscriptBatch):
        def extend(self, segments):
            answered.append((len(segments), len(segments[0])))
            super().extend(segments)

    monkeypatch.setattr(batch_sizes, "TranscriptBatch", Watched)
    rows = measured(profile)
    assert list(rows["phase"].unique()) == PHASES
    assert [entry[2] for entry in trained[-4:]] == ["gate", "gate", "joint", "joint"]
    values = rows.pivot(index=["phase", "batch"], columns="metric", values="value")
    assert set(values) == {"tokens_per_s", "peak_bytes"} and (values > 0).all().all()
    for phase, batches in rows.groupby("phase")["batch"]:
        own, twice = sorted(batches.unique())
        assert twice == 2 * own
    own = profile.adapters.config().tokens_per_batch
    rank = profile.adapters.rank
    assert [entry for entry in trained if entry[0] == "train_adapters"][:2] == [
        ("train_adapters", own, rank), ("train_adapters", 2 * own, rank),
    ]  # fmt: skip
    texts = rows.drop_duplicates("phase").set_index("phase")["text_tokens"]
    assert texts["answering"] == 30 + profile.evaluation.max_new_tokens
    assert texts["answering composites"] == 40 + profile.composite.max_new_tokens_per_answer * max(profile.composite.sizes)
    for phase, settings in (("answering", profile.evaluation), ("answering composites", profile.composite)):
        prompt = texts[phase] - min(batch_sizes.NEW_TOKENS, texts[phase] // 2)
        assert {(settings.batch_size, prompt), (2 * settings.batch_size, prompt)} < set(answered)


def test_a_training_like_the_one_before_is_not_measured_again(profile):
    other = replace(profile, lora_f=replace(profile.lora_f, training=profile.lora_f.training | {"tokens_per_batch": 128}))
    names = [phase.name for phase in batch_sizes._phases(other, CPU)]
    assert names == [*PHASES[:2], "training LoRA-F", *PHASES[2:]]
    assert [phase.name for phase in batch_sizes._phases(profile, CPU)] == PHASES


def test_trainings_of_one_objective_have_names_of_their_own(profile):
    gates = profile.gates | {"objective": "gate", "gradient_checkpointing": False}
    names = [phase.name for phase in batch_sizes._phases(replace(profile, gates=gates), CPU)]
    assert names == [*PHASES[:2], "training gates, gate, stage 1", "training gates, gate, stage 2", *PHASES[4:]]


def test_a_step_has_a_full_batch_of_every_task(profile, monkeypatch):
    config = replace(profile.adapters.config(), samples_per_step=1, max_length=64)
    tasks = ["a", "b", "c"]
    base = torch.nn.Module()
    base.config = type("Config", (), {"vocab_size": 300})
    steps, samples = batch_sizes._training(config, tasks, 1000, base)
    each = steps.samples_per_step
    full = 1000 / 2  # half a batch
    rows = each * len(tasks) * 64 / full
    assert rows >= 2 and -rows % 1 <= 0.03 * rows, "whole and half batches"
    assert steps.tokens_per_batch == 1000 and steps.max_steps == 4
    counts = pd.Series([row["task"] for row in samples]).value_counts()
    assert set(counts) == {each * 4}, "each sample is seen once"
    monkeypatch.setattr(batch_sizes, "seconds_per_step", lambda train, device: 2.0)
    assert batch_sizes._adapter_training("three", base, config, 3, CPU).speed(1000) == each * 3 * 64 / 2


def test_more_is_tried_until_memory_ends_and_less_where_the_own_batch_does_not_fit(profile, monkeypatch):
    def fitting(most):
        def run(*arguments):
            config = arguments[2]
            if config.tokens_per_batch > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            for _ in range(config.max_steps):
                optimiser.step()

        return lambda *arguments, **options: run(*arguments)

    monkeypatch.setattr(batch_sizes, "LARGEST", 8)
    own = profile.adapters.config().tokens_per_batch

    def tried(most):
        monkeypatch.setattr(batch_sizes, "train_adapters", fitting(most))
        rows = next(rows for phase, rows in pd.DataFrame(_first(profile)).groupby("phase"))
        assert (rows["value"].isna() == (rows["unit"] == "out of memory")).all()
        peaks = rows[rows["metric"] == "peak_bytes"]
        return dict(zip(peaks["batch"], peaks["value"].notna(), strict=True))

    assert tried(3 * own) == {own: True, 2 * own: True, 4 * own: False}
    assert tried(own // 2) == {own: False, own // 2: True}
    assert tried(1) == {own: False, own // 2: False}, "no smaller than a text"
    assert tried(100 * own) == {own: True, 2 * own: True, 4 * own: True, 8 * own: True}


def _first(profile):
    """The rows of the first phase."""
    rows = []
    for row in measure_batches(profile, CPU):
        if rows and row["phase"] != rows[0]["phase"]:
            return rows
        rows.append(row)
    return rows


def test_what_to_take():
    assert advice({}) == "no batch fits"
    assert advice({8: 100.0, 16: 150.0, 32: 155.0}) == "take 16"
    assert advice({8: 100.0, 16: 150.0, 32: 170.0}) == "take 32"
    assert advice({8: 100.0, 16: 90.0}) == "take 8"


def test_a_profile_without_a_shape_is_refused():
    with pytest.raises(ProfileError, match="profile 'smoke' does not say its model's shape"):
        next(measure_batches(load_profile("smoke"), CPU))


def test_the_command_line(tmp_path, caplog, profile):
    caplog.set_level("INFO")
    root = f"\nroot: {tmp_path}\n"
    text = (PROFILES / "smoke.yaml").read_text(encoding="utf-8")
    path = tmp_path / "smoke.yaml"
    path.write_text(text + root, encoding="utf-8")
    assert main(["--profile", str(path)]) == 2
    assert "does not say its model's shape" in caplog.messages[-1]
    shape = ", ".join(f"{k}: {v}" for k, v in vars(profile.model.shape).items())
    text = text.replace("learning_rate: 0.01", "learning_rate: 0.01, max_length: 32, tokens_per_batch: 64")
    text = text.replace("device: cpu}", f"device: cpu, shape: {{{shape}}}}}")
    path.write_text(text + root, encoding="utf-8")
    assert main(["--profile", str(path)]) == 0
    frame = pd.read_csv(tmp_path / "results" / "smoke" / "metrics" / "batch_sizes.csv")
    assert tuple(frame.columns) == COLUMNS and set(frame["metric"]) == {"tokens_per_s", "peak_bytes"}
    assert any(message.startswith("answering: take ") for message in caplog.messages)
