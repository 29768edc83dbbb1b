"""BIG-bench tasks: extracted from the pinned source archive, rendered as the paper's prompts.

A task is a `task.json`, or a folder of them (subtasks, all of which are used). A prompt is
`task_prefix + example_input_prefix + input [+ choices] + example_output_prefix`, stripped, which is what BIG-bench's
own loader makes and what the paper's data consists of; four tasks get further `choice: ...` lines from the paper.
"""

import json
import logging
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm.auto import tqdm

from .errors import DataError
from .sources import BIGBENCH, BIGBENCH_FOLDER, cache_root, require_free_space
from .splits import TEST_SHARE, Example
from .tasks import TASKS, Task

logger = logging.getLogger(__name__)

_MEMBER_ROOT = PurePosixPath("bigbench-1.0.0/bigbench/benchmark_tasks")
_EXTRACTED_BYTES = 250_000_000  # upper bound for the 22 tasks
_BIGBENCH_SEED = 42  # of BIG-bench's own split and of its order of choices


def bigbench_names() -> list[str]:
    """The paper's 22 tasks that BIG-bench holds."""
    return [task.name for task in TASKS.values() if task.source == "bigbench"]


def extracted_tasks(cache_dir: str | Path | None = None) -> Path:
    """The folder `<task>/**/task.json` of the 22 tasks, extracted (and downloaded) once."""
    target = cache_root(cache_dir) / BIGBENCH_FOLDER
    if not target.exists():
        archive = BIGBENCH.fetch(cache_dir)
        require_free_space(target, _EXTRACTED_BYTES, "Extracting the BIG-bench tasks")
        extract_tasks(archive, target, bigbench_names(), _MEMBER_ROOT)
    return target


def extract_tasks(archive: Path, target: Path, names: Sequence[str], root: PurePosixPath) -> None:
    """Copies the `task.json` members of the tasks `names` below `root` into the new folder `target`, all or none.

    Paths are built from checked components and only regular files are read, so a crafted archive cannot write
    anywhere else.

    Raises:
        DataError: the archive cannot be read, or lacks a task.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    wanted = set(names)
    found = set()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
        try:
            # Streamed: the archive holds thousands of members that are never wanted.
            with tarfile.open(archive, "r|gz") as tar, tqdm(total=len(wanted), desc="extract", unit="task") as bar:
                for member in tar:
                    parts = _safe_parts(member, root)
                    if parts is None or parts[0] not in wanted:
                        continue
                    destination = Path(partial, "tasks", *parts)
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, open(destination, "wb") as copy:
                        shutil.copyfileobj(source, copy)
                    found.add(parts[0])
                    bar.update(len(found) - bar.n)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"Could not extract {archive} ({error}): delete it and run again.") from error
        if wanted - found:
            raise DataError(f"{archive} lacks the tasks {', '.join(sorted(wanted - found))}: it is another archive.")
        _publish(Path(partial, "tasks"), target)


def _publish(folder: Path, target: Path) -> None:
    """Renames `folder` to `target`, unless another process has just done so."""
    try:
        os.replace(folder, target)
    except OSError:
        if not target.exists():
            raise


def _safe_parts(member: tarfile.TarInfo, root: PurePosixPath) -> tuple[str, ...] | None:
    """The components of a wanted member's path below `root`, or None for anything else."""
    path = PurePosixPath(member.name)
    if not member.isfile() or path.name != "task.json" or not path.is_relative_to(root):
        return None
    parts = path.relative_to(root).parts
    return None if ".." in parts or len(parts) < 2 else parts


def load_bigbench(task: Task, folder: Path) -> tuple[list[Example], list[Example]]:
    """All examples of a task as (training part, test part).

    The parts are BIG-bench's own (every subtask shuffled with seed 42, its last fifth for testing), and the paper's. No
    prompt is in both. But subtasks may ask about one text in several ways, so that a text whose answer was in the first
    part can be in the second: of abstract_narrative_understanding most are, of elementary_math_qa with hints many.

    Args:
        folder: what `extracted_tasks` returns.

    Raises:
        DataError: a file that is missing or not in BIG-bench's format.
    """
    paths = sorted((folder / task.name).rglob("task.json"))
    if not paths:
        raise DataError(f"There is no task.json of {task.name} in {folder}: delete that folder and run again.")
    train: list[Example] = []
    test: list[Example] = []
    for path in paths:
        data = _read_json(path)
        # The task.json above a folder of subtasks has no examples.
        if "examples" not in data:
            continue
        subtask = path.parent.relative_to(folder).as_posix()
        # BIG-bench drops repeated examples before it splits.
        rows = list({json.dumps(row): row for row in data["examples"]}.values())
        numbered = [(f"{subtask}/{index}", row) for index, row in enumerate(rows)]
        random.Random(_BIGBENCH_SEED).shuffle(numbered)
        cut = len(numbered) - int(len(numbered) * TEST_SHARE)
        examples = [render(task, data, row, identifier) for identifier, row in numbered]
        train += examples[:cut]
        test += examples[cut:]
    if not test:
        raise DataError(f"The task.json files of {task.name} in {folder} hold no examples.")
    return train, test


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): delete the folder of its task and run again.") from error


def render(task: Task, data: dict, row: dict, identifier: str) -> Example:
    """One BIG-bench row as an example.

    Args:
        task: the catalogue's entry.
        data: the fields of the row's task.json (its prefixes; the examples in it are not read).
        row: {"input", "target": str or list, "target_scores": {choice: score}}, one of the last two or both.
        identifier: becomes the example's id.

    Raises:
        DataError: neither target nor target_scores, or no answer among them.
    """
    scores = row.get("target_scores")
    question = row["input"]
    # BIG-bench tests this field for truth, so that the string "false" of one task lists the choices; the paper's
    # data has them, hence so do we.
    if scores and data.get("append_choices_to_input", True):
        prefix = data.get("choice_prefix", "\n  choice: ")
        question += "".join(prefix + choice for choice in _shuffled(sorted(scores)))
    text = "".join(
        (
            data.get("task_prefix", ""),
            data.get("example_input_prefix", "\nQ: "),
            question,
            data.get("example_output_prefix", "\nA: "),
        )
    ).strip()
    if task.choices_header is not None:
        text += task.choices_header + "".join(f"choice: {choice}\n" for choice in scores or ())
    answers = _answers(row, identifier)
    example = {
        "task": task.name,
        "id": identifier,
        "prompt": f"[INST] {text} [/INST]\n",
        "response": answers[0],
        "choices": list(scores) if scores else None,
    }
    if len(answers) > 1:
        example["references"] = answers
    return example


def _shuffled(choices: list[str]) -> list[str]:
    """The choices in BIG-bench's order: one fixed permutation for each number of choices."""
    return [choices[index] for index in _permutation(len(choices))]


@lru_cache
def _permutation(count: int) -> list[int]:
    return np.random.RandomState(_BIGBENCH_SEED).permutation(count).tolist()


def _answers(row: dict, identifier: str) -> list[str]:
    """All acceptable answers, the one to train on first."""
    if row.get("target") is not None:
        targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
    elif row.get("target_scores"):
        best = max(row["target_scores"].values())
        targets = [choice for choice, score in row["target_scores"].items() if score == best]
    else:
        targets = []
    answers = list(dict.fromkeys(str(target).strip() for target in targets))
    if not answers or not answers[0]:
        raise DataError(f"The BIG-bench example {identifier} has no answer: the task's file is damaged; delete it.")
    return answers
