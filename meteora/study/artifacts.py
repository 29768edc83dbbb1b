"""Where a run's files go, which notebook leaves which, and how they are written: whole or not at all.

Importing this takes neither torch nor matplotlib, so that a run with nothing to do ends at once.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora.study.profiles import REPOSITORY, Profile, load_profile

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas
    import torch

NOTEBOOKS = REPOSITORY / "notebooks"
# The packages whose version can change a result.
PACKAGES = (
    "meteora", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "pandas",
    "datasets", "gguf", "sacrebleu", "rouge-score", "matplotlib", "seaborn",
)  # fmt: skip


class ArtifactError(RuntimeError):
    """A file of an earlier notebook is missing; the message names the notebook to run."""


@dataclass(frozen=True)
class Stage:
    """A notebook, the stages it builds on, and what it must leave below artifacts/<profile> or results/<profile>.

    Attributes:
        section: of the profile, without which the stage is no part of its run.
    """

    notebook: str
    needs: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    section: str | None = None

    @property
    def number(self) -> str:
        return self.notebook[:2]


STAGES = {
    stage.number: stage
    for stage in (
        Stage("00_concepts"),
        Stage("01_adapter_collection", (), ("artifacts/data/manifest.json", "artifacts/adapters")),
        Stage("02_gate_training", ("01",), ("artifacts/gates", "results/metrics/gate_training.csv")),
        Stage("03_independent_evaluation", ("01", "02"), ("results/metrics/independent.csv",)),
        Stage("04_composite_evaluation", ("01", "02"), ("results/metrics/composite.csv",)),
        Stage("05_kernel_benchmark", ("01",), ("results/metrics/benchmark.csv",)),
        Stage("06_ablations", ("01", "02"), ("results/metrics/ablations.csv",), section="ablations"),
        Stage("07_report", ("00", "01", "02", "03", "04", "05", "06"), ()),
    )
}


def find_stage(name: str) -> Stage:
    """The stage of a number (``"02"`` or ``"2"``) or of a notebook's name."""
    number = name[:2].zfill(2)
    if not name or number not in STAGES or (len(name) > 2 and name.removesuffix(".ipynb") != STAGES[number].notebook):
        known = ", ".join(stage.notebook for stage in STAGES.values())
        raise ArtifactError(f"there is no notebook {name!r}; there are {known}.")
    return STAGES[number]


def existing_stages(notebooks: Path = NOTEBOOKS, profile: Profile | None = None) -> list[Stage]:
    """The stages whose notebooks are in that folder, in the order in which they run.

    With ``profile``, those alone for which it has the section that they are about.
    """
    stages = [stage for stage in STAGES.values() if (notebooks / f"{stage.notebook}.ipynb").is_file()]
    return [s for s in stages if profile is None or s.section is None or getattr(profile, s.section) is not None]


def left_out(profile: Profile, notebooks: Path = NOTEBOOKS) -> dict[str, str]:
    """Number -> a sentence, for every stage whose notebook is in that folder and that is no part of a profile's run."""
    parts = existing_stages(notebooks, profile)
    return {
        s.number: f"{s.notebook} is no part of profile {profile.name!r}, which has no section {s.section!r}"
        for s in existing_stages(notebooks)
        if s not in parts
    }


