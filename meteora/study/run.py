"""``meteora-study``: runs the notebooks of a profile in order, and only those whose inputs have changed."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from data_prep.errors import DataError
from meteora.study.artifacts import (
    NOTEBOOKS,
    ArtifactError,
    Stage,
    Workspace,
    device_name,
    existing_stages,
    find_stage,
    left_out,
    versions,
)
from meteora.study.locking import hold
from meteora.study.plan import describe
from meteora.study.profiles import REPOSITORY, Profile, ProfileError, load_profile, profile_names
from meteora.study.records import FACTS, Records, RunError


def select_stages(
    start: str | None, only: str | None, notebooks: Path = NOTEBOOKS, profile: Profile | None = None
) -> list[Stage]:
    """The stages to run: all whose notebooks exist, those from ``start`` on, or ``only`` one.

    Args:
        profile: leaves out the stages for which it has no section.

    Raises:
        RunError: if the notebook that was asked for does not exist, or is ``only`` one and no part of the profile.
    """
    stages = existing_stages(notebooks)
    for wanted in (start, only):
        if wanted is not None and find_stage(wanted) not in stages:
            raise RunError(f"there is no notebook {wanted!r} in {notebooks}; there are {_names(stages)}.")
    stages = existing_stages(notebooks, profile)
    if only is not None and find_stage(only) not in stages:
        raise RunError(f"{left_out(profile, notebooks)[find_stage(only).number]}; give it one, or choose another.")
    if only is not None:
        return [find_stage(only)]
    return [stage for stage in stages if start is None or stage.number >= find_stage(start).number]


def _names(stages: Sequence[Stage]) -> str:
    return ", ".join(stage.notebook for stage in stages) or "none"


def run_study(
    workspace: Workspace,
    stages: Sequence[Stage],
    *,
    profile_source: str,
    notebooks: Path = NOTEBOOKS,
    fresh: bool = False,
    out: TextIO = sys.stdout,
) -> dict[str, float | None]:
    """Run the stages that have to; stop at the first that fails.

    Args:
        profile_source: name or path of the profile, as the notebooks get it.
        fresh: first forget what earlier runs of these stages left (all of artifacts/<profile> if these are all stages).
        out: where the progress is told.

    Returns:
        Notebook -> seconds it took, ``None`` if it was skipped.
    """
    records = Records(workspace, notebooks)
    seconds: dict[str, float | None] = {}
    with hold(workspace):
        if fresh and list(stages) == existing_stages(notebooks, workspace.profile):
            records.forget_everything()
        elif fresh:
            records.forget(stages)
        for i, stage in enumerate(stages, 1):
            reason = records.why_run(stage)
            head = f"[{i}/{len(stages)}] {stage.notebook}"
            if reason is None:
                print(f"{head}: skipped, nothing it depends on has changed", file=out, flush=True)
                seconds[stage.notebook] = None
                continue
            print(f"{head}: running, as {reason}", file=out, flush=True)
            for earlier in existing_stages(notebooks, workspace.profile):
                if earlier.number in stage.needs and earlier not in stages and records.why_run(earlier) is not None:
                    print(f"  note: {earlier.notebook} is not up to date and not part of this run", file=out)
            seconds[stage.notebook] = _run_stage(stage, workspace, records, profile_source)
            print(f"  done in {_duration(seconds[stage.notebook])}", file=out, flush=True)
            write_manifest(workspace, records)
    return seconds


def _run_stage(stage: Stage, workspace: Workspace, records: Records, profile_source: str) -> float:
    from meteora.study.execute import run_notebook  # takes a second to import, which a run of skips saves

    records.start(stage)
    made_by = {"git_revision": git_revision(), "versions": versions()}  # a checkout may change while a notebook runs
    begin = time.perf_counter()
    try:
        run_notebook(
            records.notebooks / f"{stage.notebook}.ipynb",
            workspace.artifacts / "notebooks" / f"{stage.notebook}.ipynb",
            workspace.notebooks / f"{stage.notebook}.html",
            {"profile": profile_source},
        )
        for path in workspace.left_by(stage.number):
            if not path.exists():
                raise RunError(f"{stage.notebook} ended without leaving {path}; it must write it.")
        taken = time.perf_counter() - begin
        records.finish(stage, taken, device=device_name(workspace.profile.model.device), **made_by)
        return taken
    finally:
        records.stop(stage)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def git_revision() -> str | None:
    """The checked-out commit, with ``+`` if files differ from it; ``None`` outside a git checkout.

    What a run itself writes, ``results/``, does not count.
    """
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", ":!results"))
        )
        return commit + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_manifest(workspace: Workspace, records: Records) -> Path:
    """``results/<profile>/manifest.json``: what the results there were made from, on what, and how long it took.

    Revision, versions and device stand there once more for each notebook, as not all may have been run by one command.
    """
    notebooks = {
        stage.notebook: {fact: ran.get(fact) for fact in FACTS} | {"peak": records.peak(stage)}
        for stage in existing_stages(records.notebooks)
        if (ran := records.read(stage)) is not None
    }
    return workspace.write_json(
        "manifest.json",
        {
            "git_revision": git_revision(),
            "profile": workspace.profile.to_dict(),
            "seed": workspace.profile.seed,
            "versions": versions(),
            "device": device_name(workspace.profile.model.device),
            "notebooks": notebooks,
            "inputs": records.provenance(),
        },
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="meteora-study", description=__doc__, allow_abbrev=False)
    parser.add_argument("--profile", default="laptop", metavar="NAME", help="a profile's name or .yaml file (laptop)")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--from", dest="start", metavar="NN", help="begin with this notebook, such as 02")
    some.add_argument("--only", metavar="NN", help="run this notebook alone")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs of these notebooks left")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and downloaded; start nothing")
    parser.add_argument("--readme", action="store_true", help="bring the READMEs' tables up to date; run nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 failed, 2 bad arguments, 130 interrupted."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a kill, too, ends the notebook's process
    begin = time.perf_counter()
    try:
        if options.readme:
            from meteora.study.readme import update  # pandas and scipy, which a run of skips does without

            print(f"{' and '.join(changed)} changed" if (changed := update()) else "the READMEs are up to date")
            return 0
        workspace = Workspace(load_profile(options.profile))
        stages = select_stages(options.start, options.only, profile=workspace.profile)
        if options.dry_run:
            print(describe(workspace, stages, fresh=options.fresh))
            return 0
        print(f"Profile {workspace.profile.name}: {workspace.profile.description}")
        if options.only is None:
            for sentence in left_out(workspace.profile).values():
                print(f"  {sentence}")
        # the notebooks run in a folder of their own, where a relative path would lead elsewhere
        source = options.profile if options.profile in profile_names() else str(Path(options.profile).resolve())
        seconds = run_study(workspace, stages, profile_source=source, fresh=options.fresh)
    except (ProfileError, ArtifactError, RunError, DataError, OSError) as error:
        return _fail(error, 2 if isinstance(error, (ProfileError, ArtifactError)) else 1)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on with the notebook that was running.", file=sys.stderr)
        return 130
    ran = {name: taken for name, taken in seconds.items() if taken is not None}
    print(f"{len(ran)} of {len(seconds)} notebooks ran, {_duration(time.perf_counter() - begin)} in all; see")
    print(f"  {workspace.results}")
    return 0


def _fail(error: BaseException, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
