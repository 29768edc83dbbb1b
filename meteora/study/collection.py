"""The adapters a run works with: copied from where they lie or trained, checked, and written down in one index.

The index, ``adapters.json`` in the workspace's adapters folder, says where every adapter lies and its sha256: those
of the tasks under ``tasks``, in the order the gates will have, and those used for every task under ``single``.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas
import torch

from data_prep.prepare import load_split
from meteora import AdapterTrainingConfig, MeteoraModel, train_adapters
from meteora.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_directory, file_sha256, load_adapter
from meteora.batches import by_task, encode, micro_batches
from meteora.files import atomic_directory
from meteora.study.artifacts import ArtifactError, Workspace, versions, write_json
from meteora.study.baselines import TRAINED_SINGLE
from meteora.study.examples import prepare_examples
from meteora.study.measures import Example, Row
from meteora.study.predictions import fingerprint
from meteora.study.records import sources_of
from meteora.training_loop import response_losses

logger = logging.getLogger(__name__)

INDEX = "adapters.json"
HISTORY = "adapter_training.csv"
TOKENS_AT_ONCE = 32_768  # without gradients; a task's validation examples as a rule

Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Collection:
    """Where the adapters lie.

    Attributes:
        tasks: task -> PEFT directory.
        single: name -> PEFT directory of an adapter that is used for every task, such as ``lora_b``.
        history: rows ``step,task,split,loss`` of their training: of this run's, or what whoever trained them recorded
            as ``adapter_training.csv`` in their folder.
    """

    tasks: dict[str, Path]
    single: dict[str, Path] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)


def collect_adapters(
    workspace: Workspace, base_model: torch.nn.Module, tokenizer, train: Examples, valid: Examples
) -> Collection:
    """Bring the adapters of the tasks in ``train``, LoRA-B and LoRA-F into the workspace: copied, or trained.

    The profile says where from. Training is skipped if an earlier call left what the same data, settings and code give.
    LoRA-B is trained on the union of the tasks' samples, LoRA-F on all training examples there are, large tasks
    prevailing, or on a random part of them if the training draws no more; both see in every step as many samples as all
    the tasks' adapters together.

    Args:
        base_model: to train them on; given back unchanged.

    Raises:
        AdapterError: for an adapter that is not where the profile says.
    """
    profile, history = workspace.profile, []
    if profile.adapters.path is None:
        config = profile.adapters.config(profile.seed)
        history += _train(workspace, base_model, tokenizer, train, valid, config)
        found = {task: adapter_directory(workspace.adapters, task) for task in train}
    else:
        folder = profile.adapters.path
        places = {task: adapter_directory(folder, task) for task in train}
        if "{task}" in profile.adapters.source:
            places = {task: profile.adapters.place(task) for task in train}
        found = {task: collect(task, place, workspace.adapters) for task, place in places.items()}
        recorded = folder / HISTORY
        if recorded.is_file():
            history += pandas.read_csv(recorded).to_dict("records")
    single = {}
    for name in TRAINED_SINGLE:
        settings = getattr(profile, name)
        if settings is None:
            continue
        if settings.path is not None:
            place = settings.path if settings.path.is_dir() else settings.source  # a hub id
            single[name] = collect(name, place, workspace.adapters)
            continue
        config = settings.config(profile.seed)
        per_task = (settings if profile.adapters.path else profile.adapters).config().samples_per_step
        config = replace(config, samples_per_step=len(train) * per_task)
        samples = train
        if name == "lora_f":
            folder = prepare_examples(workspace, everything=True)[0]
            samples = {task: load_split(folder, task, "train") for task in train}
        union, held_out = ([row for rows in part.values() for row in rows] for part in (samples, valid))
        if config.max_steps is not None:
            union = _drawn(union, config.max_steps * config.samples_per_step, profile.seed)
        history += _train(workspace, base_model, tokenizer, {name: union}, {name: held_out}, config)
        single[name] = adapter_directory(workspace.adapters, name)
    return Collection(found, single, history)


def _drawn(rows: list[Example], count: int, seed: int) -> list[Example]:
    """``count`` of the rows, all where there are no more: what a training does not come to need not be encoded."""
    return rows if len(rows) <= count else random.Random(seed).sample(rows, count)


def collect(name: str, source: str | Path, folder: str | Path) -> Path:
    """Copy the adapter at ``source``, a PEFT directory or hub id, into ``folder`` as it is, and return its new place.

    Raises:
        AdapterError: if it is missing or not a LoRA that can be mixed.
    """
    adapter, target = load_adapter(name, source), adapter_directory(folder, name)
    with atomic_directory(target) as directory:
        shutil.copytree(adapter.directory, directory, dirs_exist_ok=True)
    return target


def _train(
    workspace: Workspace,
    base_model: torch.nn.Module,
    tokenizer,
    train: Examples,
    valid: Examples,
    config: AdapterTrainingConfig,
) -> list[Row]:
    """Leave the adapters named in ``train`` in the workspace, and return their training's history."""
    folder = workspace.adapters
    note = folder / f"training-{fingerprint(list(train))[:8]}.json"
    recipe = fingerprint(
        {
            "model": [asdict(workspace.profile.model), workspace.profile.model.state()],
            "config": asdict(config),
            "data": [train, valid],
            "versions": versions(),
            "code": [file_sha256(path) for path in sources_of("from meteora import train_adapters")],
        }
    )
    if note.is_file():
        left = json.loads(note.read_text(encoding="utf-8"))
        if left["recipe"] == recipe and left["sha256"] == _hashes(folder, train):
            logger.info("%s were trained with the same data and settings; they are kept.", ", ".join(train))
            return left["history"]
    history = train_adapters(base_model, train, config, tokenizer=tokenizer, output_dir=folder, validation=valid)
    write_json(note, {"recipe": recipe, "sha256": _hashes(folder, train), "history": history})
    return history


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    files = {name: adapter_directory(folder, name) / WEIGHTS_FILE for name in names}
    return {name: file_sha256(file) if file.is_file() else None for name, file in files.items()}


