"""What a dry run reckons is what the models really have and keep."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from meteora import MeteoraConfig
from meteora.study import estimates
from meteora.study.estimates import activation_bytes, adapter_parameters, gate_parameters, gpu_bytes, parameters
from meteora.study.model_settings import DecoderShape
from meteora.study.profiles import REPOSITORY, load_profile
from meteora.study.random_models import random_adapters, random_decoder, random_mixture

SHAPE = DecoderShape(32, 64, 3, 4, 2, 256)
CPU = torch.device("cpu")


def test_counts_are_those_of_a_real_model():
    base = random_decoder(SHAPE, context=16, dtype=torch.float32, device=CPU)
    assert parameters(SHAPE) == sum(p.numel() for p in base.parameters())
    adapters = random_adapters(base, 5, 4)
    one = sum(w.A.numel() + w.B.numel() for w in adapters[0].modules.values())
    assert adapter_parameters(SHAPE, 4) == one
    model = random_mixture(base, adapters, MeteoraConfig())
    assert gate_parameters(SHAPE, 5) == sum(layer.gate.weight.numel() for layer in model.layers.values())


def test_the_papers_models_are_as_large_as_their_names_say():
    sizes = {name: parameters(load_profile(name).model.shape) for name in ("llama3-8b", "llama2-13b")}
    assert sizes == {"llama3-8b": 8_030_261_248, "llama2-13b": 13_015_864_320}
    shape = load_profile("llama3-8b").model.shape
    assert gate_parameters(shape, 28) == pytest.approx(34.9e6, rel=0.01), "PAPER: 34.9M parameters"


def test_activations_are_what_a_real_pass_keeps(monkeypatch):
    """Counted once more on real tensors, where attention keeps a little less."""
    options = {"adapters": 3, "rank": 4, "trained": "adapters"}
    faked = estimates._kept(SHAPE, 24, **options)
    monkeypatch.setattr(estimates, "FakeTensorMode", estimates.nullcontext)
    assert faked == pytest.approx(estimates._kept(SHAPE, 24, **options), rel=0.1)


@pytest.mark.parametrize("trained", ["adapters", "gates"])
def test_activations_grow_with_blocks_and_tokens_and_checkpointing_saves_them(trained):
    def kept(layers=3, tokens=64, **options):
        shape = replace(SHAPE, num_hidden_layers=layers)
        return activation_bytes(shape, tokens, adapters=3, rank=4, trained=trained, **options)

    assert kept(6) - kept(3) == 3 * (kept(4) - kept(3))
    assert kept(tokens=128) == pytest.approx(2 * kept(), rel=0.1)
    assert kept(30, checkpointing=True) < kept(30) / 5


@pytest.mark.parametrize("name", ["llama3-8b", "llama2-13b"])
def test_every_phase_of_the_papers_profiles_fits_the_gpu_that_they_name(name):
    profile = load_profile(name)
    found = gpu_bytes(profile)
    assert {"training adapters", "training LoRA-B", "training gates", "answering"} <= set(found)
    assert max(found.values()) < 0.8 * profile.needs.gpu_memory_gb * 1e9
    weights = 2 * parameters(profile.model.shape)
    assert min(found.values()) > weights
    gate = replace(profile, gates=profile.gates | {"objective": "gate", "first": None})
    assert profile.gate_config().gradient_checkpointing
    joint = replace(profile, gates=profile.gates | {"gradient_checkpointing": False})
    phases = [gpu_bytes(p)["training gates"] for p in (gate, profile, joint)]
    assert phases == sorted(phases) and phases[0] < phases[2]
    other = replace(profile, gates=gate.gates | {"first": {**profile.gates, "first": None}})
    assert gpu_bytes(other)["training gates"] == phases[1], "the stage that takes most"


@pytest.mark.parametrize("name, least_measured", [("llama3-8b", 10), ("llama2-13b", 5)])
def test_what_was_measured_is_what_is_reckoned(name, least_measured):
    """On a GPU, at full size, with random weights: `meteora.study.batch_sizes`."""
    profile = load_profile(name)
    rows = pd.read_csv(REPOSITORY / "results" / name / "metrics" / "batch_sizes.csv")
    peaks = rows[rows["metric"] == "peak_bytes"].dropna(subset="value").groupby(["phase", "batch"])["value"].first()
    assert len(peaks) >= least_measured

    def with_batch(phase, batch):
        if phase == "answering":
            return replace(profile, evaluation=replace(profile.evaluation, batch_size=batch))
        if phase == "answering composites":
            return replace(profile, composite=replace(profile.composite, batch_size=batch))
        if phase.startswith("training gates"):
            one = {"objective": phase.partition(", ")[2], "first": None, "tokens_per_batch": batch}
            return replace(profile, gates=profile.gates | one)
        name = {"training adapters": "adapters", "training LoRA-B": "lora_b"}[phase]
        settings = getattr(profile, name)
        return replace(profile, **{name: replace(settings, training=settings.training | {"tokens_per_batch": batch})})

    for (phase, batch), measured in peaks.items():
        reckoned = gpu_bytes(with_batch(phase, batch))[phase.partition(",")[0]]
        least = 0.55 if phase.startswith("training gates") else 0.9  # of their tokens few are a response's
        assert least * reckoned < measured < 1.06 * reckoned, f"{phase}, {batch}"


def test_a_profile_without_a_shape_is_not_reckoned():
    assert gpu_bytes(load_profile("laptop")) == {}


@pytest.mark.parametrize("said", [None, "max_split_size_mb:128"])
def test_memory_may_grow_in_place_unless_somebody_said_otherwise(said):
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_CUDA_ALLOC_CONF"}
    environment |= {} if said is None else {"PYTORCH_CUDA_ALLOC_CONF": said}
    code = "import os, meteora.study; print(os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (said or "expandable_segments:True")
