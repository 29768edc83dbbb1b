"""What notebooks 03 and 04 start from: the models, methods and test examples that earlier notebooks have left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.base_models import load_base_model
from data_prep.prepare import load_split
from meteora import MeteoraModel
from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.baselines import (
    MERGINGS,
    TRAINED_SINGLE,
    Method,
    build_methods,
    merge_adapters,
    share_weights,
)
from meteora.study.collection import load_collection
from meteora.study.evaluation import answer_budget
from meteora.study.measures import Example


@dataclass(frozen=True)
class Study:
    """All of it over one copy of the base model's weights.

    Attributes:
        plain: the base model without anything, for comparisons with stock PEFT.
        model: the tasks' adapters and the trained gates.
        tokenizer: of all of them.
        adapters: task -> PEFT directory.
        methods: name -> how it is run.
        tests: task -> its test examples.
    """

    workspace: Workspace
    plain: torch.nn.Module
    model: MeteoraModel
    tokenizer: Any
    adapters: dict[str, Path]
    methods: dict[str, Method]
    tests: dict[str, list[Example]]

    def answer_limits(self, cap: int) -> dict[str, int]:
        """Task -> most new tokens of an answer, from its training responses (`evaluation.answer_budget`)."""
        train = {task: load_split(self.workspace.data, task, "train") for task in self.model.adapter_names}
        return {
            task: answer_budget(self.tokenizer, (row["response"] for row in rows), cap=cap)
            for task, rows in train.items()
        }


def open_study(workspace: Workspace, methods: Iterable[str], *, device: str | torch.device = "cpu") -> Study:
    """Load what notebooks 01 and 02 have left, and merge adapters for the methods that need it.

    Args:
        methods: as in `baselines.build_methods`.

    Raises:
        ArtifactError: naming the notebook that has to be run first.
    """
    workspace.require("01", "02")
    settings, names = workspace.profile.model, list(methods)
    base, tokenizer = load_base_model(
        settings.source, dtype=settings.dtype, device=device, cache_dir=workspace.profile.cache
    )
    plain, twin = share_weights(base), share_weights(base)
    model = MeteoraModel.from_pretrained(base, workspace.gates)
    collection = load_collection(workspace)
    singles = {name: path for name, path in collection.single.items() if name in names}
    for name in (name for name in names if name in TRAINED_SINGLE and name not in singles):
        raise ArtifactError(
            f"method {name!r} needs an adapter that was not collected: run notebook 01_adapter_collection again, with "
            f"profile {workspace.profile.name!r}."
        )
    for name in (name for name in names if name in MERGINGS):
        singles[name] = merge_adapters(plain, collection.tasks, name, workspace.artifacts / "merged")
    single = MeteoraModel.from_adapters(twin, singles) if singles else None
    count = workspace.profile.evaluation.test_samples
    tests = {task: load_split(workspace.data, task, "test")[:count] for task in model.adapter_names}
    return Study(
        workspace, plain, model, tokenizer, collection.tasks, build_methods(names, model, single), tests
    )
