"""What a saved model is: gates, settings and adapters in one directory, with a model card, here or on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from meteora.adapters import (
    CONFIG_FILE, WEIGHTS_FILE, Adapter, AdapterError, file_sha256, load_adapter, peft_tensors,
)  # fmt: skip
from meteora.config import MeteoraConfig
from meteora.files import write_tensors
from meteora.hub import HUB_ERRORS, absence

if TYPE_CHECKING:
    from meteora.model import MeteoraModel

MODEL_FILE = "meteora_config.json"
GATES_FILE = "gates.safetensors"
CARD_FILE = "README.md"
ADAPTERS_FOLDER = "adapters"
CHECKPOINT_PARTS = (MODEL_FILE, GATES_FILE, CARD_FILE, ADAPTERS_FOLDER)
ADAPTER_PARTS = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
FORMAT = 2


def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint: ``source`` itself, or the hub repository of that id, downloaded.

    Raises:
        AdapterError: if there is neither, or the hub does not give it.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    files = [MODEL_FILE, GATES_FILE, *(f"{ADAPTERS_FOLDER}/*/{file}" for file in (CONFIG_FILE, WEIGHTS_FILE))]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=files))
    except (*HUB_ERRORS, HFValidationError) as error:
        raise AdapterError(absence(source, error)) from error


def read_settings(directory: Path) -> dict:
    """The settings of the checkpoint in ``directory``: ``config``, ``adapters`` in the gates' order, ``untrained``.

    Raises:
        AdapterError: if the checkpoint is incomplete, unreadable, or of another format.
    """
    for file in (MODEL_FILE, GATES_FILE):
        if not (directory / file).is_file():
            raise AdapterError(f"{directory} has no {file}; it is not a directory that save_pretrained wrote.")
    try:
        saved = json.loads((directory / MODEL_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{directory / MODEL_FILE} is not valid JSON ({error}).") from error
    version = saved.get("format") if isinstance(saved, dict) else None
    if version == 1:  # said only whether there was something to warn of
        names = [entry.get("name") for entry in saved.get("adapters") or [] if isinstance(entry, dict)]
        saved["untrained"] = names if saved.pop("warning", None) else []
    elif version != FORMAT:
        raise AdapterError(f"{directory} has format {version!r}; this version reads format {FORMAT}.")
    _check_settings(saved, directory / MODEL_FILE)
    return saved


def _check_settings(saved: dict, file: Path) -> None:
    mend = "copy the checkpoint again, or save it anew."
    for key, kind in (("config", dict), ("adapters", list), ("untrained", list)):
        if not isinstance(saved.get(key, ...), kind):
            raise AdapterError(f"{file} has no usable {key!r}; {mend}")
    unknown = sorted(set(saved["config"]) - {field.name for field in fields(MeteoraConfig)})
    if unknown:
        raise AdapterError(f"{file} has a setting that is unknown here, config[{unknown[0]!r}]; update meteora.")
    try:
        MeteoraConfig(**saved["config"])
    except ValueError as error:
        raise AdapterError(f"{file}: {error}") from error
    if not saved["adapters"]:
        raise AdapterError(f"{file} names no adapters; {mend}")
    for n, entry in enumerate(saved["adapters"]):
        for keys in (("name",), ("sha256",), ("directory", "source")):
            if not isinstance(entry, dict) or not any(isinstance(entry.get(key), str) for key in keys):
                raise AdapterError(f"{file} has no usable {' or '.join(map(repr, keys))} of adapter {n}; {mend}")
    names = {entry["name"] for entry in saved["adapters"]}
    strangers = [name for name in saved["untrained"] if name not in names]
    if strangers:
        raise AdapterError(f"{file} has no usable 'untrained', as there is no adapter {strangers[0]!r}; {mend}")


def read_adapters(directory: Path, saved: dict) -> list[Adapter]:
    """The adapters of a checkpoint, in the gates' order.

    Raises:
        AdapterError: if one is missing, or is not the one the gates were trained with.
    """
    adapters = []
    for entry in saved["adapters"]:
        source = directory / entry["directory"] if "directory" in entry else entry["source"]
        adapter = load_adapter(entry["name"], source)
        if adapter.sha256 != entry["sha256"]:
            raise AdapterError(
                f"adapter {entry['name']!r} at {source} is not the one the gates in {directory} were trained with: "
                f"its sha256 is {adapter.sha256}, the checkpoint says {entry['sha256']}."
            )
        if entry.get("config_sha256", adapter.config_sha256) != adapter.config_sha256:  # checkpoints of before have none
            raise AdapterError(
                f"adapter {entry['name']!r}: the {CONFIG_FILE} at {source} is not the one the gates in {directory} were "
                "trained with; put that back, or train the gates again."
            )
        adapters.append(adapter)
    return adapters


def read_gates(directory: Path) -> dict[str, Tensor]:
    """Module -> gate (N, in) of the checkpoint in ``directory``."""
    try:
        return load_file(directory / GATES_FILE)
    except SafetensorError as error:
        raise AdapterError(f"{directory / GATES_FILE} is corrupt ({error}); copy the checkpoint again.") from error


def check_free_for_checkpoint(directory: str | Path) -> None:
    """Raise ``FileExistsError`` if ``directory`` holds something that a checkpoint must not take the place of."""
    directory = Path(directory).expanduser()
    _check_free(directory, CHECKPOINT_PARTS, "a checkpoint")
    for entry in sorted((directory / ADAPTERS_FOLDER).glob("*")):
        if not entry.name.isdecimal():
            raise FileExistsError(f"{entry} is nothing that a checkpoint holds, and would be lost; move it elsewhere.")


def check_free_for_adapter(directory: str | Path) -> None:
    """Raise ``FileExistsError`` if ``directory`` holds something that an adapter must not take the place of."""
    _check_free(Path(directory).expanduser(), ADAPTER_PARTS, "an adapter of PEFT")


def _check_free(directory: Path, parts: Sequence[str], kind: str) -> None:
    """``parts`` of it: where the first is, the others are of the same kind."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; choose a new directory for {kind}.")
    if (directory / parts[0]).is_file():
        return
    for part in parts:
        if (directory / part).exists():
            raise FileExistsError(
                f"{directory} holds something else than {kind}, whose {part} would be lost; choose a new directory."
            )


