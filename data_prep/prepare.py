"""Prepared data on disk: `<out_dir>/<task>/{train,valid,test}.jsonl` and `<out_dir>/manifest.json`."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from .bigbench import extracted_tasks, load_bigbench
from .errors import DataError, DownloadError
from .hub import AUTHORS_DATASET, load_authors_task, load_hub_task
from .sources import BIGBENCH
from .splits import SPLITS, Example, split_examples
from .tasks import Task, get_task
from .toy import toy_examples

logger = logging.getLogger(__name__)

SOURCES = ("auto", "authors")
MANIFEST = "manifest.json"


def prepare_tasks(
    tasks: Sequence[str],
    out_dir: str | Path,
    *,
    sizes: dict[str, int | None],
    seed: int = 0,
    source: str = "auto",
    max_characters: int | None = None,
    cache_dir: str | Path | None = None,
    hub_mirror: str | Path | None = None,
) -> dict:
    """Writes the splits of `tasks` below `out_dir` and returns the manifest, which is also written there.

    Tasks that only the hub has and that cannot be had now are left out with a warning; the manifest's "unavailable"
    says why. The same arguments give the same bytes on every machine.

    Args:
        tasks: names from the catalogue.
        sizes: cap of each of "train", "valid", "test"; None or absent: all there is.
        seed: seeds every choice of examples.
        source: "auto" (BIG-bench from the package index, the rest from the hub) or "authors" (the paper's prepared
            data on the hub).
        max_characters: leaves out longer examples (prompt and response); one task of BIG-bench has prompts far beyond
            any context window.
        cache_dir: see `sources.cache_root`.
        hub_mirror: a folder with copies of the hub's dataset repositories, see `hub`.

    Returns:
        {"seed", "source", "sizes", "max_characters", "sources": {file or repository: sha256 or None},
        "tasks": {name: {"category", "source", "counts": {split: n}, "sha256": {split: hash}, "available", "duplicates",
        "too_long"}},
        "unavailable": {name: reason}}.

    Raises:
        DataError: an unknown task, split or source, a package that cannot be had, or not one task available.
    """
    _check_arguments(tasks, sizes, source)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # An interrupted run must not leave the manifest of an earlier one beside other files.
    (out_dir / MANIFEST).unlink(missing_ok=True)
    manifest: dict = {"seed": seed, "source": source, "sizes": {split: sizes.get(split) for split in SPLITS}}
    manifest.update(max_characters=max_characters, sources={}, tasks={}, unavailable={})
    for name in tqdm(tasks, desc="prepare tasks", unit="task"):
        task = get_task(name)
        try:
            train, test, origin, digest = _load(task, source, cache_dir, hub_mirror)
        except DownloadError as error:
            if task.source == "bigbench" and source == "auto":
                raise
            logger.warning("%s", error)
            manifest["unavailable"][name] = str(error)
            continue
        manifest["sources"][origin] = digest
        splits, counted = split_examples(
            train, test, task=name, seed=seed, sizes=sizes, max_characters=max_characters
        )
        empty = [split for split in SPLITS if not splits[split] and sizes.get(split) != 0]
        if empty:
            raise DataError(
                f"Task {name} has too few examples for a {empty[0]} split ({counted['available']}, of which "
                f"{counted['too_long']} were longer than max_characters): leave the task out or raise the limit."
            )
        manifest["tasks"][name] = {
            "category": task.category,
            "source": origin,
            "counts": {split: len(splits[split]) for split in SPLITS},
            "sha256": {split: _write_jsonl(out_dir / name / f"{split}.jsonl", splits[split]) for split in SPLITS},
            **counted,
        }
    if not manifest["tasks"]:
        reason = next(iter(manifest["unavailable"].values()))
        raise DataError(f"None of the tasks {', '.join(tasks)} could be prepared: {reason}")
    write_atomically(out_dir / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def load_split(data_dir: str | Path, task: str, split: str) -> list[Example]:
    """The examples of one split that `prepare_tasks` wrote to `data_dir`.

    Raises:
        DataError: an unknown split, or data that was not prepared, or cannot be read.
    """
    if split not in SPLITS:
        raise DataError(f"There is no split {split!r}; choose among {', '.join(SPLITS)}.")
    name = get_task(task).name
    # Without a manifest a preparation was interrupted, and files of a task it does not name are from another one.
    if name not in prepared_tasks(data_dir):
        raise DataError(f"Task {name} was not prepared in {data_dir}: run prepare_tasks of data_prep for it first.")
    path = Path(data_dir) / name / f"{split}.jsonl"
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): prepare the tasks again.") from error


def prepared_tasks(data_dir: str | Path) -> list[str]:
    """The tasks that `prepare_tasks` wrote to `data_dir`, in its order; none where it has not finished.

    Raises:
        DataError: a manifest that cannot be read.
    """
    manifest = Path(data_dir) / MANIFEST
    if not manifest.is_file():
        return []
    try:
        return list(json.loads(manifest.read_text(encoding="utf-8"))["tasks"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{manifest} cannot be read ({error}): prepare the tasks again.") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) so that `path` holds all of it or is not touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are private; prepared data is not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _check_arguments(tasks: Sequence[str], sizes: dict[str, int | None], source: str) -> None:
    if not tasks:
        raise DataError("There is no task to prepare: name at least one.")
    for name in tasks:
        get_task(name)
    unknown = set(sizes) - set(SPLITS)
    if unknown:
        raise DataError(f"There is no split {unknown.pop()!r}; sizes may name {', '.join(SPLITS)}.")
    if any(size is not None and size < 0 for size in sizes.values()):
        raise DataError(f"The sizes {sizes} must not be negative.")
    if source not in SOURCES:
        raise DataError(f"There is no source {source!r}; choose among {', '.join(SOURCES)}.")


def _load(
    task: Task, source: str, cache_dir: str | Path | None, hub_mirror: str | Path | None
) -> tuple[list[Example], list[Example] | None, str, str | None]:
    """(training part, test part or None, name of the source, its sha256 if it is pinned)."""
    if task.source == "toy":
        return toy_examples(task.name), None, "generated", None
    if source == "authors":
        return *load_authors_task(task, hub_mirror), AUTHORS_DATASET, None
    if task.source == "hub":
        return *load_hub_task(task, hub_mirror), task.hub_path, None
    return *load_bigbench(task, extracted_tasks(cache_dir)), BIGBENCH.filename, BIGBENCH.sha256


def _write_jsonl(path: Path, examples: list[Example]) -> str:
    """Writes one example a line and returns the file's sha256."""
    text = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    write_atomically(path, text)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
