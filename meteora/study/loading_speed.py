"""How long a whole model takes to load many adapters from their directories, and in what memory.

What is timed is `MeteoraModel.from_adapters`, of files that were just written, so that no disk is waited for::

    python -P -m meteora.study.loading_speed --profile smollm2

writes ``results/<profile>/metrics/loading_speed.csv``, one row a measurement, in the columns COLUMNS. ``metric`` is
``seconds``; ``adapter_bytes``, the weights of all adapters; or ``peak_bytes``, the most main memory that was taken at once
above what the process had, on a CPU the loaded weights included. The base model's weights are of the shape that the
profile's ``benchmark.model`` has, and without values, as nothing is computed with them.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from meteora import MeteoraModel
from meteora.adapters import WEIGHTS_FILE, peft_tensors
from meteora.study.artifacts import ArtifactError
from meteora.study.measuring import measure_to_file
from meteora.study.model_settings import WholeModel
from meteora.study.profiles import Profile, ProfileError
from meteora.study.random_models import SCALING, TARGETS, random_adapters

logger = logging.getLogger(__name__)

FILE = "loading_speed.csv"
NAME = "a decoder without values"
COLUMNS = (
    "hidden_size", "layers", "adapters", "rank", "dtype", "threads", "metric", "value", "unit", "device", "torch", "triton",
)  # fmt: skip


def measure_loading(whole: WholeModel, dtype: str, device: torch.device, *, seed: int = 0) -> list[dict[str, Any]]:
    """The rows, without the columns that say where they were measured."""
    base = _empty_decoder(whole, getattr(torch, dtype), device)
    with tempfile.TemporaryDirectory() as folder:
        places = {f"adapter {n}": Path(folder, str(n)) for n in range(whole.adapters)}
        for n, place in enumerate(places.values()):
            _write(random_adapters(base, 1, whole.rank, seed=seed + n)[0].modules, whole.rank, place)
        gc.collect()
        os.sync()  # or the system would write them to the disk meanwhile
        before = _most_memory(forget=True)
        begin = time.perf_counter()
        model = MeteoraModel.from_adapters(base, places)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        peak = _most_memory() - before
    held = sum(half.nbytes for layer in model.layers.values() for half in (layer.lora_A, layer.lora_B))
    setting = {
        "hidden_size": whole.shape.hidden_size, "layers": whole.shape.num_hidden_layers, "adapters": whole.adapters,
        "rank": whole.rank, "dtype": dtype, "threads": torch.get_num_threads(),
    }  # fmt: skip
    values = {"seconds": (seconds, "s"), "adapter_bytes": (held, "bytes"), "peak_bytes": (peak, "bytes")}
    logger.info("%s", ", ".join(f"{metric} {value:.4g}" for metric, (value, _) in values.items()))
    return [{**setting, "metric": metric, "value": value, "unit": unit} for metric, (value, unit) in values.items()]


def _empty_decoder(whole: WholeModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**asdict(whole.shape)), dtype=dtype)
    model.config._name_or_path = NAME
    return model.to_empty(device=device).eval()


def _write(modules: dict, rank: int, place: Path) -> None:
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM",
        base_model_name_or_path=NAME,
    )  # fmt: skip
    config.save_pretrained(place)
    save_file(peft_tensors(modules), place / WEIGHTS_FILE, metadata={"format": "pt"})


def _most_memory(*, forget: bool = False) -> int:
    """The most main memory that the process has had at once, in bytes; with ``forget``, since now."""
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        raise ArtifactError(f"the most memory that a process had is known on Linux alone; measure there ({error}).") from error
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what cannot be run."""
    return measure_to_file(
        _measure_profile, COLUMNS, arguments, module="meteora.study.loading_speed", description="Time loading adapters.",
        profile="smollm2", file=FILE,
    )  # fmt: skip


def _measure_profile(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    if profile.benchmark.model is None:
        raise ProfileError(f"profile {profile.name!r} has no section benchmark.model; give it one.")
    return measure_loading(profile.benchmark.model, profile.benchmark.dtype, device, seed=profile.seed)


if __name__ == "__main__":
    raise SystemExit(main())