def write_checkpoint(model: MeteoraModel, directory: Path, *, copy_adapters: bool) -> None:
    """Write gates, settings, adapters (or where they lie) and the model card into the empty ``directory``."""
    entries = []
    for n, adapter in enumerate(model.adapters):
        entry = {"name": adapter.name, "sha256": adapter.sha256, "config_sha256": adapter.config_sha256}
        _check_there(adapter)
        if copy_adapters:
            entry["directory"] = f"{ADAPTERS_FOLDER}/{n:03d}"  # numbered, because a name may hold what a file name may not
            _write_adapter(adapter, directory / entry["directory"])
        else:
            _check_unchanged(adapter, adapter.directory)
            local = Path(adapter.source)
            entry["source"] = str(local.resolve()) if local.is_dir() else adapter.source
        entries.append(entry)
    state = model.state
    config = MeteoraConfig(state.top_k, state.temperature, state.backend, state.absolute_logits, state.least_share)
    saved = {"format": FORMAT, "config": asdict(config), "adapters": entries, "untrained": sorted(state.untrained)}
    gates = {name: layer.gate.weight.detach().contiguous() for name, layer in model.layers.items()}
    write_tensors(directory / GATES_FILE, gates)
    (directory / MODEL_FILE).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    (directory / CARD_FILE).write_text(model_card(model), encoding="utf-8")


def _check_there(adapter: Adapter) -> None:
    for file in (CONFIG_FILE,) if adapter.in_memory else (CONFIG_FILE, WEIGHTS_FILE):
        if not (adapter.directory / file).is_file():
            raise AdapterError(
                f"adapter {adapter.name!r}: {adapter.directory} has no {file} any more; put it back, or load the model "
                "again from where the adapter lies now."
            )


