"""Which batches of a profile fit its GPU, and how fast each is: every phase of a run on random weights of the model's shape.

Of each phase the profile's batch is tried, then twice as many, and so on up to LARGEST times, until memory ends; where
the profile's own does not fit, half as many, and so on. A GPU with more memory than the profile's ``needs`` name has as
much as they say. Texts are random tokens, as long as the longest that the tasks have where they are answered::

    python -P -m meteora.study.batch_sizes --profile llama3-8b

writes ``results/<profile>/metrics/batch_sizes.csv``, one row a measurement, in the columns COLUMNS. ``batch`` counts
tokens where something is trained (``tokens_per_batch``), and texts where prompts are answered (``batch_size``).
``metric`` is ``tokens_per_s``, of which those of a prompt count like an answer's; or ``peak_bytes``, the most that was held
on the GPU at once, weights included (on a CPU: by the process).
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from meteora import MeteoraConfig, MeteoraModel, train_adapters, train_gates
from meteora.config import AdapterTrainingConfig, GateTrainingConfig, TrainingConfig
from meteora.study.artifacts import peak_bytes
from meteora.study.benchmark_measure import require_memory_error
from meteora.study.benchmark_rows import OUT_OF_MEMORY
from meteora.study.decoding import TranscriptBatch
from meteora.study.estimates import answered_texts
from meteora.study.measuring import measure_to_file
from meteora.study.model_settings import TrainingSpeed
from meteora.study.profiles import Profile, ProfileError
from meteora.study.random_models import random_adapters, random_decoder, random_mixture
from meteora.study.training_speed import WARM_UP, CodePoints, random_samples, seconds_per_step

logger = logging.getLogger(__name__)

FILE = "batch_sizes.csv"
COLUMNS = (
    "phase", "batch", "unit_of_batch", "text_tokens", "metric", "value", "unit", "limit_bytes", "dtype", "device", "torch",
    "triton",
)  # fmt: skip
LARGEST = 8  # times the profile's batch
NEW_TOKENS = 64  # of an answer; the rest of the text counts as prompt
STEPS = 2  # of a training, that are timed
WORTH = 1.05  # times the speed, below which a larger batch is not worth its memory
IDLE = 0.03  # of a step's batches, the share that may be pads
_UNITS = {"tokens_per_s": "tokens/s", "peak_bytes": "bytes"}


class Phase(NamedTuple):
    """A part of a run whose memory a batch decides.

    Attributes:
        name: as in a dry run, with the objective of a training of gates behind it.
        batch: the profile's, in ``unit``.
        text_tokens: of each text.
        speed: given a batch, runs the phase and returns tokens a second.
    """

    name: str
    batch: int
    unit: str
    text_tokens: int
    speed: Callable[[int], float]


def measure_batches(profile: Profile, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows as they are measured, without the columns that say where.

    Raises:
        ProfileError: for a profile that does not say its model's shape.
    """
    if profile.model.shape is None:
        raise ProfileError(f"profile {profile.name!r} does not say its model's shape; give it one under model.shape.")
    with _limited(profile, device) as limit:
        yield from _measured(profile, device, limit)


def _measured(profile: Profile, device: torch.device, limit: int | None) -> Iterator[dict[str, Any]]:
    for phase in _phases(profile, device):
        common = {
            "phase": phase.name, "unit_of_batch": phase.unit, "text_tokens": phase.text_tokens, "limit_bytes": limit,
            "dtype": profile.model.dtype,
        }  # fmt: skip
        found: dict[int, float] = {}
        for batch in _batches(phase, found):
            values = _measure(phase, batch, device)
            if values["tokens_per_s"] is not None:
                found[batch] = values["tokens_per_s"]
            for metric, value in values.items():
                unit = _UNITS[metric] if value is not None else OUT_OF_MEMORY
                yield {**common, "batch": batch, "metric": metric, "value": value, "unit": unit}
            logger.info("%s, %d %s: %s", phase.name, batch, phase.unit, _in_words(values))
        logger.info("%s: %s", phase.name, advice(found))


def advice(found: dict[int, float]) -> str:
    """Which batch to take: the smallest that is about as fast as any that fits."""
    if not found:
        return "no batch fits"
    return f"take {min(batch for batch, speed in found.items() if speed * WORTH >= max(found.values()))}"


def _batches(phase: Phase, found: dict[int, float]) -> Iterator[int]:
    """The batches to try, given those that did fit so far; of tokens none that is smaller than a text."""
    own = batch = phase.batch
    least = phase.text_tokens if phase.unit == "tokens" else 1
    while True:
        yield batch
        if batch in found and batch >= own and batch < LARGEST * own:
            batch *= 2
        elif batch not in found and batch <= own and batch // 2 >= least:
            batch //= 2
        else:
            return


@contextmanager
def _limited(profile: Profile, device: torch.device) -> Iterator[int | None]:
    """Inside, the process has no more than the profile needs; that, in bytes."""
    if device.type != "cuda":
        yield None
        return
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    limit = min(int(profile.needs.gpu_memory_gb * 1e9) or total, total)
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        yield limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _measure(phase: Phase, batch: int, device: torch.device) -> dict[str, float | None]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return {"tokens_per_s": phase.speed(batch), "peak_bytes": peak_bytes(device)}
    except RuntimeError as error:
        require_memory_error(error)
        return {"tokens_per_s": None, "peak_bytes": None}


def _in_words(values: dict[str, float | None]) -> str:
    if values["tokens_per_s"] is None:
        return OUT_OF_MEMORY
    return f"{values['tokens_per_s']:,.0f} tokens/s, {values['peak_bytes'] / 1e9:.1f} GB"


