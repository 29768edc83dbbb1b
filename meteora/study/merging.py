"""Several LoRA adapters merged into one by PEFT's own `add_weighted_adapter`: linear, TIES, DARE."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from meteora.adapters import WEIGHTS_FILE
from meteora.files import atomic_directory
from meteora.study.baselines import share_weights
from meteora.study.predictions import fingerprint


NOTE = "merge.json"


@dataclass(frozen=True)
class Merging:
    """How PEFT's `add_weighted_adapter` is called: its `combination_type`, and what it needs.

    `weight` is every adapter's own; `None` means one over their number. `density` is the share of entries that survive.
    `random`: which entries do is drawn, so the result depends on a seed.
    """

    combination_type: str
    weight: float | None = None
    density: float | None = None
    random: bool = False


# linear: A and B are sums of the adapters' own, each times the root of 1/N. Their product is the average of the adapters'
# products B A, and besides of each one's B with each other's A, which PEFT's `cat` would leave out. ties: the setting its
# paper recommends without validation data (Yadav et al. 2023, arXiv 2306.01708: keep the top 20%, scale 1), with PEFT's
# default majority sign ("total"). dare: drop at random, rescale what is left, then elect signs as TIES does (Yu et al. 2024,
# arXiv 2311.03099). Half is kept, as every entry of a product of two factors needs both: of each factor alone their 10% would
# leave 1% of it.
MERGINGS = {
    "linear": Merging("linear"),
    "ties": Merging("ties", weight=1.0, density=0.2),
    "dare": Merging("dare_ties", weight=1.0, density=0.5, random=True),
}


def merge_adapters(
    base_model: torch.nn.Module,
    adapters: Mapping[str, str | Path],
    mergings: Mapping[str, Merging],
    output_dir: str | Path,
    *,
    seed: int = 0,
) -> dict[str, Path]:
    """Merge LoRA adapters with PEFT's own `add_weighted_adapter`, each merging written as an ordinary PEFT directory.

    Args:
        base_model: the plain base model; left as it is.
        adapters: task -> PEFT adapter directory; all of one rank and the same target modules, as PEFT asks.
        mergings: name -> how, such as `MERGINGS`.
        output_dir: where a directory of each name is written; one there made from the same files and settings is kept.
        seed: of what is drawn, if anything is; the caller's own generators are left as they are.

    Returns:
        Name -> the directory of its adapter.
    """
    if not mergings:
        return {}
    if not adapters:
        raise ValueError(f"There are no adapters to merge into {', '.join(map(repr, mergings))}.")
    digests = adapter_digests(adapters)
    recipes = {name: _recipe(merging, digests, seed) for name, merging in mergings.items()}
    targets = {name: Path(output_dir) / name for name in mergings}
    missing = [name for name, target in targets.items() if not _is_made_by(recipes[name], target)]
    if missing:  # one model for all of them: to load its adapters takes longer than to merge them
        with torch.random.fork_rng():
            model, numbered = _with_all(base_model, adapters)
            for name in missing:
                torch.manual_seed(seed)
                _merge(model, numbered, mergings[name], recipes[name], targets[name])
    return targets


def _recipe(merging: Merging, digests: Mapping[str, str], seed: int) -> dict[str, object]:
    """All that a merged adapter depends on."""
    recipe = {
        "combination_type": merging.combination_type,
        "weights": [merging.weight if merging.weight is not None else 1 / len(digests)] * len(digests),
        "density": merging.density,
        "adapters": digests,
    }
    return recipe | ({"seed": seed} if merging.random else {})


def _is_made_by(recipe: Mapping[str, object], directory: Path) -> bool:
    note = directory / NOTE
    if not (note.is_file() and (directory / WEIGHTS_FILE).is_file()):
        return False
    return json.loads(note.read_text(encoding="utf-8")) == recipe


def _with_all(base_model: torch.nn.Module, adapters: Mapping[str, str | Path]) -> tuple[PeftModel, list[str]]:
    """A model of all adapters, and their names there: PEFT's may not contain dots, tasks' names may."""
    numbered = [f"adapter{i}" for i in range(len(adapters))]
    first, *others = zip(numbered, map(Path, adapters.values()))
    model = PeftModel.from_pretrained(share_weights(base_model), first[1], adapter_name=first[0])
    for number, directory in others:
        model.load_adapter(directory, adapter_name=number)
    return model, numbered


def _merge(model: PeftModel, adapters: list[str], merging: Merging, recipe: Mapping[str, object], target: Path) -> None:
    """Merge the model's adapters into one of the target's name, and write that one."""
    options = {} if merging.density is None else {"density": merging.density}
    model.add_weighted_adapter(
        adapters, recipe["weights"], target.name, combination_type=merging.combination_type, **options
    )
    with tempfile.TemporaryDirectory() as scratch, atomic_directory(target) as directory:
        # embeddings are never adapted here; left to itself, PEFT asks the model hub whether they were
        model.save_pretrained(scratch, selected_adapters=[target.name], save_embedding_layers=False)
        # PEFT puts every adapter but one named "default" into a folder of its own name
        shutil.copytree(Path(scratch) / target.name, directory, dirs_exist_ok=True)
        (directory / NOTE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def adapter_digests(adapters: Mapping[str, str | Path]) -> dict[str, str]:
    """Task -> digest of its adapter directory's configuration and weights."""
    digests = {}
    for task, directory in adapters.items():
        files = sorted(p for p in Path(directory).glob("adapter_*") if p.is_file())
        if not files:
            raise FileNotFoundError(f"{directory} holds no PEFT adapter (no adapter_config.json).")
        contents = {file.name: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files}
        digests[task] = fingerprint(contents)
    return digests
