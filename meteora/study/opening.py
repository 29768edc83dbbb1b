"""What notebooks 03 and 04 start from: the models, methods and test examples that earlier notebooks have left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.base_models import load_base_model
from data_prep.prepare import load_split
from meteora import MeteoraModel
from meteora.study.arrow import arrow_method
from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.baselines import TRAINED_SINGLE, Method, build_methods, share_weights
from meteora.study.collection import load_collection
from meteora.study.evaluation import answer_budget
from meteora.study.lorahub import compose_adapters, lorahub_method
from meteora.study.measures import Example
from meteora.study.merging import MERGINGS, merge_adapters
from meteora.study.transcripts import gate_examples
from meteora.study.xlora import xlora_method


OTHERS = ("arrow", "xlora", "lorahub")  # methods that are no states of a `MeteoraModel` with gates or one adapter


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
    """Load what notebooks 01 and 02 have left, and make what the methods need besides: merged adapters, a classifier.

    Args:
        methods: of `profiles.METHODS`. What `xlora` and `lorahub` have to find out first is kept in the workspace.

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
    seed, merged = workspace.profile.seed, workspace.artifacts / "merged"
    mergings = {name: merging for name, merging in MERGINGS.items() if name in names}
    singles |= merge_adapters(plain, collection.tasks, mergings, merged, seed=seed)
    single = MeteoraModel.from_adapters(twin, singles) if singles else None
    others = _others(names, workspace, plain, model, tokenizer, collection.tasks)
    count = workspace.profile.evaluation.test_samples
    tests = {task: load_split(workspace.data, task, "test")[:count] for task in model.adapter_names}
    built = build_methods(names, model, single, others=others)
    return Study(workspace, plain, model, tokenizer, collection.tasks, built, tests)


def _others(
    names: Iterable[str], workspace: Workspace, plain: torch.nn.Module, model: MeteoraModel, tokenizer,
    adapters: Mapping[str, Path],
) -> dict[str, Method]:  # fmt: skip
    """Those of the methods that are of `OTHERS`."""
    profile, found = workspace.profile, {}
    names = [name for name in names if name in OTHERS]
    if not names:
        return found
    train = {task: load_split(workspace.data, task, "train") for task in adapters}
    if "arrow" in names:
        found["arrow"] = arrow_method(plain, adapters, seed=profile.seed)
    if "lorahub" in names:
        composed = compose_adapters(
            plain, adapters, {task: rows[: profile.lorahub.examples] for task, rows in train.items()},
            tokenizer=tokenizer, output_dir=workspace.artifacts / "merged" / "lorahub",
            evaluations=profile.lorahub.evaluations, max_length=profile.adapters.config().max_length,
            seed=profile.seed,
        )  # fmt: skip
        found["lorahub"] = lorahub_method(plain, composed)
    if "xlora" in names:
        found["xlora"] = xlora_method(
            model, gate_examples(train, profile.data.transcripts, seed=profile.seed), profile.xlora_config(),
            tokenizer=tokenizer, output_dir=workspace.artifacts / "xlora",
        )  # fmt: skip
    return found