def _phases(profile: Profile, device: torch.device) -> Iterator[Phase]:
    """In the order of a run. The model is the base alone first, then the mixture.

    A training that is like the one before it, as LoRA-F's usually is, is not measured again.
    """
    texts, dtype = answered_texts(profile), getattr(torch, profile.model.dtype)
    context = max(tokens for _, tokens in texts.values())
    base = random_decoder(profile.model.shape, context=context, dtype=dtype, device=device, seed=profile.seed)
    trainings = (("adapters", profile.adapters, len(profile.tasks)), ("LoRA-B", profile.lora_b, 1))
    before: list[Any] = []
    for name, settings, count in (*trainings, ("LoRA-F", profile.lora_f, 1)):
        if settings is not None and settings.path is None and (settings.config(), count) not in before:
            before.append((settings.config(), count))
            yield _adapter_training(f"training {name}", base, settings.config(profile.seed), count, device)
    adapters = random_adapters(base, len(profile.tasks), profile.adapters.rank, seed=profile.seed)
    model = random_mixture(base, adapters, MeteoraConfig(), seed=profile.seed)
    del adapters
    stages = profile.gate_config().stages()
    for n, config in enumerate(stages):
        alike = [stage.objective for stage in stages].count(config.objective) > 1
        name = f"training gates, {config.objective}" + (f", stage {n + 1}" if alike else "")
        yield _gate_training(name, model, config, device)
    for name, (batch, tokens) in texts.items():
        yield _answering(name, model, batch, tokens, device)


def _samples_per_step(config: TrainingConfig, tasks: int, tokens: int, batch: int) -> int:
    """As many samples of each task that a step has a full batch or more, and the last one few pads.

    Recorded batches have the full length or half of it: see `meteora.packed_batches`.
    """
    least = max(config.samples_per_step, math.ceil(batch / (tasks * tokens)))
    half = max(1, batch // 2)

    def idle(samples: int) -> float:
        own = samples * tasks * tokens
        return 1 - own / (math.ceil(own / half) * half)

    tried = range(least, least + 16)
    return next((samples for samples in tried if idle(samples) <= IDLE), min(tried, key=idle))


def _text(config: TrainingConfig) -> tuple[int, int]:
    """Tokens of a sample's prompt and response; most of the tasks' are no longer."""
    tokens = min(256, config.max_length)
    return tokens - tokens // 8, tokens // 8


def _training(config: TrainingConfig, tasks: Sequence[str], batch: int, base: torch.nn.Module) -> tuple[Any, list[dict]]:
    """The training with that batch, cut to a few steps, and rows for it."""
    lengths = _text(config)
    samples = _samples_per_step(config, len(tasks), sum(lengths), batch)
    steps = replace(config, max_steps=WARM_UP + STEPS, samples_per_step=samples, tokens_per_batch=batch)
    study = TrainingSpeed(*lengths, samples_per_step=samples, steps=STEPS)
    return steps, random_samples(tasks, study, base.config.vocab_size, config.seed)


def _adapter_training(
    name: str, base: torch.nn.Module, config: AdapterTrainingConfig, count: int, device: torch.device
) -> Phase:
    tasks, length = [f"task {n}" for n in range(count)], sum(_text(config))

    def speed(batch: int) -> float:
        steps, rows = _training(config, tasks, batch, base)
        data = {task: [row for row in rows if row["task"] == task] for task in tasks}
        held_out = {task: examples[:1] for task, examples in data.items()}  # so that the best so far are kept, too

        def train() -> None:
            with tempfile.TemporaryDirectory() as folder:
                train_adapters(base, data, steps, tokenizer=CodePoints(), output_dir=folder, validation=held_out)

        return steps.samples_per_step * count * length / seconds_per_step(train, device)

    return Phase(name, config.tokens_per_batch, "tokens", length, speed)


def _gate_training(name: str, model: MeteoraModel, config: GateTrainingConfig, device: torch.device) -> Phase:
    tasks, config = model.adapter_names, replace(config, first=None, mixed_per_step=None)
    length = sum(_text(config))

    def speed(batch: int) -> float:
        steps, rows = _training(config, tasks, batch, model.base_model)
        seconds = seconds_per_step(lambda: train_gates(model, rows, steps, tokenizer=CodePoints()), device)
        return steps.samples_per_step * len(tasks) * length / seconds

    return Phase(name, config.tokens_per_batch, "tokens", length, speed)


def _answering(name: str, model: MeteoraModel, own: int, tokens: int, device: torch.device) -> Phase:
    """``tokens`` of each text, of which the last NEW_TOKENS are the model's."""
    new = min(NEW_TOKENS, tokens // 2)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.base_model.config.vocab_size

    def answer(batch: int, prompt: int, steps: int) -> None:
        # Random texts would end by chance: no token is the one that ends them.
        transcripts = TranscriptBatch(model, batch, pad_token_id=1, eos_token_id=-1)
        transcripts.extend(torch.randint(2, vocabulary, (batch, prompt), generator=generator).tolist())
        transcripts.decode([steps] * batch, last=True)

    def speed(batch: int) -> float:
        answer(batch, min(128, tokens - new), min(8, new))  # compiles what the others use,
        answer(1, tokens - new, 2)  # and kernels for many tokens
        begin = time.perf_counter()
        answer(batch, tokens - new, new)
        return batch * tokens / (time.perf_counter() - begin)

    return Phase(name, own, "texts", tokens, speed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what cannot be run."""
    return measure_to_file(
        measure_batches, COLUMNS, arguments, module="meteora.study.batch_sizes", description="Try a profile's batches.",
        profile="llama3-8b", file=FILE,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
