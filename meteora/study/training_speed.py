"""How fast gates are trained on a whole model with random weights: tokens a second, peak memory, hours for a budget.

The samples are random tokens of one length. What is timed is `meteora.train_gates` itself, data and optimiser included,
in objective ``gate``, and in ``joint`` with gradient checkpointing::

    python -P -m meteora.study.training_speed --profile smollm2

writes ``results/<profile>/metrics/training_speed.csv``, one row a measurement, in the columns COLUMNS. ``metric`` is
``tokens_per_s``; ``peak_bytes``, the most that was held on the GPU at once, weights included (on a CPU: by the
process); or ``hours``, what BUDGET samples of that length would take, the paper's 1,000 of each of its 28 tasks.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from meteora import GateTrainingConfig, MeteoraConfig, train_gates
from meteora.study.artifacts import peak_bytes
from meteora.study.benchmark_measure import require_memory_error
from meteora.study.benchmark_rows import OUT_OF_MEMORY
from meteora.study.measuring import measure_to_file
from meteora.study.model_settings import TrainingSpeed, WholeModel
from meteora.study.profiles import Profile, ProfileError
from meteora.study.random_models import random_adapters, random_decoder, random_mixture

logger = logging.getLogger(__name__)

FILE = "training_speed.csv"
BUDGET = 28_000
# Objective, and whether activations are recomputed; the objective `gate` has none to recompute.
VARIANTS = (("gate", False), ("joint", True))
COLUMNS = (
    "objective", "gradient_checkpointing", "hidden_size", "layers", "adapters", "rank", "top_k", "sample_tokens",
    "samples_per_step", "tokens_per_batch", "steps", "dtype", "metric", "value", "unit", "device", "torch", "triton",
)  # fmt: skip
WARM_UP = 2  # steps: the first compiles what the others use, the second is recorded on a GPU
_UNITS = {"tokens_per_s": "tokens/s", "peak_bytes": "bytes", "hours": "h"}


class CodePoints:
    """A tokenizer for random texts: one token a character, whose id is its code point."""

    pad_token_id = eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def random_samples(names: Sequence[str], study: TrainingSpeed, vocabulary: int, seed: int = 0) -> list[dict[str, str]]:
    """As many samples of each task as the steps need; the end-of-text token is the last of a response's tokens."""
    generator = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(chr(generator.randrange(2, min(vocabulary, 0xD800))) for _ in range(tokens))  # no surrogates

    lengths = study.prompt_tokens, study.response_tokens - 1
    count = study.samples_per_step * (WARM_UP + study.steps)
    return [{"task": n, "prompt": text(lengths[0]), "response": text(lengths[1])} for n in names for _ in range(count)]


def measure_training(
    whole: WholeModel, dtype: str, device: torch.device, *, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of all VARIANTS, without the columns that say where they were measured."""
    study = whole.training
    tokens = study.prompt_tokens + study.response_tokens
    base = random_decoder(whole.shape, context=tokens, dtype=getattr(torch, dtype), device=device, seed=seed)
    adapters = random_adapters(base, whole.adapters, whole.rank, seed=seed)
    model = random_mixture(base, adapters, MeteoraConfig(top_k=whole.top_k), seed=seed)
    del adapters
    rows = random_samples(model.adapter_names, study, whole.shape.vocab_size, seed)
    found = []
    for objective, checkpointing in VARIANTS:
        setting = {
            "objective": objective, "gradient_checkpointing": checkpointing, "hidden_size": whole.shape.hidden_size,
            "layers": whole.shape.num_hidden_layers, "adapters": whole.adapters, "rank": whole.rank,
            "top_k": whole.top_k, "sample_tokens": tokens, "samples_per_step": study.samples_per_step * whole.adapters,
            "tokens_per_batch": study.tokens_per_batch, "steps": study.steps, "dtype": dtype,
        }  # fmt: skip
        config = GateTrainingConfig(
            objective=objective, gradient_checkpointing=checkpointing, max_steps=WARM_UP + study.steps, seed=seed,
            samples_per_step=study.samples_per_step, tokens_per_batch=study.tokens_per_batch, max_length=tokens,
        )  # fmt: skip
        values: dict[str, float | None] = dict.fromkeys(_UNITS)
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            train = partial(train_gates, model, rows, config, tokenizer=CodePoints())
            seconds, values["peak_bytes"] = seconds_per_step(train, device), peak_bytes(device)
            values["tokens_per_s"] = setting["samples_per_step"] * tokens / seconds
            values["hours"] = BUDGET * tokens / values["tokens_per_s"] / 3600
        except RuntimeError as error:
            require_memory_error(error)
        for metric, value in values.items():
            unit = _UNITS[metric] if value is not None else OUT_OF_MEMORY
            found.append({**setting, "metric": metric, "value": value, "unit": unit})
        logger.info("%s: %s", objective, ", ".join(f"{m} {v:.4g}" for m, v in values.items() if v is not None))
    return found


def seconds_per_step(train: Callable[[], Any], device: torch.device) -> float:
    """Mean seconds of a training's step after the first WARM_UP; a step ends where its optimiser's does."""
    ends: list[float] = []

    def note(*_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(note)
    try:
        train()
    finally:
        hook.remove()
    return (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what cannot be run."""
    return measure_to_file(
        _measure_profile, COLUMNS, arguments, module="meteora.study.training_speed", description="Time gate training.",
        profile="smollm2", file=FILE,
    )  # fmt: skip


def _measure_profile(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    whole = profile.benchmark.model
    if whole is None or whole.training is None:
        raise ProfileError(f"profile {profile.name!r} has no section benchmark.model.training; give it one.")
    return measure_training(whole, profile.benchmark.dtype, device, seed=profile.seed)


if __name__ == "__main__":
    raise SystemExit(main())
