"""Settings are checked where they are made."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from meteora import AdapterTrainingConfig, GateTrainingConfig, MeteoraConfig


def test_defaults_are_the_documented_ones():
    assert MeteoraConfig() == MeteoraConfig(top_k=None, temperature=1.0, backend="auto")
    assert GateTrainingConfig().objective == "joint"
    assert (AdapterTrainingConfig().rank, AdapterTrainingConfig().alpha) == (8, 16.0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MeteoraConfig, {"top_k": 0}, "top_k must be a whole number of at least 1, not 0"),
        (MeteoraConfig, {"top_k": 1.5}, "top_k must be a whole number"),
        (MeteoraConfig, {"top_k": True}, "top_k must be a whole number"),
        (MeteoraConfig, {"top_k": np.bool_(True)}, "top_k must be a whole number"),
        (MeteoraConfig, {"top_k": np.float32(2)}, "top_k must be a whole number"),
        (MeteoraConfig, {"temperature": True}, "temperature must be a number"),
        (MeteoraConfig, {"temperature": 0}, "temperature must be positive"),
        (MeteoraConfig, {"temperature": math.nan}, "temperature must be positive and finite"),
        (MeteoraConfig, {"temperature": "hot"}, "temperature must be a number"),
        (MeteoraConfig, {"least_share": 1}, "least_share must be a number of at least 0 and less than 1, not 1"),
        (MeteoraConfig, {"least_share": -0.1}, "least_share must be a number of at least 0"),
        (MeteoraConfig, {"least_share": math.nan}, "least_share must be a number"),
        (MeteoraConfig, {"least_share": True}, "least_share must be a number"),
        (MeteoraConfig, {"backend": "cuda"}, "unknown backend 'cuda'; choose one of auto, loop, bmm, dense, triton"),
        (GateTrainingConfig, {"objective": "both"}, "unknown objective 'both'; choose one of joint, gate"),
        (GateTrainingConfig, {"balance": "task"}, "unknown balance 'task'; choose one of token, turn"),
        (GateTrainingConfig, {"mixed_per_step": 0}, "mixed_per_step must be a whole number of at least 1, not 0"),
        (GateTrainingConfig, {"first": {"max_steps": 3}}, "first must be another GateTrainingConfig or None"),
        (GateTrainingConfig, {"epochs": math.inf}, "epochs must be"),
        (GateTrainingConfig, {"epochs": math.nan}, "epochs must be"),
        (GateTrainingConfig, {"max_steps": 0}, "max_steps must be"),
        (GateTrainingConfig, {"max_length": 1}, "max_length must be a whole number of at least 2"),
        (GateTrainingConfig, {"learning_rate": -1.0}, "learning_rate must be"),
        (GateTrainingConfig, {"learning_rate": math.inf}, "learning_rate must be"),
        (GateTrainingConfig, {"beta": math.inf}, "beta must be"),
        (GateTrainingConfig, {"warmup": 1.5}, "warmup must be a number of 0.0 to 1.0"),
        (GateTrainingConfig, {"max_grad_norm": 0}, r"max_grad_norm=0 would train nothing; give float\('inf'\)"),
        (GateTrainingConfig, {"seed": -1}, "seed must be"),
        (AdapterTrainingConfig, {"rank": 0}, "rank must be"),
        (AdapterTrainingConfig, {"alpha": 0}, "alpha must be"),
        (AdapterTrainingConfig, {"target_modules": "q_proj"}, "target_modules must list"),
        (AdapterTrainingConfig, {"target_modules": ()}, "target_modules must list"),
        (AdapterTrainingConfig, {"dtype": "int8"}, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_a_wrong_value_is_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (MeteoraConfig, ("top_k", "temperature")),
        (GateTrainingConfig, ("max_steps", "samples_per_step", "tokens_per_batch", "max_length", "mixed_per_step")),
        (AdapterTrainingConfig, ("seed", "rank", "evaluate_every")),
    ],
)
def test_numbers_of_numpy_are_kept_as_pythons(kind, settings):
    plain, given = (kind(**{name: number(2) for name in settings}) for number in (int, np.int64))
    assert plain == given and json.dumps(asdict(plain)) == json.dumps(asdict(given))
    assert MeteoraConfig(temperature=np.float32(1.5)).temperature == 1.5


def test_no_clipping_is_a_setting():
    assert GateTrainingConfig(max_grad_norm=math.inf).max_grad_norm == math.inf


def test_rates_of_numpy_are_taken_and_an_int_stays_one():
    config = GateTrainingConfig(learning_rate=np.float32(0.5), epochs=np.int64(2), beta=1)
    assert (config.learning_rate, config.epochs) == (0.5, 2.0) and type(config.beta) is int
    assert json.loads(json.dumps(asdict(config))) == asdict(config)
    with pytest.raises(ValueError, match="learning_rate must be a number"):
        GateTrainingConfig(learning_rate=np.bool_(True))
