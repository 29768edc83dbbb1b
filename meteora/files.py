"""Directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_replaceable(path: str | Path) -> None:
    """Raise ``FileExistsError`` for a directory that :func:`atomic_directory` cannot replace."""
    path = Path(path).expanduser().resolve()
    if path.exists() and Path.cwd().is_relative_to(path):
        raise FileExistsError(f"{path} holds the working directory, which cannot be replaced; choose another directory.")


@contextmanager
def atomic_directory(path: str | Path, own: Collection[str] | None = None) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``path`` if the block ends well, and is gone if it does not.

    What lies at ``path`` stays readable inside the block. A link is followed: what it points to is replaced.

    Args:
        own: names of what may be written. Everything else at ``path`` is kept; without ``own``, nothing is.

    Raises:
        FileExistsError: if ``path`` is, or holds, the working directory, which would be another one then.
    """
    path = Path(path).expanduser().resolve()
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(new, ignore_errors=True)  # a killed process of the same number, as in a container, may have left one
    new.mkdir()
    try:
        yield new
        if own is not None and path.is_dir():
            for entry in path.iterdir():
                if entry.name not in own and not (new / entry.name).exists():
                    _keep(entry, new / entry.name)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _keep(entry: Path, new: Path) -> None:
    """Put a file, link or folder into another place as well, its files by links to the same bytes where there are such."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, new, symlinks=True, copy_function=_link)
    else:
        _link(entry, new)


def _link(source: str | Path, new: str | Path, *, follow_symlinks: bool = False) -> None:
    try:
        os.link(source, new, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without such links
        shutil.copy2(source, new, follow_symlinks=False)
