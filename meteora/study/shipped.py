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
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import DataError
from data_prep.prepare import MANIFEST
from data_prep.sources import BIGBENCH
from meteora.adapters import AdapterError, adapter_directory
from meteora.checkpoint import CARD_FILE, FORMAT, GATES_FILE, MODEL_FILE, read_adapters, read_settings
from meteora.files import atomic_directory
from meteora.study.artifacts import ArtifactError, Workspace, write_json
from meteora.study.baselines import TRAINED_SINGLE
from meteora.study.collection import HISTORY, Collection, collect, load_collection, write_index
from meteora.study.examples import prepare_examples
from meteora.study.locking import hold
from meteora.study.profiles import ProfileError, load_profile
from meteora.study.records import RunError
from meteora.study.selection import data_section

logger = logging.getLogger(__name__)


def ship(workspace: Workspace) -> None:
    """Copy the adapters and gates of artifacts/<profile> to results/<profile>, in place of those that are there.

    Raises:
        ArtifactError: if notebooks 01 and 02 have not left them, or an adapter was changed since.
    """
    workspace.require("01", "02")
    collection = load_collection(workspace)
    manifest = json.loads((workspace.data / MANIFEST).read_text(encoding="utf-8"))
    with atomic_directory(workspace.results / "adapters") as folder:
        for name, place in (collection.tasks | collection.single).items():
            target = shutil.copytree(place, adapter_directory(folder, name))
            tasks = [name] if name in collection.tasks else list(collection.tasks)
            card = target / CARD_FILE
            if card.is_file() and {manifest["tasks"][task]["source"] for task in tasks} == {BIGBENCH.filename}:
                card.write_text(card.read_text(encoding="utf-8") + data_section(tasks), encoding="utf-8")
        if (workspace.metrics / HISTORY).is_file():
            shutil.copyfile(workspace.metrics / HISTORY, folder / HISTORY)
    _copy_gates(workspace.gates, workspace.results / "gates", collection)


def take(workspace: Workspace) -> None:
    """Leave in artifacts/<profile> what notebooks 01 and 02 would: examples, the shipped adapters with their index, gates.

    Raises:
        ArtifactError: if no gates are shipped, or artifacts/<profile> has adapters or gates already.
        AdapterError: if an adapter is missing, or is not the one that the gates were trained with.
    """
    shipped = workspace.results / "gates"
    if not shipped.is_dir():
        raise ArtifactError(f"profile {workspace.profile.name!r} ships no gates: there is no {shipped}.")
    for folder in (workspace.adapters, workspace.gates):
        if any(folder.iterdir()):
            raise ArtifactError(f"{folder} is of a run here; move it away to take what is shipped.")
    source = workspace.results / "adapters"
    tasks = [adapter.name for adapter in read_adapters(shipped, read_settings(shipped))]
    prepare_examples(workspace)
    places = {name: adapter_directory(source, name) for name in (*tasks, *TRAINED_SINGLE)}
    taken = {name: collect(name, place, workspace.adapters) for name, place in places.items() if place.is_dir()}
    collection = Collection({n: taken.pop(n) for n in tasks}, taken)
    _copy_gates(shipped, workspace.gates, collection)
    write_index(workspace, collection)


def _copy_gates(source: Path, target: Path, collection: Collection) -> None:
    """The checkpoint ``source``, with the adapters where they lie, relative to it."""
    settings = read_settings(source)
    with atomic_directory(target) as directory:
        for file in (GATES_FILE, CARD_FILE):
            shutil.copyfile(source / file, directory / file)
        for entry in settings["adapters"]:
            entry["directory"] = "../adapters/" + collection.tasks[entry["name"]].name
        write_json(directory / MODEL_FILE, settings | {"format": FORMAT})


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
    except (ProfileError, ArtifactError, AdapterError, RunError, DataError) as error:
        logger.error("error: %s", error)
        return 2
    begin = f"./run_all.sh --profile {options.profile} --from 03"
    logger.info("%s", f"taken; go on with {begin}" if options.take else f"shipped in {workspace.results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
