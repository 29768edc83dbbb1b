"""Adapters and gates that ship with the repository: what notebooks 01 and 02 trained, kept in ``results/<profile>``.

On the machine that trained them, and later on any other, which then goes on with notebook 03 and trains nothing::

    python -P -m meteora.study.shipped --profile smollm2
    python -P -m meteora.study.shipped --profile smollm2 --take

``results/<profile>/adapters`` has a PEFT directory for each adapter, and their learning curves; a profile can name it as
the source of its own adapters. ``results/<profile>/gates`` is a checkpoint that takes the adapters from beside it, for
``MeteoraModel.from_pretrained(base_model, "results/smollm2/gates")``.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.prepare import MANIFEST
from data_prep.sources import BIGBENCH
from meteora.adapters import WEIGHTS_FILE, AdapterError, adapter_directory, file_sha256
from meteora.checkpoint import CARD_FILE, FORMAT, GATES_FILE, MODEL_FILE, read_settings
from meteora.files import atomic_directory
from meteora.study.artifacts import ArtifactError, Workspace, find_stage, write_json
from meteora.study.baselines import TRAINED_SINGLE
from meteora.study.collection import HISTORY, INDEX, index_entry, load_collection
from meteora.study.examples import prepare_examples
from meteora.study.locking import hold
from meteora.study.profiles import ProfileError, load_profile
from meteora.study.records import Records, RunError
from meteora.study.selection import data_section

logger = logging.getLogger(__name__)

STAGES = ("01", "02")
Index = Mapping[str, Mapping[str, str]]  # tasks and single, as in adapters.json: name -> sha256


def ship(workspace: Workspace) -> None:
    """Copy the adapters and gates of artifacts/<profile> to results/<profile>, in place of those that are there.

    Raises:
        ArtifactError: if notebooks 01 and 02 have not left them, one does not belong to the other, or the adapters
            were not trained here.
    """
    name = workspace.profile.name
    if workspace.profile.adapters.path is not None:
        raise ArtifactError(f"profile {name!r} has its adapters from {workspace.profile.adapters.source}; they ship there.")
    workspace.require(*STAGES)
    collection = load_collection(workspace)
    if _of_gates(workspace.gates) != list(_indexed(workspace)["tasks"].items()):
        raise ArtifactError(f"the gates of profile {name!r} were trained with other adapters; run notebook 02 again.")
    manifest = json.loads((workspace.data / MANIFEST).read_text(encoding="utf-8"))
    with _both(workspace.results) as (adapters, gates):
        for name, place in (collection.tasks | collection.single).items():
            target = shutil.copytree(place, adapter_directory(adapters, name))
            tasks = [name] if name in collection.tasks else list(collection.tasks)
            from_bigbench = {manifest["tasks"][task]["source"] for task in tasks} == {BIGBENCH.filename}
            card = target / CARD_FILE
            if from_bigbench and card.is_file() and "\n## Data\n" not in (text := card.read_text(encoding="utf-8")):
                card.write_text(text + data_section(tasks), encoding="utf-8")
        if (workspace.metrics / HISTORY).is_file():
            shutil.copyfile(workspace.metrics / HISTORY, adapters / HISTORY)
        _copy_gates(workspace.gates, gates)


def take(workspace: Workspace) -> None:
    """Leave in artifacts/<profile> what notebooks 01 and 02 would: examples, adapters, gates, and records of both.

    The records say what the manifest of results/<profile> says of them: where and when they ran, and what they left.

    Raises:
        ArtifactError: if nothing is shipped, something is missing or another, or artifacts/<profile> has adapters or
            gates of a run here.
    """
    recorded = _manifest(workspace)
    index = _shipped(workspace, recorded["inputs"]["files"])
    for folder, same in ((workspace.adapters, _same_adapters(workspace, index)), (workspace.gates, _same_gates(workspace))):
        if not same and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ArtifactError(f"{folder} is of a run here; move it away to take what is shipped.")
    prepare_examples(workspace)
    source = workspace.results / "adapters"
    with _both(workspace.artifacts) as (adapters, gates):
        entries = {group: {} for group in index}
        for group, names in index.items():
            for name, sha256 in names.items():
                shutil.copytree(adapter_directory(source, name), adapter_directory(adapters, name))
                entries[group][name] = index_entry(workspace, adapter_directory(workspace.adapters, name), sha256)
        write_json(adapters / INDEX, entries)
        _copy_gates(workspace.results / "gates", gates)
    records = Records(workspace)
    for stage in map(find_stage, STAGES):
        records.adopt(stage, recorded["notebooks"].get(stage.notebook, {}))


def _shipped(workspace: Workspace, recorded: Mapping[str, str]) -> Index:
    """What is shipped: the digests of all adapters, each checked against what the gates, or ``recorded``, say of it."""
    name, gates = workspace.profile.name, workspace.results / "gates"
    tasks = dict(_of_gates(gates))
    left = [task for task in workspace.profile.tasks if task in tasks]
    if list(tasks) != left:
        raise ArtifactError(f"{gates} is of other tasks than profile {name!r} has, or in another order; train them anew.")
    wanted = [single for single in TRAINED_SINGLE if getattr(workspace.profile, single) is not None]
    single = {adapter: recorded.get(f"adapters/{adapter}/{WEIGHTS_FILE}") for adapter in wanted}
    for adapter, sha256 in (tasks | single).items():
        file = adapter_directory(workspace.results / "adapters", adapter) / WEIGHTS_FILE
        if not file.is_file() or file_sha256(file) != sha256:
            raise ArtifactError(f"{file} is missing or another than was recorded; take it from the repository again.")
    return {"tasks": tasks, "single": single}


def _manifest(workspace: Workspace) -> dict[str, Any]:
    """That of the run that trained what is shipped."""
    name, gates = workspace.profile.name, workspace.results / "gates"
    if not gates.is_dir():
        raise ArtifactError(
            f"profile {name!r} ships no gates (there is no {gates}); train them with "
            f"./run_all.sh --profile {name}, or take those of profile 'smollm2'."
        )
    file = workspace.results / "manifest.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); take it from the repository again.") from error


def _of_gates(checkpoint: Path) -> list[tuple[str, str]]:
    """(name, sha256) of the adapters that gates were trained with, in their order."""
    return [(entry["name"], entry["sha256"]) for entry in read_settings(checkpoint)["adapters"]]


def _indexed(workspace: Workspace) -> Index:
    """The digests of adapters.json, which `load_collection` has checked."""
    index = json.loads((workspace.adapters / INDEX).read_text(encoding="utf-8"))
    return {group: {name: entry["sha256"] for name, entry in entries.items()} for group, entries in index.items()}


def _same_adapters(workspace: Workspace, index: Index) -> bool:
    try:
        load_collection(workspace)
    except ArtifactError:
        return False
    return _indexed(workspace) == index


def _same_gates(workspace: Workspace) -> bool:
    here, there = workspace.gates / GATES_FILE, workspace.results / "gates" / GATES_FILE
    return here.is_file() and file_sha256(here) == file_sha256(there)


@contextmanager
def _both(folder: Path):
    """New directories for adapters and gates, which take their places together, once both are complete."""
    with atomic_directory(folder / "adapters") as adapters, atomic_directory(folder / "gates") as gates:
        yield adapters, gates


def _copy_gates(source: Path, target: Path) -> None:
    """The checkpoint ``source``, with the adapters where they lie beside it."""
    settings = read_settings(source)
    for file in (GATES_FILE, CARD_FILE):
        shutil.copyfile(source / file, target / file)
    settings["adapters"] = [
        {key: value for key, value in entry.items() if key != "source"}
        | {"directory": f"../adapters/{adapter_directory('', entry['name'])}"}
        for entry in settings["adapters"]
    ]
    write_json(target / MODEL_FILE, settings | {"format": FORMAT})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -P -m meteora.study.shipped", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="smollm2", metavar="NAME", help="a profile's name or .yaml file (smollm2)")
    parser.add_argument("--take", action="store_true", help="from results/ to artifacts/, instead of training")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        workspace = Workspace(load_profile(options.profile))
        with hold(workspace):
            (take if options.take else ship)(workspace)
    except (ProfileError, ArtifactError, AdapterError, RunError, DataError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    begin = f"./run_all.sh --profile {options.profile} --from 03"
    logger.info("%s", f"taken; go on with {begin}" if options.take else f"shipped in {workspace.results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
