"""Who may write a profile's files: one run of its notebooks, or the processes that answer for it together."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from meteora.study.artifacts import Workspace
from meteora.study.records import RunError


@contextmanager
def hold(workspace: Workspace, *, together: bool = False) -> Iterator[None]:
    """Hold the profile's lock: two runs at once would overwrite each other's files.

    Args:
        together: with any number of others who hold it so, as each writes files of its own.

    Raises:
        RunError: if somebody holds it.
    """
    folder = workspace.root / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{workspace.profile.name}.lock", "w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if together else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"another run of profile {workspace.profile.name!r} is under way; wait for it, or end it."
            ) from error
        yield
