"""What a run remembers of each notebook: what it was made from, and what it left; hence what need not run again.

A record exists only for a notebook that ran to its end: ``artifacts/<profile>/stages/NN.json``. While it runs there is
``NN.started.json`` instead, so that an interruption, of whatever kind, leaves nothing that looks finished.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.prepare import MANIFEST
from meteora.adapters import file_sha256
from meteora.study.artifacts import NOTEBOOKS, Stage, Workspace, existing_stages, versions, write_json
from meteora.study.profiles import REPOSITORY

PACKAGE_FOLDERS = {"meteora.kernels": "kernels", "meteora": "meteora", "data_prep": "data_prep"}
FACTS = ("started", "seconds", "device", "git_revision", "versions")  # of a run of a notebook, beside what it was made from
# Values of a profile that no result depends on.
_NOT_INPUTS = ("root", "cache", "description", "needs")


class RunError(RuntimeError):
    """A run that cannot start or go on; the message is one sentence that says what and where."""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _module_file(module: str) -> Path | None:
    """The source of one of this project's modules, or ``None`` if the name is not one."""
    for package, folder in PACKAGE_FOLDERS.items():
        if module == package or module.startswith(f"{package}."):
            path = REPOSITORY / folder / Path(*module.removeprefix(package).strip(".").split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.is_file():
                    return candidate
            return None
    return None


def _imported(code: str, module: str = "", is_package: bool = False) -> Iterator[str]:
    """Dotted names that ``code``, the source of ``module``, may import: all of them, also those inside functions."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def sources_of(code: str) -> list[Path]:
    """The project's source files that ``code`` imports, directly or through others, sorted."""
    found: set[Path] = set()
    try:
        queue = list(_imported(code))
    except SyntaxError:  # what only IPython understands, such as a top-level await: then all of them
        return sorted(p for folder in PACKAGE_FOLDERS.values() for p in (REPOSITORY / folder).rglob("*.py"))
    while queue:
        module = queue.pop()
        parents = module.split(".")
        for name in (".".join(parents[: i + 1]) for i in range(len(parents))):
            path = _module_file(name)
            if path is not None and path not in found:
                found.add(path)
                queue.extend(_imported(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"))
    return sorted(found)


def notebook_code(notebook: Path) -> str:
    """All code of a notebook, without IPython's % and ! lines."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _hash_files(paths: Iterable[Path]) -> str:
    return _digest([(os.path.relpath(p, REPOSITORY), hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths])


class Records:
    """The records of one profile's run of the notebooks in a folder."""

    def __init__(self, workspace: Workspace, notebooks: Path = NOTEBOOKS) -> None:
        self.workspace = workspace
        self.notebooks = notebooks
        self.folder = workspace.artifacts / "stages"

    def _path(self, stage: Stage, suffix: str = "") -> Path:
        return self.folder / f"{stage.number}{suffix}.json"

    def read(self, stage: Stage, suffix: str = "") -> dict[str, Any] | None:
        """The record of a stage that has ended, or ``None`` if there is none that can be read."""
        try:
            found = json.loads(self._path(stage, suffix).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = suffix or (isinstance(found, dict) and {"started", "inputs", "outputs"} <= found.keys())
        return found if whole else None

    def peak(self, stage: Stage) -> dict[str, Any] | None:
        """The most memory that a stage's process has held: ``memory`` (GPU or main) and ``bytes``, if it said so."""
        return self.read(stage, ".peak")

    def inputs(self, stage: Stage) -> dict[str, str]:
        """A digest of each thing that decides a stage's results, by a name that can be shown."""
        profile = self.workspace.profile
        notebook = self.notebooks / f"{stage.notebook}.ipynb"
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        digests = {
            "the notebook": _digest([(cell["cell_type"], "".join(cell["source"])) for cell in cells]),
            "the profile": _digest({k: v for k, v in profile.to_dict().items() if k not in _NOT_INPUTS}),
            "the source code": _hash_files(sources_of(notebook_code(notebook))),
            "the installed packages": _digest(versions()),
        }
        if stage.number == "01":
            settings = (profile.adapters, profile.lora_b, profile.lora_f)
            settings = [s for s in settings if s is not None and s.path is not None]
            folders = [s.path for s in settings] + [Path(s.place(task)) for s in settings for task in profile.tasks]
            files = sorted({f for folder in folders if folder.is_dir() for f in folder.rglob("*") if f.is_file()})
            digests["the adapters' files"] = _hash_files(files)
            if state := profile.model.state():
                digests["the model's files"] = _digest(state)
        for earlier in existing_stages(self.notebooks, profile):
            if earlier.number in stage.needs:
                record = self.read(earlier)
                run = [record["inputs"], record["started"]] if record else None
                digests[f"the run of {earlier.notebook}"] = _digest(run)
        return digests

    def why_run(self, stage: Stage) -> str | None:
        """Why a stage has to run, as half a sentence; ``None`` if what its last run left is still right."""
        record = self.read(stage)
        if record is None:
            return "it was interrupted or failed" if self._path(stage, ".started").exists() else "it has not run yet"
        gone = [name for name in record["outputs"] if not (self.workspace.root / name).exists()]
        if gone:
            return f"{gone[0]} is gone" + (f", with {len(gone) - 1} more" if len(gone) > 1 else "")
        damaged = self._damaged(record.get("left", {}))
        if damaged is not None:
            return f"{damaged.relative_to(self.workspace.root)} is not what it left"
        now = self.inputs(stage)
        changed = [name for name in now if now[name] != record["inputs"].get(name)]
        return f"{' and '.join(changed)} changed" if changed else None

    def _damaged(self, left: Mapping[str, Any]) -> Path | None:
        """The first of the weights and the manifest that a stage left which is gone, or another one now."""
        artifacts = self.workspace.artifacts
        for name, sha256 in left.get("files", {}).items():
            if not (artifacts / name).is_file() or file_sha256(artifacts / name) != sha256:
                return artifacts / name
        manifest = artifacts / "data" / MANIFEST
        try:
            same = "data" not in left or json.loads(manifest.read_text(encoding="utf-8")) == left["data"]
        except (OSError, ValueError):
            same = False
        return None if same else manifest

    def start(self, stage: Stage) -> None:
        """Note that a stage is running; from here on its earlier record is not trusted."""
        earlier = self.read(stage) or self.read(stage, ".started") or {}
        write_json(self._path(stage, ".started"), {"inputs": self.inputs(stage), "outputs": earlier.get("outputs", [])})
        self._path(stage).unlink(missing_ok=True)

    def stop(self, stage: Stage) -> None:
        """After a failure: note what the stage has left so far, so that ``forget`` can remove it."""
        started = self.read(stage, ".started")
        if started is not None:
            write_json(self._path(stage, ".started"), started | {"outputs": self._outputs(stage)})

    def finish(self, stage: Stage, seconds: float, **facts: Any) -> dict[str, Any]:
        """Note that a stage ran to its end."""
        record = {
            "notebook": stage.notebook,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - seconds)),
            "seconds": round(seconds, 1),
            **facts,
            "inputs": (self.read(stage, ".started") or {})["inputs"],
            "outputs": self._outputs(stage),
            "left": self._left(stage),
        }
        write_json(self._path(stage), record)
        self._path(stage, ".started").unlink()
        return record

    def adopt(self, stage: Stage, ran: Mapping[str, Any]) -> None:
        """Note that a stage ran elsewhere, and that what it leaves is here: it need not run.

        Args:
            ran: what the manifest of that run says of it (`FACTS` and ``peak``).
        """
        what = {"notebook": stage.notebook} | {fact: ran.get(fact) for fact in FACTS}
        self._path(stage, ".started").unlink(missing_ok=True)
        write_json(self._path(stage, ".peak"), ran.get("peak"))
        write_json(self._path(stage), what | {"inputs": self.inputs(stage), "outputs": [], "left": self._left(stage)})

    def forget(self, stages: Iterable[Stage]) -> None:
        """Remove the records of these stages, and the files they say were left."""
        for stage in stages:
            for suffix in ("", ".started"):
                for name in (self.read(stage, suffix) or {}).get("outputs", []):
                    (self.workspace.root / name).unlink(missing_ok=True)
                self._path(stage, suffix).unlink(missing_ok=True)

    def forget_everything(self) -> None:
        """As ``forget`` for all stages; whatever else lies in artifacts/<profile> goes as well."""
        self.forget(existing_stages(self.notebooks))
        shutil.rmtree(self.workspace.artifacts, ignore_errors=True)

    def _outputs(self, stage: Stage) -> list[str]:
        """Files that were written since the stage started, or were its outputs before and still exist."""
        marker = self._path(stage, ".started")
        # The kernel's own times of change: a copied file keeps its time of modification, but not this one.
        since = marker.stat().st_ctime_ns
        before = (self.read(stage, ".started") or {}).get("outputs", [])
        names = {name for name in before if (self.workspace.root / name).exists()}
        workspace = self.workspace
        made = ("data", "data_all", "adapters", "gates", "merged", "xlora", "predictions", "ablations")
        folders = [workspace.artifacts / name for name in made]
        folders += [workspace.results / name for name in ("metrics", "figures", "tables")]
        for folder in folders:
            for path in folder.rglob("*"):
                hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
                if path.is_file() and not hidden and path.stat().st_ctime_ns >= since:
                    names.add(str(path.relative_to(workspace.root)))
        names.add(str((workspace.notebooks / f"{stage.notebook}.html").relative_to(workspace.root)))
        return sorted(names)

    def provenance(self) -> dict[str, Any]:
        """What the results were made from, as the stages that left it noted at their end, wherever it lies now.

        ``data`` is the manifest of the examples; ``files`` are the adapters' and gates' sha256.
        """
        data, files = None, {}
        for stage in existing_stages(self.notebooks):
            left = (self.read(stage) or {}).get("left", {})
            data = left.get("data", data)
            files |= left.get("files", {})
        return {"data": data, "files": files}

    def _left(self, stage: Stage) -> dict[str, Any]:
        """The manifest of examples and the sha256 of weights among what a stage must leave."""
        paths, manifest = self.workspace.left_by(stage.number), self.workspace.artifacts / "data" / MANIFEST
        weights = sorted(file for path in paths for file in path.rglob("*.safetensors"))
        data = {"data": json.loads(manifest.read_text(encoding="utf-8"))} if manifest in paths else {}
        return data | {"files": {str(p.relative_to(self.workspace.artifacts)): file_sha256(p) for p in weights}}