def _check_unchanged(adapter: Adapter, directory: Path) -> None:
    """Whether what lies in ``directory``, from where it was loaded or was copied, is what was loaded."""
    for file, sha256 in ((WEIGHTS_FILE, adapter.sha256), (CONFIG_FILE, adapter.config_sha256)):
        if file_sha256(directory / file) != sha256:
            raise AdapterError(
                f"adapter {adapter.name!r}: {adapter.directory / file} changed since it was loaded; load the model again."
            )


def _write_adapter(adapter: Adapter, directory: Path) -> None:
    directory.mkdir(parents=True)
    shutil.copyfile(adapter.directory / CONFIG_FILE, directory / CONFIG_FILE)
    if adapter.in_memory:
        write_tensors(directory / WEIGHTS_FILE, peft_tensors(adapter.modules), {"format": "pt"})
    else:
        shutil.copyfile(adapter.directory / WEIGHTS_FILE, directory / WEIGHTS_FILE)
    _check_unchanged(adapter, directory)


def upload(directory: Path, repo_id: str, *, private: bool | None, token: str | None, commit_message: str) -> str:
    """Put a checkpoint into the hub's repository ``repo_id``, made if there is none, and return the commit's address.

    Raises:
        AdapterError: if the hub does not take it.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message).commit_url
    except HFValidationError as error:
        raise AdapterError(f"{repo_id!r} is no hub id; give one such as 'me/my-mixture'.") from error
    except HUB_ERRORS as error:
        raise AdapterError(
            f"the hub did not take {repo_id!r} ({type(error).__name__}); check the id, the network and your token "
            "(`hf auth login`)."
        ) from error


def public_name(base_model: nn.Module) -> str:
    """The base model's hub id, or the last part of its path: a path on this machine means nothing on another."""
    name = getattr(base_model.config, "_name_or_path", "") or type(base_model).__name__
    return Path(name).name if Path(name).is_dir() else name


def model_card(model: MeteoraModel) -> str:
    """The card (README.md with the hub's YAML header) of a model: base, adapters, gates, and how to load it."""
    base, state = public_name(model.base_model), model.state
    untrained = ", ".join(f"`{name}`" for name in model.adapter_names if name in state.untrained)
    gates = f"trained, but not for {untrained}" if untrained else "trained"
    if len(state.untrained) == len(model.adapters):
        gates = "never trained: what they choose is arbitrary"
    if state.absolute_logits:
        gates = "not trained: their rows are prototypes of the adapters, as in Arrow (arXiv 2405.11157)"
    rows = "\n".join(
        f"| {n} | `{adapter.name}` | {_ranks(model, n)} | `{adapter.sha256[:12]}` |"
        for n, adapter in enumerate(model.adapters)
    )
    unsure = ""
    if state.least_share:
        unsure = f"\nWhere a softmax over all gives the chosen less than {state.least_share:g} together, they add nothing."
    return f"""---
base_model: {json.dumps(base)}
library_name: meteora
pipeline_tag: text-generation
tags:
- lora
- mixture-of-loras
- meteora
---
# {len(model.adapters)} LoRA adapters in one {base}

A MeteoRA model ([arXiv 2405.13053](https://arxiv.org/abs/2405.13053)): the frozen base model `{base}`,
{len(model.adapters)} LoRA adapters, and a gate in each of {len(model.layers)} linear layers that chooses
{state.top_k} of them for every token. The gates are {gates}. Temperature of their softmax: {state.temperature:g}.{unsure}

| row | adapter | ranks: modules | sha256 of its weights |
|---|---|---|---|
{rows}

```python
from meteora import MeteoraModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)})
model = MeteoraModel.from_pretrained(base, "path-or-hub-id-of-this-repository")
print(tokenizer.decode(model.generate(**tokenizer("...", return_tensors="pt"))[0]))
```
"""


def _ranks(model: MeteoraModel, n: int) -> str:
    """The ranks of adapter ``n``, each with the number of modules that have it: ``8: 210``."""
    found = torch.tensor([int((layer.column_adapter == n).sum()) for layer in model.layers.values()])
    ranks, counts = found[found > 0].unique(return_counts=True)
    return ", ".join(f"{rank}: {count}" for rank, count in zip(ranks.tolist(), counts.tolist(), strict=True))
