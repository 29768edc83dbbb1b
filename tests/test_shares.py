"""Answers of notebooks 03 and 04 by several processes: every file is one process's, and as one alone gives it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meteora.study import shares
from meteora.study.artifacts import NOTEBOOKS, ArtifactError, Workspace
from meteora.study.locking import hold
from meteora.study.predictions import PredictionFile
from meteora.study.profiles import PROFILES, load_profile
from meteora.study.records import RunError
from meteora.study.shares import Place, answer_share, main, own_device, share

DDP = Path(__file__).parents[1] / "examples" / "accelerate" / "ddp.yaml"

# What `-m meteora.study.shares` runs, and notes which process has written a file, or trained something.
SCRIPT = """
import os, runpy
from meteora import training_loop
from meteora.study import predictions

log = open(f"process-{os.environ['RANK']}.txt", "w")
write, begin = predictions._write, training_loop.TrainingRun.__init__

def noted_write(path, header, rows):
    print("wrote", path, file=log, flush=True)
    write(path, header, rows)

def noted_begin(self, *arguments, **options):
    print("trained", file=log, flush=True)
    begin(self, *arguments, **options)

predictions._write, training_loop.TrainingRun.__init__ = noted_write, noted_begin
runpy.run_module("meteora.study.shares", run_name="__main__")
"""


@pytest.fixture(scope="module")
def prepared(collected, tmp_path_factory) -> Path:
    """A folder with what notebooks 01 and 02 leave for profile smoke."""
    return collected(Workspace(smoke(tmp_path_factory.mktemp("prepared"))), train=48).root


def smoke(root: Path) -> Path:
    """Profile smoke, smaller, with tasks that share batches, and artifacts and results in ``root``: the file."""
    settings = yaml.safe_load((PROFILES / "smoke.yaml").read_text(encoding="utf-8")) | {"root": str(root)}
    methods = ["base", "peft", "lora_b", "meteora_top2"]
    settings["evaluation"] |= {"methods": [*methods, "ties", "xlora", "lorahub"], "batch_size": 16}
    settings["composite"] |= {"methods": methods, "protocols": ["numbered", "sequential"], "zero_shot": ["numbered"]}
    settings["composite"] |= {"sizes": {2: ["toy_echo", "toy_parity"]}, "temperature": {2: 15}}
    del settings["ablations"]  # for which two tasks are too few
    path = root / "smoke.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def copied(prepared: Path, root: Path) -> Workspace:
    shutil.copytree(prepared, root)
    return Workspace(smoke(root))


def predictions(workspace: Workspace) -> dict[str, bytes]:
    folder = workspace.predictions
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jsonl")}


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory) -> Workspace:
    """The answers of one process."""
    workspace = copied(prepared, tmp_path_factory.mktemp("alone") / "study")
    assert main(["--profile", str(workspace.root / "smoke.yaml")]) == 0
    return workspace


def test_two_processes_give_the_answers_of_one(prepared, alone, tmp_path):
    workspace = copied(prepared, tmp_path / "study")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch(tmp_path / "script.py", "--profile", workspace.root / "smoke.yaml", cwd=tmp_path)
    notes = [(tmp_path / f"process-{number}.txt").read_text().splitlines() for number in (0, 1)]
    first, second = ({line for line in lines if line.startswith("wrote")} for lines in notes)
    assert first and second and not first & second
    expected = predictions(alone)
    assert len(first) + len(second) == len(expected) and predictions(workspace) == expected
    assert sum(lines.count("trained") for lines in notes) == 1, "one process trains the classifier, the other waits"


def launch(script: Path, *arguments, cwd: Path) -> None:
    """``accelerate launch`` of two processes on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", "from accelerate.commands.accelerate_cli import main; main()", "launch"]
    command = [*program, "--config_file", DDP, "--main_process_port", port, script, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("number", ["03", "04"])
def test_a_notebook_finds_all_its_answers(alone, number, monkeypatch):
    """Its own cells are run, up to the one in which the methods answer."""
    monkeypatch.setattr(PredictionFile, "add", lambda file, batch: pytest.fail(f"{file.path} is written again"))
    (notebook,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    _, *sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")  # the first: the parameter
    last = next(i for i, source in enumerate(sources) if "predictions_dir" in source)
    names = {"profile": str(alone.root / "smoke.yaml")}
    for source in sources[: last + 1]:
        exec(source, names)


def test_any_number_of_processes_goes_on_where_others_have_stopped(alone, tmp_path):
    shutil.copytree(alone.root, tmp_path / "study")
    workspace = Workspace(smoke(tmp_path / "study"))
    expected = predictions(workspace)
    lost = [path for path in sorted(workspace.predictions.rglob("*.jsonl")) if path.stem in ("toy_parity", "base")]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in workspace.predictions.rglob("*.jsonl")}
    for process in range(3):
        answer_share(workspace, Place(process, 3, 0))
    assert predictions(workspace) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


# The shares ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000)), st.integers(1, 12))
def test_every_piece_has_one_process_and_none_has_much_more_to_do_than_another(costs, processes):
    given_away = [share(costs, process, processes) for process in range(processes)]
    assert sorted(i for mine in given_away for i in mine) == list(range(len(costs)))
    loads = [sum(costs[i] for i in mine) for mine in given_away]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_no_process_has_a_method_of_every_task(processes):
    methods, tasks = 12, 28
    costs = [1000 - task for _ in range(methods) for task in range(tasks)]
    for process in range(processes):
        of_method = [sum(i // tasks == m for i in share(costs, process, processes)) for m in range(methods)]
        assert sum(of_method) == methods * tasks / processes and max(of_method) < 0.75 * tasks


# Devices and errors --------------------------------------------------------------------------------------------------


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    profile = load_profile("smoke")
    assert own_device(profile, 1) == torch.device("cpu") and not taken, "as the profile asks for it"
    profile = dataclasses.replace(profile, model=dataclasses.replace(profile.model, device="auto"))
    assert own_device(profile, 1) == torch.device("cuda", 1) and taken == [1]
    with pytest.raises(ArtifactError, match="more processes than GPUs here; give accelerate --num_processes 2"):
        own_device(profile, 2)


def test_the_place_is_taken_out_of_the_environment(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert shares.take_place() == (5, 8, 1)
    assert shares.take_place() == (0, 1, 0)


def test_nobody_answers_while_notebooks_run_nor_the_other_way_round(tmp_path, caplog):
    workspace = Workspace(smoke(tmp_path))
    with hold(workspace):
        assert main(["--profile", str(smoke(tmp_path))]) == 2
    assert "another run of profile 'smoke' is under way" in caplog.text
    with hold(workspace, together=True), hold(workspace, together=True):
        with pytest.raises(RunError, match="another run"), hold(workspace):
            pass


def test_what_is_missing_is_named(tmp_path, caplog):
    assert main(["--profile", str(smoke(tmp_path))]) == 2
    assert "run notebook 01_adapter_collection first" in caplog.text
    assert main(["--profile", "nobodys"]) == 2
