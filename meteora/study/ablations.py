"""What notebook 06 measures: studies of variants, each of which leaves its rows by itself (`ablations.csv`).

A variant's rows are kept in ``artifacts/<profile>/ablations/<study>/<variant>.json`` and taken from there as long as the
variant, the settings of the evaluation, the data, the adapters and the gates are the same; so a run that is interrupted
goes on with the variant it was at. A change of the code alone does not discard them: ``--fresh`` does. Each row names
the device and the versions that it was produced with, and the fingerprint of all its inputs.

The studies themselves are in ``ablations_*.py``, by what they vary. Variants are compared on validation examples, which
gates and adapters were not trained on and from which the test samples are disjoint; `seeds`, and what `weights` repeats, use
the test split.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
import torch
from safetensors import safe_open

from data_prep.prepare import MANIFEST, load_split, prepared_tasks
from meteora import GateTrainingConfig, MeteoraConfig, MeteoraModel, train_gates
from meteora.adapters import file_sha256, load_adapter
from meteora.checkpoint import GATES_FILE
from meteora.files import write_tensors
from meteora.study.artifacts import Workspace, write_json
from meteora.study.baselines import Method, build_methods, share_weights
from meteora.study.benchmark_rows import WHERE, where_measured
from meteora.study.collection import INDEX
from meteora.study.evaluation import Accuracies, evaluate_independent
from meteora.study.gates import gate_accuracy, pooled_accuracy
from meteora.study.measures import Example, Row
from meteora.study.opening import Study, open_study
from meteora.study.predictions import fingerprint
from meteora.study.statistics import mean_over_tasks, paired_difference_over_tasks
from meteora.study.transcripts import gate_examples

_COMMON = (*WHERE, "fingerprint")  # what all rows of a variant have alike, besides its name
COLUMNS = (
    "study", "variant", "method", "adapters", "top_k", "temperature", "composite", "protocol", "shots", "batch",
    "tokens", "prompts", "split", "task", "adapter", "metric", "value", "low", "high", "n", "unit",
    *_COMMON,
)  # fmt: skip
_OWN = tuple(column for column in COLUMNS if column not in ("study", "variant", *_COMMON))
GATE_SAMPLES = 10  # examples of a task that the gates' accuracy is counted on


class Variant(NamedTuple):
    """One setting of a study.

    Attributes:
        settings: what decides its rows besides data, adapters and gates.
        produce: how it is run; ``None`` where this machine cannot: it is left out then, unless it was recorded elsewhere.
        timed: times are what is measured. They belong to a machine, and are kept on that one alone, unless `Ablations.take`
            was asked for those of another.
    """

    name: str
    settings: Any
    produce: Callable[[], list[Row]] | None
    timed: bool = False


class TrainedGates(NamedTuple):
    """A model whose gates were trained for a study; ``peak_bytes`` is what that took on a GPU, else ``None``."""

    model: MeteoraModel
    seconds: float
    peak_bytes: int | None


class Ablations:
    """The studies of one profile, over what notebooks 01 and 02 have left. Models are loaded when they are first needed.

    Args:
        workspace: its profile has a section ``ablations``.
    """

    def __init__(self, workspace: Workspace, *, device: torch.device) -> None:
        workspace.require("01", "02")
        self.workspace, self.device = workspace, device
        self.profile, self.settings = workspace.profile, workspace.profile.ablations
        self.folder = workspace.artifacts / "ablations"
        self._frames: dict[str, list[Row]] = {}

    def run(self, study: str, variants: Iterable[Variant]) -> pd.DataFrame:
        """The rows of all variants, produced where they are not kept; ``seconds`` are those that producing them took."""
        rows: list[Row] = []
        for variant in variants:
            rows += self.kept(study, variant) or self._produce(study, variant)
        self._frames[study] = rows
        return pd.DataFrame(rows, columns=COLUMNS)

    def kept(self, study: str, variant: Variant) -> list[Row] | None:
        """The rows of a variant that was finished with the present inputs, else ``None``; nothing is produced."""
        path, mark = self._place(study, variant)
        kept = _read(path, mark)
        if kept is None or (variant.timed and not self._holds_here(kept)):
            return None
        return _named(study, variant, kept)

    def _holds_here(self, kept: Mapping[str, Any]) -> bool:
        """Whether times are of this machine, or were taken from a record."""
        return "recorded" in kept or where_measured(self.device).items() <= kept.items()

    def _produce(self, study: str, variant: Variant) -> list[Row]:
        if variant.produce is None:
            return []
        path, mark = self._place(study, variant)
        begin = time.perf_counter()
        produced = variant.produce()
        seconds = round(time.perf_counter() - begin, 1)
        kept = {"fingerprint": mark, **where_measured(self.device), "seconds": seconds, "rows": produced}
        write_json(path, kept)
        return _named(study, variant, kept)

    def take(self, study: str, variant: Variant, recorded: pd.DataFrame) -> bool:
        """Keep a variant's rows of an `ablations.csv`, if they are of the present inputs; whether they are.

        What is kept already stays. Times may be another machine's, which the rows name.
        """
        path, mark = self._place(study, variant)
        here = (recorded["study"] == study) & (recorded["variant"] == variant.name) & (recorded["fingerprint"] == mark)
        if not here.any() or recorded.loc[here, "metric"].iloc[-1] != "seconds":  # by which a variant's rows end
            return False
        if self.kept(study, variant) is None:
            *produced, taken = (r.dropna().to_dict() for _, r in recorded.loc[here, list(_OWN)].iterrows())
            common = recorded.loc[here, list(_COMMON)].iloc[0].to_dict()
            write_json(path, {**common, "seconds": taken["value"], "rows": produced, "recorded": True})
        return True

    def _place(self, study: str, variant: Variant) -> tuple[Path, str]:
        """The file that keeps a variant's rows, and the fingerprint that it has if they are of the present inputs."""
        path = self.folder / quote(study, safe="") / f"{quote(variant.name, safe='')}.json"
        return path, fingerprint([self._inputs, variant.settings])

    def all(self) -> pd.DataFrame:
        """The rows of every study that was run, for `ablations.csv`."""
        return pd.DataFrame([r for rows in self._frames.values() for r in rows], columns=COLUMNS)

    # What the studies build on ----------------------------------------------------------------------------------------

    @cached_property
    def study(self) -> Study:
        """The models and methods of notebook 03, as far as the studies need them."""
        names = ["base", "peft", "meteora_top1", "meteora_top2"]
        names += ["lora_b"] if self.profile.lora_b is not None else []
        return open_study(self.workspace, names, device=self.device)

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that were prepared, in the profile's order."""
        return prepared_tasks(self.workspace.data)

    def examples(self, split: str, count: int | None = None) -> dict[str, list[Example]]:
        """Task -> the first examples of a split."""
        return {task: load_split(self.workspace.data, task, split)[:count] for task in self.tasks}

    @cached_property
    def valid(self) -> dict[str, list[Example]]:
        """The examples that variants are compared on."""
        return self.examples("valid", self.settings.samples)

    @cached_property
    def limits(self) -> dict[str, int]:
        """Task -> most new tokens of an answer."""
        return self.study.answer_limits(cap=self.profile.evaluation.max_new_tokens)

    @cached_property
    def composite_limits(self) -> dict[str, int]:
        """Likewise of an answer in a composite."""
        return self.study.answer_limits(cap=self.profile.composite.max_new_tokens_per_answer)

    @cached_property
    def reference(self) -> Accuracies:
        """Accuracies of the unchanged methods on the validation examples, to compare variants with sample by sample."""
        return self.answer(self.study.methods, self.valid, "reference")

    def answer(
        self, methods: Mapping[str, Method], examples: Mapping[str, Sequence[Example]], *names: str
    ) -> Accuracies:
        """Method -> task -> 1 or 0 per example; the answers are kept in a folder of these ``names``."""
        evaluation = self.profile.evaluation
        result = evaluate_independent(
            methods, examples, tokenizer=self.study.tokenizer, predictions_dir=self.answers_folder(*names),
            batch_size=evaluation.batch_size, tokens_per_batch=evaluation.tokens_per_batch,
            max_new_tokens={task: self.limits[task] for task in examples},
        )  # fmt: skip
        return result.accuracies

    def answers_folder(self, *names: str) -> Path:
        """Where answers are kept, under these names."""
        return self.workspace.predictions.joinpath("ablations", *(quote(name, safe="") for name in names))

    def model_with(self, tasks: Sequence[str]) -> MeteoraModel:
        """A model with these tasks' adapters and untrained gates, over the same base weights."""
        adapters = [load_adapter(task, self.study.adapters[task]) for task in tasks]
        return MeteoraModel(share_weights(self.study.plain), adapters, MeteoraConfig()).eval()

    def trained(
        self,
        name: str,
        model: MeteoraModel,
        config: GateTrainingConfig,
        *,
        tasks: Sequence[str] | None = None,
        prompts: int | None = None,
    ) -> TrainedGates:
        """Train the gates of ``model`` as notebook 02 does, or take those that an earlier call of that name left.

        They go on from what they are; another beginning is another training. What comes first (``config.first``) is
        trained once for all that begin alike.

        Args:
            tasks: whose examples are shown; default: those of the model's adapters.
            prompts: so many examples of each task alone, also in the contexts of several tasks.
        """
        before = None
        if config.first is not None:
            start = fingerprint([asdict(config.first), model.adapter_names, sorted(model.layers), tasks, prompts])
            before = self.trained(f"first {start[:12]}", model, config.first, tasks=tasks, prompts=prompts)
            config = replace(config, first=None)
        shown = tasks or model.adapter_names
        train = {task: load_split(self.workspace.data, task, "train")[:prompts] for task in shown}
        dataset = gate_examples(train, self.profile.data.transcripts, seed=config.seed)
        path = self.folder / "gates" / f"{quote(name, safe='')}.safetensors"
        inputs = {part: self._inputs[part] for part in ("model", "data", "adapters")}
        start = [layer.gate.weight.double().sum().item() for layer in model.layers.values()]
        facts = [asdict(config), model.adapter_names, sorted(model.layers), list(train), prompts, start]
        recipe = fingerprint([inputs, *facts])
        kept = _read_gates(path, recipe)
        if kept is not None:
            for module, layer in model.layers.items():
                layer.gate.weight.data.copy_(kept[0][module])
            model.state.untrained.clear()
            return _with_first(before, TrainedGates(model, *kept[1:]))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        train_gates(model, dataset, config, tokenizer=self.study.tokenizer)
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"recipe": recipe, "seconds": f"{seconds:.2f}", "peak_bytes": "" if peak is None else str(peak)}
        gates = {module: layer.gate.weight.detach().cpu().contiguous() for module, layer in model.layers.items()}
        new = path.with_suffix(f".{os.getpid()}.new")  # processes with a share each may be at the same gates
        write_tensors(new, gates, facts)
        new.replace(path)
        return _with_first(before, TrainedGates(model.eval(), seconds, peak))

    # Rows -------------------------------------------------------------------------------------------------------------

    def accuracy_rows(
        self, accuracies: Accuracies, *, split: str = "valid", against: str | None = "peft",
        beside: Accuracies | None = None, **setting: Any,
    ) -> list[Row]:  # fmt: skip
        """One row a method and task, and the mean over tasks (``ALL``), with intervals.

        Args:
            against: of the unchanged methods, the one whose accuracy on the same samples is subtracted in the rows with
                metric ``difference``.
            beside: the unchanged methods' accuracies, if not on the validation examples (`reference`).
        """
        rows = []
        for method, by_task in accuracies.items():
            common = {"method": method, "split": split, **setting}
            for task, values in by_task.items():
                rows.append(row("accuracy", *mean_over_tasks({task: values}), n=len(values), task=task, **common))
            rows += mean_rows(by_task, "ALL", common)
            if against is not None and by_task:
                unchanged = self.reference if beside is None else beside
                other = {task: unchanged[against][task] for task in by_task}
                difference = paired_difference_over_tasks(by_task, other)
                n = sum(map(len, by_task.values()))
                rows.append(row("difference", *difference, n=n, task="ALL", unit=f"minus {against}", **common))
        return rows

    def gate_rows(self, model: MeteoraModel, **setting: Any) -> list[Row]:
        """How often single gates, and their majority, put the right adapter first on validation examples."""
        examples = {task: self.valid[task][:GATE_SAMPLES] for task in model.adapter_names if task in self.valid}
        found = gate_accuracy(model, self.study.tokenizer, examples)
        tokens = sum(r["tokens"] for r in found.votes)
        common = {"n": tokens, "unit": "share of tokens", "split": "valid", **setting}
        return [
            row("gate_accuracy", pooled_accuracy(found.gates), **common),
            row("majority_accuracy", pooled_accuracy(found.votes), **common),
        ]

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        """Digests of what every study depends on."""
        manifest = json.loads((self.workspace.data / MANIFEST).read_text(encoding="utf-8"))
        index = json.loads((self.workspace.adapters / INDEX).read_text(encoding="utf-8"))
        evaluation = self.profile.evaluation
        return {
            "model": asdict(self.profile.model) | ({"state": state} if (state := self.profile.model.state()) else {}),
            "data": {task: facts["sha256"] for task, facts in manifest["tasks"].items()},
            "adapters": {task: entry["sha256"] for group in index.values() for task, entry in group.items()},
            "gates": file_sha256(self.workspace.gates / GATES_FILE),
            "samples": self.settings.samples,
            "max_new_tokens": evaluation.max_new_tokens,
        }