class Workspace:
    """The folders of one profile's run. Folders are made when they are first asked for.

    Args:
        profile: a profile, or its name or path.
        root: holds artifacts/ and results/; default is the profile's ``root``, else the repository.
    """

    def __init__(self, profile: Profile | str | Path, root: str | Path | None = None) -> None:
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        self.root = REPOSITORY / Path(root or self.profile.root or ".").expanduser()
        self.artifacts = self.root / "artifacts" / self.profile.name
        self.results = self.root / "results" / self.profile.name

    data = property(lambda self: _made(self.artifacts / "data"), doc="Prepared examples: <task>/<split>.jsonl.")
    adapters = property(lambda self: _made(self.artifacts / "adapters"), doc="PEFT directories, one per adapter.")
    gates = property(lambda self: _made(self.artifacts / "gates"), doc="The trained MeteoRA checkpoint.")
    predictions = property(lambda self: _made(self.artifacts / "predictions"), doc="Answers, reused while they hold.")
    metrics = property(lambda self: _made(self.results / "metrics"), doc="Tidy CSV, one row a measurement.")
    figures = property(lambda self: _made(self.results / "figures"), doc="SVG and PNG.")
    tables = property(lambda self: _made(self.results / "tables"), doc="Markdown and LaTeX.")
    notebooks = property(lambda self: _made(self.results / "notebooks"), doc="Executed notebooks as HTML.")

    def left_by(self, stage: str) -> list[Path]:
        """The paths that a stage must leave."""
        below = {"artifacts": self.artifacts, "results": self.results}
        parts = (name.split("/", 1) for name in find_stage(stage).leaves)
        return [below[top] / rest for top, rest in parts]

    def require(self, *stages: str) -> None:
        """Raise unless the notebooks of these stages (``"01"``) have left what later ones build on."""
        for name in stages:
            stage = find_stage(name)
            command = f"./run_all.sh --profile {self.profile.name} --only {stage.number}"
            for path in self.left_by(name):
                if not path.exists() or (path.is_dir() and not any(path.iterdir())):
                    raise ArtifactError(
                        f"{_relative(path, self.root)} is missing: run notebook {stage.notebook} first, with "
                        f"profile {self.profile.name!r} ({command})."
                    )

    def write_csv(self, path: str | Path, rows: pandas.DataFrame | Iterable[Mapping[str, Any]]) -> Path:
        """Write a data frame or a list of dicts; a relative path starts at ``metrics``."""
        import pandas

        frame = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(list(rows))
        return write_text(self.metrics / path, frame.to_csv(index=False, lineterminator="\n"))

    def write_json(self, path: str | Path, value: Any) -> Path:
        """Write JSON; a relative path starts at results/<profile>."""
        return write_json(_made(self.results) / path, value)

    def write_table(self, name: str, text: str) -> Path:
        """Write a Markdown or LaTeX table as ``tables/<name>``, such as ``table1.md``."""
        return write_text(self.tables / name, text)

    def save_figure(self, figure: matplotlib.figure.Figure, name: str) -> tuple[Path, Path]:
        """Write ``figures/<name>.svg`` and ``.png``; the same figure gives the same bytes."""
        import matplotlib

        paths = []
        for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            buffer = io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": name}):
                figure.savefig(buffer, format=suffix, bbox_inches="tight", **options)
            paths.append(write_bytes(self.figures / f"{name}.{suffix}", buffer.getvalue()))
        return paths[0], paths[1]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file under a temporary name beside it, then rename: a reader finds the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """As `write_bytes`, in UTF-8."""
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> Path:
    """As `write_bytes`; tuples become lists, paths text."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def versions() -> dict[str, str]:
    """Package -> installed version, of Python and of every package that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str = "auto") -> str:
    """The GPU's name, or the CPU's with the number of cores this process may use."""
    if pick_device(device).type == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({cores} cores)"


def pick_device(device: str = "auto") -> torch.device:
    """The device to compute on; ``auto`` takes a GPU if there is one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ArtifactError("the profile asks for device 'cuda', but torch sees no GPU; set device: auto or cpu.")
    return torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def peak_bytes(device: torch.device) -> int:
    """The most memory that was held so far: on a GPU what torch had allocated there, else what the process occupied."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(workspace: Workspace, stage: str, device: torch.device) -> str:
    """`peak_bytes` in words; kept for the manifest as that of a stage."""
    kind, peak = "GPU" if device.type == "cuda" else "main", peak_bytes(device)
    write_json(workspace.artifacts / "stages" / f"{stage}.peak.json", {"memory": kind, "bytes": peak})
    return f"peak of {kind} memory: {peak / 1e9:.1f} GB"


def set_up(profile: Profile) -> torch.device:
    """Seed every generator, set the number of threads, and return the device: the first thing a notebook does."""
    import numpy
    import torch

    random.seed(profile.seed)
    numpy.random.seed(profile.seed)
    torch.manual_seed(profile.seed)
    if profile.threads:
        torch.set_num_threads(profile.threads)
    return pick_device(profile.model.device)
