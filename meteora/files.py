"""Files of tensors; directories that appear complete or not at all (one that is replaced, in a few renamings)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file of safetensors that whoever may read the files beside it may read.

    Those that `safetensors.torch.save_file` writes only their owner can.
    """
    file.write_bytes(save(tensors, metadata))


@contextmanager
def atomic_directory(path: str | Path, own: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``path`` if the block ends well, and is gone if it does not.

    What lies at ``path`` stays readable inside the block. A link is followed: what it points to is replaced.

    Args:
        own: names of what the block may write. A directory at ``path`` then stays, with everything else in it, and these
            entries alone are replaced. The first, by which the directory is known to be whole, goes first and comes last.
    """
    path = Path(path).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each call: what a killed process left is no obstacle.
    # Inside what stays: it may be a mount point, or all that may be written to.
    inside = path if own is not None and path.is_dir() else path.parent
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=inside))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    try:
        yield new
        if not new.is_dir():
            raise FileNotFoundError(f"{path} was removed while it was being written to; save again.")
        if own is None or not path.exists():
            _swap([(path, old)], [(new, path)])
        else:
            old.mkdir()
            away = [(path / name, old / name) for name in own]
            _swap(away, [(new / name, path / name) for name in reversed(own)])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(away: Sequence[tuple[Path, Path]], here: Sequence[tuple[Path, Path]]) -> None:
    """Move what there is from the first places to the second, in this order, or, if that fails, nothing at all."""
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in [*away, *here]:
            if os.path.lexists(source):
                moved.append((source, target))  # before it is: an interrupt may come right after
                os.replace(source, target)
    except BaseException:
        for source, target in reversed(moved):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        raise
