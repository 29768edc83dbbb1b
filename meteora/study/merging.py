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

from meteora.files import atomic_directory
from meteora.study.baselines import share_weights
from meteora.study.predictions import fingerprint


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


# linear: the average of the adapters' factors. ties: the setting its paper recommends without validation data
# (Yadav et al. 2023, arXiv 2306.01708: keep the top 20%, scale 1), with PEFT's default majority sign ("total").
# dare: drop at random, rescale what is left, then elect signs as TIES does (Yu et al. 2024, arXiv 2311.03099). Half is
# kept, as every entry of a product of two factors needs both: of each factor alone their 10% would leave 1% of it.
MERGINGS = {
    "linear": Merging("linear"),
    "ties": Merging("ties", weight=1.0, density=0.2),
    "dare": Merging("dare_ties", weight=1.0, density=0.5, random=True),
}


def merge_adapters(
    base_model: torch.nn.Module,
    adapters: Mapping[str, str | Path],
    name: str,
    output_dir: str | Path,
    *,
    merging: Merging | None = None,
    seed: int = 0,
) -> Path:
    """Merge LoRA adapters into one with PEFT's own `add_weighted_adapter`, written as an ordinary PEFT directory.

    Args:
        base_model: the plain base model; left as it is.
        adapters: task -> PEFT adapter directory; all of one rank and the same target modules, as PEFT asks.
        name: of `MERGINGS` unless `merging` is given; also the name of the directory written.
        output_dir: where `name` is written; a directory there made from the same files and settings is kept.
        seed: of what is drawn, if anything is; the caller's own generators are left as they are.

    Returns:
        The adapter directory `output_dir/name`.
    """
    from peft import PeftModel

    if merging is None and name not in MERGINGS:
        raise ValueError(f"Unknown merging {name!r}; there are {', '.join(MERGINGS)}.")
    merging = merging or MERGINGS[name]
    if not adapters:
        raise ValueError(f"There are no adapters to merge into {name!r}.")
    directories = [Path(directory) for directory in adapters.values()]
    recipe = {
        "combination_type": merging.combination_type,
        "weights": [merging.weight if merging.weight is not None else 1 / len(adapters)] * len(adapters),
        "density": merging.density,
        "adapters": adapter_digests(adapters),
    }
    if merging.random:
        recipe["seed"] = seed
    target = Path(output_dir) / name
    note = target / "merge.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) == recipe:
        return target

    numbered = [f"adapter{i}" for i in range(len(adapters))]  # PEFT's names may not contain dots, tasks' names may
    options = {} if merging.density is None else {"density": merging.density}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        merged = PeftModel.from_pretrained(share_weights(base_model), directories[0], adapter_name=numbered[0])
        for number, directory in zip(numbered[1:], directories[1:]):
            merged.load_adapter(directory, adapter_name=number)
        merged.add_weighted_adapter(
            numbered, recipe["weights"], name, combination_type=merging.combination_type, **options
        )
    with tempfile.TemporaryDirectory() as scratch, atomic_directory(target) as directory:
        # embeddings are never adapted here; left to itself, PEFT asks the model hub whether they were
        merged.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        # PEFT puts every adapter but one named "default" into a folder of its own name
        shutil.copytree(Path(scratch) / name, directory, dirs_exist_ok=True)
        (directory / note.name).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return target


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