def _with_first(before: TrainedGates | None, last: TrainedGates) -> TrainedGates:
    """The last of two trainings, with the time of both and the larger peak."""
    if before is None:
        return last
    peak = None if last.peak_bytes is None else max(last.peak_bytes, before.peak_bytes or 0)
    return TrainedGates(last.model, before.seconds + last.seconds, peak)


def row(metric: str, value: float | None, low: Any = None, high: Any = None, *, n: Any = None, **setting: Any) -> Row:
    """A row of `ablations.csv` without study and variant; what is not given is empty there."""
    return {**setting, "metric": metric, "value": value, "low": low, "high": high, "n": n}


def mean_rows(by_task: Mapping[str, Sequence[float]], name: str, common: Mapping[str, Any]) -> list[Row]:
    """The mean over tasks, each counting the same, as the row of task ``name``; none without tasks."""
    if not by_task:
        return []
    return [row("accuracy", *mean_over_tasks(by_task), n=sum(map(len, by_task.values())), task=name, **common)]


def methods_of(model: MeteoraModel, *names: str) -> dict[str, Method]:
    """Methods that run on one model alone."""
    return build_methods(names, model)


def _named(study: str, variant: Variant, kept: Mapping[str, Any]) -> list[Row]:
    """A variant's rows as they stand in `ablations.csv`; the last is how long producing them took."""
    taken = row("seconds", kept["seconds"], unit="s")
    common = {"study": study, "variant": variant.name, **{name: kept[name] for name in _COMMON}}
    return [common | r for r in [*kept["rows"], taken]]


def _read(path: Path, mark: str) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if kept["fingerprint"] == mark and set(_COMMON) < set(kept) else None
    except (OSError, ValueError, KeyError):
        return None


def _read_gates(path: Path, recipe: str) -> tuple[dict[str, torch.Tensor], float, int | None] | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        if facts["recipe"] != recipe:
            return None
        gates = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return gates, float(facts["seconds"]), int(facts["peak_bytes"]) if facts["peak_bytes"] else None
