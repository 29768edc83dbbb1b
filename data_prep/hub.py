"""Tasks from the Hugging Face hub: the six that BIG-bench lacks, and the authors' own prepared data.

Everything goes through `datasets.load_dataset`. With `mirror`, a folder holding copies of the dataset repositories as
`<owner>/<name>`, the same calls read from there instead of the network.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from .errors import DataError, DownloadError
from .splits import Example
from .tasks import Task

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 5.0
_CHOICE = re.compile(r"^\s*choice: ?(.*)$", re.MULTILINE)
_FEW = 16  # different answers, at most, of a task that asks for one of them

AUTHORS_DATASET = "NJUDeepEngine/meteora_dataset"
"""The paper's data: one folder a task with train.jsonl and test.jsonl, rows {"prompt", "response"}."""


def load_hub_task(task: Task, mirror: str | Path | None = None) -> tuple[list[Example], list[Example] | None]:
    """All examples of a hub task as (training part, test part or None if the source publishes none).

    Raises:
        DownloadError: the data set cannot be had (no network, no access), naming task and repository.
        DataError: its rows lack an expected field.
    """
    splits = _load(task.hub_path, mirror, task.name, name=task.hub_config)
    examples = {
        split: _examples(task, split, splits[split]) for split in ("train", "test") if split in splits
    }
    return _parts(examples, task.name, task.hub_path)


def load_authors_task(task: Task, mirror: str | Path | None = None) -> tuple[list[Example], list[Example] | None]:
    """Like `load_hub_task`, for any of the 28 tasks, from the authors' prepared data.

    Its rows name no choices: they are read off the prompts that list them, and of a task with few different answers, all
    of these are choices.
    """
    splits = _load(AUTHORS_DATASET, mirror, task.name, data_dir=task.name)
    examples = {}
    for split in ("train", "test"):
        if split in splits:
            rows = enumerate(splits[split])
            found = [
                _example(task, f"{split}/{index}", _field(row, "prompt", task), _field(row, "response", task))
                for index, row in rows
            ]
            examples[split] = _answered(found)
    train, test = _parts(examples, task.name, AUTHORS_DATASET)
    answers = sorted({example["response"].strip() for example in train})
    for example in train + (test or []):
        listed = [choice.strip() for choice in _CHOICE.findall(example["prompt"].rpartition(" [/INST]")[0])]
        example["choices"] = listed or (answers if len(answers) <= _FEW else None)
    return train, test


def hub_answers() -> bool:
    """Whether the hub can be reached now; asked first, as its own libraries retry for half a minute without it."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PROBE_SECONDS)
    # Whatever the HTTP library raises, offline mode included, the hub did not answer.
    except Exception as error:
        logger.info("The Hugging Face hub does not answer: %s", error)
        return False
    return True


def access_trouble(repository: str, kind: str = "model") -> str | None:
    """Why a repository of the hub cannot be had, and the mend, in one sentence; ``None`` if it can.

    Args:
        kind: "model" or "dataset".
    """
    try:
        huggingface_hub.HfApi().auth_check(repository, repo_type=kind)
    except HfHubHTTPError.__bases__ as error:  # the HTTP library's own, which there are without an answer, and OSError
        return refusal(repository, error) or f"{repository} cannot be had from the hub ({type(error).__name__})."
    return None


def refusal(repository: str, error: BaseException | None) -> str | None:
    """What to do about a repository that the hub refused, if ``error`` or what caused it says so; else ``None``."""
    seen = []
    while error is not None and error not in seen:
        if isinstance(error, GatedRepoError):
            return (
                f"{repository} is gated: accept the terms on its page on the hub, then log in with "
                "`hf auth login` or set HF_TOKEN."
            )
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"The hub has no {repository}, or shows it to its members alone: check the name, and log in with "
                "`hf auth login` or set HF_TOKEN."
            )
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def _load(path: str, mirror: str | Path | None, task: str, **arguments):
    import datasets  # here: it is only needed for the hub and takes a second to import

    location = path if mirror is None else str(Path(mirror) / path)
    if mirror is not None and not Path(location).is_dir():
        raise DownloadError(f"Task {task} needs the data set {path}, and {location} does not exist: copy it there.")
    # In offline mode the library looks into its cache at once, which is what was asked for.
    if mirror is None and not huggingface_hub.constants.HF_HUB_OFFLINE and not hub_answers():
        raise DownloadError(
            f"Task {task} needs the data set {path} from the Hugging Face hub, which does not answer: check the "
            "network, or set HF_HUB_OFFLINE=1 if an earlier run has cached it, or leave the task out."
        )
    try:
        return datasets.load_dataset(location, **arguments)
    # `datasets` passes on errors of half a dozen libraries (connection, HTTP status, missing repository, offline
    # mode, broken file); to the reader they all mean that this data set cannot be had now.
    except Exception as error:
        if advice := refusal(path, error):
            raise DownloadError(f"Task {task}: {advice}") from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DownloadError(
            f"Task {task} needs the data set {path} from the Hugging Face hub, which could not be read ({reason}): "
            "check the network and your access, or leave the task out."
        ) from error


def _parts(examples: dict[str, list[Example]], task: str, path: str) -> tuple[list[Example], list[Example] | None]:
    if not examples.get("train"):
        raise DataError(f"The data set {path} has no training examples for {task}: it is not the expected one.")
    return examples["train"], examples.get("test")


def _examples(task: Task, split: str, rows: Iterable[dict]) -> list[Example]:
    examples = []
    for index, row in enumerate(rows):
        fields = _flatten(row)
        try:
            prompt = task.prompt_template.format(**fields)
            response = task.response_template.format(**fields)
        except KeyError as error:
            raise DataError(
                f"The data set {task.hub_path} has no field {error} for task {task.name}; it has {', '.join(fields)}."
            ) from error
        examples.append(_example(task, f"{split}/{index}", f"[INST] {prompt} [/INST]\n", response.strip()))
    return _answered(examples)


def _answered(examples: list[Example]) -> list[Example]:
    """Without the few rows of alpaca that have no answer: there is nothing to learn or to score in them."""
    return [example for example in examples if example["response"].strip()]


def _flatten(row: dict) -> dict:
    """A row's fields by the templates' names: translations side by side, alpaca's input below its instruction."""
    if "translation" in row:
        return row["translation"]
    if row.get("input"):
        return {**row, "instruction": f"{row['instruction']}\n{row['input']}"}
    return row


def _example(task: Task, identifier: str, prompt: str, response: str) -> Example:
    return {
        "task": task.name, "id": f"{task.name}/{identifier}", "prompt": prompt, "response": response, "choices": None,
    }  # fmt: skip


def _field(row: dict, name: str, task: Task) -> str:
    if name not in row:
        raise DataError(f"The data set {AUTHORS_DATASET} has no field {name!r} for task {task.name}.")
    return row[name]
