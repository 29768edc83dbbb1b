"""The strategies over the tasks' real prompts: the paper's Figure 5, in plain time.

A task's first test prompts run one at a time, each as a call of its own with all its tokens, through one linear layer
of each size. What is real is the number of prompts and of the tokens in each; the tokens' values are random and the
layer's weights too, as the time depends on neither. Which adapters the tokens choose does matter, and there are two
extremes: ``uniform`` (each token its own) and ``runs`` (a prompt's tokens all the same, the task's own adapter first,
as good gates do it). The clock is the wall's, from the first prompt's start to the last one's result, the CPU's work
included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.base_models import SMOLLM2_NAME, TINY_NAME, load_base_model, smollm2_directory
from data_prep.prepare import MANIFEST, load_split
from meteora.batches import token_ids
from meteora.study.artifacts import Workspace, write_json
from meteora.study.benchmark_layer import (
    Cell,
    Layer,
    Operands,
    check,
    expect,
    make_input,
    make_layer,
    make_logits,
    strategies,
    update,
)
from meteora.study.benchmark_rows import RowFile, make_row
from meteora.study.profiles import BenchmarkSettings, PromptStudy
from meteora.study.timing import quantiles


def prompt_lengths(workspace: Workspace) -> dict[str, list[int]]:
    """Task -> the number of tokens of each of its first test prompts, as many as the profile says.

    Counted in the data of notebook 01 with the model's tokenizer, and kept in
    ``artifacts/<profile>/prompt_lengths.json`` for machines that have neither.

    Raises:
        ArtifactError: if there is neither the data nor that file.
    """
    profile = workspace.profile
    path = workspace.artifacts / "prompt_lengths.json"
    # What decides the numbers; a file of other settings is not taken.
    made_of = {"model": profile.model.source, "tasks": list(profile.tasks), "seed": profile.seed}
    made_of |= {"test": profile.data.test, "max_characters": profile.data.max_characters}
    made_of["prompts"] = profile.benchmark.tasks.prompts
    manifest = workspace.data / MANIFEST
    if not manifest.is_file():
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if stored.get("made_of") == made_of:
            return stored["lengths"]
        workspace.require("01")
    tokenizer, lengths = _tokenizer(workspace), {}
    for task in json.loads(manifest.read_text(encoding="utf-8"))["tasks"]:
        prompts = [row["prompt"] for row in load_split(workspace.data, task, "test")[: made_of["prompts"]]]
        lengths[task] = list(map(len, token_ids(tokenizer, prompts)))
    write_json(path, {"made_of": made_of, "lengths": lengths})
    return lengths


def _tokenizer(workspace: Workspace) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, without loading a large model for it."""
    source = workspace.profile.model.source
    if source == TINY_NAME:
        return load_base_model(source)[1]
    location = smollm2_directory(workspace.profile.cache) if source == SMOLLM2_NAME else source
    return AutoTokenizer.from_pretrained(location)


def measure_tasks(
    settings: BenchmarkSettings,
    lengths: dict[str, list[int]],
    file: RowFile,
    device: torch.device,
    *,
    seed: int,
    go_on: Callable[[], None],
    progress: bool,
) -> None:
    """Level ``tasks``: metric ``time_us`` of every strategy for every task, layer size and routing that ``file`` lacks.

    A row's ``tokens`` are those of the task's prompts together; there are as many adapters as tasks.
    """
    study = settings.tasks
    done = file.keys("workload", "routing", "in_features", "out_features")
    for size, routing in tqdm(list(product(study.sizes, study.routings)), desc="tasks", disable=not progress):
        if ("tasks", routing, *size) not in done:
            go_on()
            file.append(_measure_size(study, settings, lengths, size, routing, device, seed))


@torch.inference_mode()
def _measure_size(
    study: PromptStudy,
    settings: BenchmarkSettings,
    lengths: dict[str, list[int]],
    size: tuple[int, int],
    routing: str,
    device: torch.device,
    seed: int,
) -> list[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(seed)
    longest, k = max(map(max, lengths.values())), min(study.top_k, len(lengths))
    cell = Cell(longest, len(lengths), study.rank, k, *size, settings.dtype, routing)
    layer = make_layer(cell, generator)
    y = torch.zeros(longest, size[1], dtype=layer.W.dtype, device=device)
    rows = []
    for number, (task, counts) in enumerate(lengths.items()):
        logits = make_logits(cell, generator, one_run=True)
        if routing == "runs":
            logits = logits.roll(number - int(logits[0].argmax()), dims=1)
        x = make_input(layer, logits, generator)
        for name in strategies(settings.backends):
            if number == 0:
                _check(cell, layer, x, y, name)
            times = [_seconds(update(name, k, device), layer, x, y, counts, device) for _ in range(1 + study.repeats)]
            setting = {
                "workload": "tasks", "backend": name, "mode": "forward", "launch": "eager", "routing": routing,
                "batch": 1, "tokens": sum(counts), "adapters": len(lengths), "rank": study.rank, "top_k": k,
                "in_features": size[0], "out_features": size[1], "dtype": settings.dtype,
            }  # fmt: skip
            # The first pass compiles and loads what a length needs.
            rows.append(make_row(setting, "time_us", quantiles([1e6 * t for t in times[1:]])))
    return rows


def _check(cell: Cell, layer: Layer, x: Tensor, y: Tensor, name: str) -> None:
    o = Operands(layer, x, y, torch.randn_like(y))
    check(cell, o, name, "forward", expect(cell, o, name, "forward"))


def _seconds(
    call: Callable[[Layer, Tensor, Tensor], Tensor],
    layer: Layer,
    x: Tensor,
    y: Tensor,
    counts: Sequence[int],
    device: torch.device,
) -> float:
    """One pass over the prompts, each as long as one of ``counts``, a prompt's result being there before the next."""
    begin = time.perf_counter()
    for tokens in counts:
        call(layer, x[:tokens], y[:tokens])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - begin
