"""The tasks' examples of a run, prepared once and kept as long as nothing that decides them changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.prepare import MANIFEST, prepare_tasks
from meteora.adapters import file_sha256
from meteora.study.artifacts import Workspace, write_json
from meteora.study.predictions import fingerprint
from meteora.study.records import sources_of

NOTE = "recipe.json"


def prepare_examples(workspace: Workspace, *, everything: bool = False) -> tuple[Path, dict[str, Any]]:
    """The folder with the profile's tasks' examples, and its manifest (see `data_prep.prepare.prepare_tasks`).

    What an earlier call left is kept if settings, code and files are the same, and no task was missing.

    Args:
        everything: all training examples, for LoRA-F, in a folder of their own, and none of the other splits.
    """
    profile, data = workspace.profile, workspace.profile.data
    folder = workspace.artifacts / "data_all" if everything else workspace.data
    sizes = {"train": data.train, "valid": data.valid, "test": data.test}
    if everything:
        sizes = {"train": None, "valid": 0, "test": 0}
    settings = {"sizes": sizes, "seed": profile.seed, "source": data.source, "max_characters": data.max_characters}
    code = [file_sha256(path) for path in sources_of("from data_prep.prepare import prepare_tasks")]
    recipe = fingerprint([profile.tasks, settings, code])
    manifest = _left(folder, recipe)
    if manifest is None:
        (folder / NOTE).unlink(missing_ok=True)  # it must not vouch for what is written now
        manifest = prepare_tasks(profile.tasks, folder, cache_dir=profile.cache, **settings)
        if not manifest["unavailable"]:  # what could not be had now may be had next time
            write_json(folder / NOTE, {"recipe": recipe})
    return folder, manifest


def _left(folder: Path, recipe: str) -> dict[str, Any] | None:
    """The manifest of an earlier preparation by this recipe, if every file is as it says."""
    try:
        if json.loads((folder / NOTE).read_text(encoding="utf-8"))["recipe"] != recipe:
            return None
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for task, facts in manifest["tasks"].items():
            for split, digest in facts["sha256"].items():
                if file_sha256(folder / task / f"{split}.jsonl") != digest:
                    return None
    except (OSError, ValueError, KeyError):
        return None
    return manifest