def write_index(workspace: Workspace, collection: Collection) -> Path:
    """Write ``adapters.json``: ``{"tasks": {name: {"path", "sha256"}}, "single": {...}}``, relative to the root."""
    index = {
        group: {name: index_entry(workspace, path, load_adapter(name, path).sha256) for name, path in adapters.items()}
        for group, adapters in (("tasks", collection.tasks), ("single", collection.single))
    }
    return write_json(workspace.adapters / INDEX, index)


def index_entry(workspace: Workspace, path: Path, sha256: str) -> dict[str, str]:
    """What ``adapters.json`` says of the adapter at ``path``."""
    return {"path": os.path.relpath(path, workspace.root), "sha256": sha256}


def load_collection(workspace: Workspace) -> Collection:
    """The adapters that ``adapters.json`` names.

    Raises:
        ArtifactError: if there is no index, or an adapter is not the one it was written for.
    """
    index_path = workspace.adapters / INDEX
    if not index_path.is_file():
        raise ArtifactError(f"{index_path} is missing: run notebook 01_adapter_collection first.")
    groups: dict[str, dict[str, Path]] = {"tasks": {}, "single": {}}
    for group, entries in json.loads(index_path.read_text(encoding="utf-8")).items():
        for name, entry in entries.items():
            path = workspace.root / entry["path"]
            if _hashes(path.parent, [name])[name] != entry["sha256"]:
                raise ArtifactError(f"{path} is gone or was changed: run notebook 01_adapter_collection again.")
            groups[group][name] = path
    return Collection(**groups)


def adapter_table(adapters: Mapping[str, str | Path]) -> list[Row]:
    """What each adapter is: ``adapter, rank, alpha, modules, bytes, sha256, steps``.

    ``rank`` is a range where modules differ; ``steps`` comes from the model card, and is empty where it has none.
    """
    rows = []
    for name, source in adapters.items():
        adapter = load_adapter(name, source)
        ranks = sorted({weights.rank for weights in adapter.modules.values()})
        config = json.loads((adapter.directory / CONFIG_FILE).read_text(encoding="utf-8"))
        rows.append(
            {
                "adapter": name,
                "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}",
                "alpha": config["lora_alpha"],
                "modules": len(adapter.modules),
                "bytes": (adapter.directory / WEIGHTS_FILE).stat().st_size,
                "sha256": adapter.sha256,
                "steps": card_facts(adapter.directory).get("steps", ""),
            }
        )
    return rows


def card_facts(directory: str | Path) -> dict[str, str]:
    """The rows of the two-column tables of a model card (README.md), such as ``steps``."""
    card = Path(directory) / "README.md"
    if not card.is_file():
        return {}
    lines = (line.strip() for line in card.read_text(encoding="utf-8").splitlines())
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    return {row[0]: row[1] for row in cells if len(row) == 2 and row[0] and set(row[0]) - set("-: ")}


@torch.no_grad()
def adapter_losses(
    base_model: torch.nn.Module,
    adapters: Mapping[str, str | Path],
    examples: Examples,
    tokenizer,
    *,
    max_length: int = 1024,
) -> list[Row]:
    """Mean loss (nats per response token) of the base model and of each task's own adapter: ``task, base, adapter``.

    An adapter that is right for its task must lower it. ``base_model`` is given back unchanged.

    Raises:
        AdapterError: for an adapter that does not fit the base model.
    """
    model = MeteoraModel.from_adapters(base_model, dict(adapters))
    try:
        device = next(base_model.parameters()).device
        names = {name: n for n, name in enumerate(model.adapter_names)}
        rows = []
        texts = [row for name in names for row in examples[name]]
        for task, group in by_task(encode(texts, names, tokenizer, max_length)).items():
            tokens = sum(sample.response_tokens for sample in group)
            batches = list(micro_batches(group, TOKENS_AT_ONCE, tokenizer.pad_token_id, device))
            with model.disable_adapters():
                base = sum(response_losses(model, batch).sum().item() for batch in batches) / tokens
            with model.route_to(model.adapter_names[task]):
                own = sum(response_losses(model, batch).sum().item() for batch in batches) / tokens
            rows.append({"task": model.adapter_names[task], "base": base, "adapter": own})
        return rows
    finally:
        model.unload()
