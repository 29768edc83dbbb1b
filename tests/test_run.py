"""The runner: what it runs, what it skips and why, what is left after a failure, and the command lines."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from data_prep.sources import BIGBENCH_FOLDER, SMOLLM2_FOLDER
from meteora.study import execute, run
from meteora.study.artifacts import STAGES, Workspace, left_out
from meteora.study.plan import describe, downloads
from meteora.study.profiles import PROFILES, REPOSITORY, load_profile
from meteora.study.locking import hold
from meteora.study.records import Records, RunError, sources_of
from meteora.study.run import run_study, select_stages


def write_notebook(folder: Path, name: str, *cells: str) -> Path:
    parameters = nbformat.v4.new_code_cell('profile = "laptop"', metadata={"tags": ["parameters"]})
    node = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    path = folder / f"{name}.ipynb"
    nbformat.write(node, path)
    return path


class Study:
    """Three small notebooks, 01 -> 02 -> 03, each of which writes what the real one must leave."""

    def __init__(self, folder: Path) -> None:
        self.notebooks = folder / "notebooks"
        self.notebooks.mkdir()
        self.workspace = Workspace("smoke", root=folder / "files")
        self.records = Records(self.workspace, self.notebooks)
        for number in ("01", "02", "03"):
            self.write(number)

    def write(self, number: str, *cells: str) -> None:
        leaves = [str(path / "x" if not path.suffix else path) for path in self.workspace.left_by(number)]
        code = (
            "import os\n"
            f"for path in {leaves!r}:\n"
            "    os.makedirs(os.path.dirname(path), exist_ok=True)\n"
            "    open(path, 'w').write('{}')"
        )
        write_notebook(self.notebooks, STAGES[number].notebook, code, *cells)

    def run(self, *numbers: str, fresh: bool = False) -> str:
        """Runs those stages (default: all) and gives the narration."""
        out = io.StringIO()
        stages = [STAGES[n] for n in numbers] or select_stages(None, None, self.notebooks)
        run_study(
            self.workspace, stages, profile_source="smoke", notebooks=self.notebooks, fresh=fresh, out=out
        )  # fmt: skip
        return out.getvalue()

    def reasons(self) -> list[str | None]:
        return [self.records.why_run(STAGES[n]) for n in ("01", "02", "03")]


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    """A `Study` whose notebooks run by `exec`, without a kernel."""

    def run_notebook(notebook, executed, page, parameters) -> None:
        for cell in nbformat.read(notebook, as_version=4).cells:
            exec(cell.source, {})
        page.write_text("page")

    monkeypatch.setattr(execute, "run_notebook", run_notebook)
    return Study(tmp_path)


def test_second_run_skips_everything(study) -> None:
    first = study.run()
    assert first.count("running, as it has not run yet") == 3 and "skipped" not in first
    second = study.run()
    assert second.count("skipped, nothing it depends on has changed") == 3 and "running" not in second
    assert study.reasons() == [None] * 3


def test_a_changed_notebook_runs_again_and_what_builds_on_it(study) -> None:
    study.run()
    study.write("02", "x = 1")
    assert study.reasons() == [None, "the notebook changed", None]
    told = study.run()
    assert "01_adapter_collection: skipped" in told
    assert "02_gate_training: running, as the notebook changed" in told
    assert "03_independent_evaluation: running, as the run of 02_gate_training changed" in told


def test_outputs_in_a_notebook_do_not_count(study) -> None:
    study.run()
    path = study.notebooks / "02_gate_training.ipynb"
    node = nbformat.read(path, as_version=4)
    node.cells[0].outputs = [nbformat.v4.new_output("stream", text="42")]
    node.cells[0].execution_count = 3
    nbformat.write(node, path)
    assert study.reasons() == [None] * 3


def test_a_vanished_output_is_made_again(study) -> None:
    study.run()
    (study.workspace.metrics / "gate_training.csv").unlink()
    assert study.reasons()[1] == "results/smoke/metrics/gate_training.csv is gone"
    study.run()
    assert (study.workspace.metrics / "gate_training.csv").exists() and study.reasons() == [None] * 3


def test_a_copied_file_counts_as_output_though_its_time_is_old(study, tmp_path) -> None:
    old = tmp_path / "old.safetensors"
    old.write_text("weights")
    os.utime(old, (1, 1))
    target = study.workspace.adapters / "old.safetensors"
    study.write("01", f"import shutil; shutil.copy2({str(old)!r}, {str(target)!r})")
    study.run("01")
    assert "artifacts/smoke/adapters/old.safetensors" in study.records.read(STAGES["01"])["outputs"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 5}, "the profile changed"),
        ({"description": "other words"}, None),
        ({"needs": {"device": "CPU", "memory_gb": 3, "disk_gb": 1, "minutes": 5}}, None),
    ],
)
def test_a_changed_profile_runs_again(study, tmp_path, change, reason) -> None:
    import yaml

    study.run("01")
    values = yaml.safe_load((PROFILES / "smoke.yaml").read_text()) | change
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(values))
    study.records.workspace = Workspace(path, root=study.workspace.root)
    assert study.reasons()[0] == reason


def test_other_versions_run_again(study, monkeypatch) -> None:
    study.run("01")
    monkeypatch.setattr("meteora.study.records.versions", lambda: {"torch": "9"})
    assert study.reasons()[0] == "the installed packages changed"


def test_adapters_that_come_with_a_profile_are_an_input(study, tmp_path) -> None:
    import dataclasses

    def with_adapters(path: Path) -> Workspace:
        profile = load_profile("smoke")
        adapters = dataclasses.replace(profile.adapters, source=str(path))
        return Workspace(dataclasses.replace(profile, adapters=adapters), root=study.workspace.root)

    weights = tmp_path / "mine" / "a" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("one")
    study.workspace = study.records.workspace = with_adapters(tmp_path / "mine")
    study.run("01")
    weights.write_text("two")
    assert study.reasons()[0] == "the adapters' files changed"
    task = study.workspace.profile.tasks[0]
    (tmp_path / f"of-{task}").mkdir()
    study.workspace = study.records.workspace = with_adapters(tmp_path / "of-{task}")
    study.run("01")
    (tmp_path / f"of-{task}" / "adapter_model.safetensors").write_text("new")
    assert study.reasons()[0] == "the adapters' files changed"


def test_a_model_in_a_folder_is_an_input(study, tmp_path) -> None:
    import dataclasses

    (tmp_path / "mine").mkdir()
    weights = tmp_path / "mine" / "model.safetensors"
    weights.write_text("one")
    profile = load_profile("smoke")
    model = dataclasses.replace(profile.model, source=str(tmp_path / "mine"))
    study.workspace = Workspace(dataclasses.replace(profile, model=model), root=study.workspace.root)
    study.records.workspace = study.workspace
    study.run("01")
    assert study.reasons()[0] is None and not profile.model.state()
    weights.write_text("two")
    os.utime(weights, (1, 1))
    assert study.reasons()[0] == "the model's files changed"


def test_what_a_stage_left_is_made_again_where_it_is_damaged_or_gone(study) -> None:
    adapter = study.workspace.adapters / "a" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    study.write("01", f"open({str(adapter)!r}, 'w').write('01')")
    study.run()
    adapter.write_text("0")
    assert study.reasons() == ["artifacts/smoke/adapters/a/adapter_model.safetensors is not what it left", None, None]
    study.run()
    assert adapter.read_text() == "01" and study.reasons() == [None] * 3
    manifest = study.workspace.data / "manifest.json"
    manifest.write_text("{")
    assert study.reasons()[0] == "artifacts/smoke/data/manifest.json is not what it left"
    study.run()
    study.records.adopt(STAGES["02"], {})
    gates = study.workspace.gates / "gates.safetensors"
    gates.parent.mkdir(parents=True, exist_ok=True)
    gates.write_text("gates")
    study.records.adopt(STAGES["02"], {})
    assert study.reasons()[1] is None
    gates.unlink()
    assert study.reasons()[1] == "artifacts/smoke/gates/gates.safetensors is not what it left"


def test_sources_are_those_that_the_notebook_imports() -> None:
    def names(code: str) -> set[str]:
        return {str(path.relative_to(REPOSITORY)) for path in sources_of(code)}

    found = names("from data_prep.tasks import get_task")
    assert found == {"data_prep/__init__.py", "data_prep/tasks.py", "data_prep/errors.py"}
    found = names("def f():\n    import meteora.kernels")
    assert {"kernels/__init__.py", "meteora/model.py"} <= found  # meteora/__init__.py is imported first
    assert not any(name.startswith("meteora/study") for name in found)
    assert "meteora/study/profiles.py" in names("from meteora.study import profiles")
    assert "meteora/study/profiles.py" in names("import meteora.study.artifacts as a")
    assert names("import json, numpy.linalg") == set()
    everything = names("await something()\nx = = 1")  # not Python: rather too much than too little
    assert {"meteora/study/run.py", "data_prep/tasks.py", "kernels/__init__.py"} <= everything


def test_from_and_only(study) -> None:
    study.run("01")
    told = study.run("03")
    assert "note: 02_gate_training is not up to date and not part of this run" in told
    assert "note: 01_adapter_collection" not in told
    assert study.reasons() == [None, "it has not run yet", None]
    study.run()
    assert study.reasons() == [None] * 3
    assert [s.number for s in select_stages("02", None, study.notebooks)] == ["02", "03"]
    assert [s.number for s in select_stages(None, "2", study.notebooks)] == ["02"]
    with pytest.raises(RunError, match="there is no notebook '07' in .*; there are 01_adapter_collection, 02_gate"):
        select_stages("07", None, study.notebooks)


def test_a_stage_about_a_section_that_a_profile_lacks_is_no_part_of_its_run(study, tmp_path, capsys) -> None:
    import dataclasses

    study.write("06")
    profile, without = study.workspace.profile, dataclasses.replace(study.workspace.profile, ablations=None)
    assert [s.number for s in select_stages(None, None, study.notebooks, profile)] == ["01", "02", "03", "06"]
    assert [s.number for s in select_stages(None, None, study.notebooks, without)] == ["01", "02", "03"]
    assert [s.number for s in select_stages("02", None, study.notebooks, without)] == ["02", "03"]
    sentence = "06_ablations is no part of profile 'smoke', which has no section 'ablations'"
    with pytest.raises(RunError, match=sentence):
        select_stages(None, "06", study.notebooks, without)
    assert left_out(profile, study.notebooks) == {} and left_out(without, study.notebooks) == {"06": sentence}
    workspace = Workspace(without, root=study.workspace.root)
    records = Records(workspace, study.notebooks)
    assert sentence in describe(workspace, select_stages(None, None, study.notebooks, without), records)
    study.write("07")
    assert "the run of 06_ablations" in study.records.inputs(STAGES["07"])
    assert "the run of 06_ablations" not in records.inputs(STAGES["07"])
    told = io.StringIO()
    stages = select_stages(None, None, study.notebooks, without)
    run_study(workspace, stages, profile_source="smoke", notebooks=study.notebooks, out=told)
    assert "07_report: running" in told.getvalue() and "06_ablations is not up to date" not in told.getvalue()
    (study.notebooks / "07_report.ipynb").unlink()
    # --fresh of a whole run forgets everything, though the folder holds one notebook more
    stray = workspace.artifacts / "stray"
    study.run()
    stray.touch()
    run_study(
        workspace, select_stages(None, None, study.notebooks, without), profile_source="smoke",
        notebooks=study.notebooks, fresh=True, out=io.StringIO(),
    )  # fmt: skip
    assert not stray.exists()
    assert run.main(["--profile", "laptop", "--only", "06"]) == 1
    assert "06_ablations is no part of profile 'laptop', which has no section 'ablations'" in capsys.readouterr().err


def test_fresh_forgets(study) -> None:
    study.run()
    leftover = study.workspace.predictions / "by_hand.jsonl"
    leftover.write_text("")
    told = study.run("02", fresh=True)
    assert "02_gate_training: running, as it has not run yet" in told
    assert leftover.exists()  # not of this notebook
    kept = study.workspace.results / "adapters" / "shipped"
    kept.mkdir(parents=True)
    told = study.run(fresh=True)
    assert told.count("running, as it has not run yet") == 3
    assert not leftover.exists() and kept.exists()


def test_a_failure_leaves_no_record_and_stops(study) -> None:
    study.run()
    study.write("02", "raise ValueError('bad gates')")
    with pytest.raises(ValueError, match="bad gates"):
        study.run()
    assert study.reasons() == [None, "it was interrupted or failed", "the run of 02_gate_training changed"]
    study.write("02")
    told = study.run()
    assert "02_gate_training: running, as it was interrupted or failed" in told
    assert study.reasons() == [None] * 3


def test_a_notebook_must_leave_what_later_ones_need(study) -> None:
    write_notebook(study.notebooks, "02_gate_training", "x = 1")
    with pytest.raises(RunError, match=r"02_gate_training ended without leaving .*gates"):
        study.run()
    assert study.reasons()[1] == "it was interrupted or failed"


def test_fresh_removes_what_a_failed_run_left(study) -> None:
    study.write("02", "raise ValueError('late')")
    with pytest.raises(ValueError, match="late"):
        study.run()
    left = study.workspace.gates / "x"
    assert left.exists()
    study.records.forget([STAGES["02"]])
    assert not left.exists()


def test_a_damaged_record_is_not_trusted(study) -> None:
    study.run("01")
    path = study.records.folder / "01.json"
    whole = path.read_text()
    for damaged in (whole[:-20], "{}", "[]"):
        path.write_text(damaged)
        assert study.reasons()[0] == "it has not run yet" and study.records.provenance() == {"data": None, "files": {}}


def test_two_runs_at_once_are_refused(study) -> None:
    with hold(study.workspace), pytest.raises(RunError, match="another run of profile 'smoke' is under way"):
        study.run()


def test_manifest(study) -> None:
    study.run()
    manifest = json.loads((study.workspace.results / "manifest.json").read_text())
    assert manifest["profile"]["evaluation"]["test_samples"] == load_profile("smoke").evaluation.test_samples
    assert set(manifest["notebooks"]) == {STAGES[n].notebook for n in ("01", "02", "03")}
    assert all(entry["seconds"] >= 0 for entry in manifest["notebooks"].values())
    assert all(entry["peak"] is None for entry in manifest["notebooks"].values()), "these notebooks did not say"
    assert {"git_revision", "versions", "device", "seed", "inputs"} <= set(manifest)


def test_the_manifest_keeps_the_digests_of_what_earlier_stages_left(study) -> None:
    adapter = study.workspace.adapters / "a" / "adapter_model.safetensors"
    gates = study.workspace.gates / "gates.safetensors"
    gates.parent.mkdir(parents=True, exist_ok=True)
    adapter.parent.mkdir(parents=True)
    study.write("01", f"open({str(adapter)!r}, 'w').write('01')")
    study.write("02", f"open({str(gates)!r}, 'w').write('02')")
    study.run()
    manifest = study.workspace.results / "manifest.json"
    inputs = json.loads(manifest.read_text())["inputs"]
    names = {"adapters/a/adapter_model.safetensors": b"01", "gates/gates.safetensors": b"02"}
    assert inputs == {"data": {}, "files": {name: hashlib.sha256(text).hexdigest() for name, text in names.items()}}
    # on another machine, to which the records were taken and the weights were not
    shutil.rmtree(study.workspace.adapters)
    (study.workspace.data / "manifest.json").unlink()
    study.run("03", fresh=True)
    assert json.loads(manifest.read_text())["inputs"] == inputs
    study.write("02", f"open({str(gates)!r}, 'w').write('other')")
    study.run("02")
    now = json.loads(manifest.read_text())["inputs"]["files"]
    assert now == inputs["files"] | {"gates/gates.safetensors": hashlib.sha256(b"other").hexdigest()}


def test_the_manifest_says_with_what_each_notebook_was_run(study, monkeypatch) -> None:
    def made_by(revision: str, *numbers: str) -> list[str]:
        monkeypatch.setattr(run, "git_revision", lambda: revision)
        monkeypatch.setattr(run, "versions", lambda: {"torch": revision})
        study.run(*numbers)
        manifest = json.loads((study.workspace.results / "manifest.json").read_text())
        assert manifest["git_revision"] == revision and manifest["versions"] == {"torch": revision}
        notebooks = manifest["notebooks"]
        assert all(entry["versions"] == {"torch": entry["git_revision"]} for entry in notebooks.values())
        return [notebooks[name]["git_revision"] for name in sorted(notebooks)]

    assert made_by("first", "01", "02") == ["first", "first"]
    assert made_by("second") == ["first", "first", "second"], "what was up to date was not run again"


# With a real kernel --------------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path) -> Study:
    return Study(tmp_path)


def test_execution_is_on_this_python_and_leaves_the_original_alone(real, tmp_path, monkeypatch) -> None:
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/no/such/python", "{connection_file}"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    code = "import sys, os; print('on', sys.executable, os.getcwd(), profile); print('a 1%\\ra 2%\\ra 3%')"
    real.write("01", code)
    before = (real.notebooks / "01_adapter_collection.ipynb").read_bytes()
    real.run("01")
    page = (real.workspace.notebooks / "01_adapter_collection.html").read_text(encoding="utf-8")
    assert f"on {sys.executable} {real.notebooks} smoke" in page
    assert "\na 3%\n" in page and "a 2%\r" not in page  # of a bar that was redrawn, the last state
    assert (real.notebooks / "01_adapter_collection.ipynb").read_bytes() == before
    left = real.workspace.artifacts / "notebooks"
    assert [p.name for p in left.iterdir()] == ["01_adapter_collection.ipynb"]


def test_a_notebooks_own_bar_is_shown_as_long_as_it_moves() -> None:
    class Bar:
        shown = ""

        def set_postfix_str(self, text: str) -> None:
            self.shown = text

    bar = Bar()
    stream = execute._InnerBar(bar)
    told = {"\r  0%| 0/4": "0%| 0/4", "\r 25%|\r 50%| 2/4": "50%| 2/4", "\r100%| 4/4\n": "", "a warning\n": ""}
    for text, shown in told.items():
        stream.write(text)
        assert bar.shown == shown


def test_a_failing_cell_is_named(real) -> None:
    real.write("01", "assert 1 + 1 == 3, 'sums are wrong\\nby one'")
    with pytest.raises(execute.NotebookError, match=r"^01_adapter_collection\.ipynb, cell \[4\] \(assert ") as caught:
        real.run("01")
    assert ": AssertionError: by one (all of it: " in str(caught.value)
    left = real.workspace.artifacts / "notebooks"
    assert [p.name for p in left.iterdir()] == ["01_adapter_collection.failed.ipynb"]
    assert not (real.workspace.notebooks / "01_adapter_collection.html").exists()
    real.write("01")
    real.run("01")
    assert [p.name for p in left.iterdir()] == ["01_adapter_collection.ipynb"]


def test_a_dead_kernel_is_an_error(real) -> None:
    real.write("01", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(execute.NotebookError, match="its Python process died"):
        real.run("01")


def test_an_interruption_ends_the_kernel_and_leaves_nothing_to_trust(real, tmp_path) -> None:
    pid = tmp_path / "pid"
    real.write(
        "01",
        f"import os, signal, time; open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)",
    )
    # A shell makes what it starts in the background ignore interrupts, and tests may be started so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            real.run("01")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 40
    assert not Path(f"/proc/{pid.read_text()}").exists()
    assert real.reasons()[0] == "it was interrupted or failed"
    assert list((real.workspace.artifacts / "notebooks").iterdir()) == []


# Command lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--bogus"], 2, "unrecognized arguments: --bogus"),
        (["--profile", "desktop"], 2, "there is no profile 'desktop'"),
        (["--profile", "smoke", "--only", "42"], 2, "there is no notebook '42'"),
        (["--from", "02", "--only", "03"], 2, "not allowed with"),
    ],
)
def test_bad_arguments(capsys, arguments, status, message) -> None:
    try:
        found = run.main(arguments)
    except SystemExit as ended:
        found = ended.code
    error = capsys.readouterr().err
    assert found == status
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.fixture
def smoke_file(tmp_path) -> Path:
    """Profile smoke with its files below tmp_path."""
    path = tmp_path / "smoke.yaml"
    path.write_text((PROFILES / "smoke.yaml").read_text() + f"\nroot: {tmp_path / 'files'}\n")
    return path


def test_dry_run_starts_nothing(capsys, smoke_file, tmp_path) -> None:
    assert run.main(["--profile", str(smoke_file), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "Profile smoke" in told and "to download: 0 MB" in told and "are free" in told
    assert not (tmp_path / "files").exists()


def test_dry_run_lists_notebooks_and_downloads(study, tmp_path) -> None:
    import dataclasses

    study.run("01")
    text = describe(study.workspace, select_stages(None, None, study.notebooks), study.records)
    assert "01_adapter_collection: would be skipped, up to date" in text
    assert "02_gate_training: would run, as it has not run yet" in text
    study.run()
    (study.workspace.metrics / "gate_training.csv").unlink()
    text = describe(study.workspace, select_stages(None, None, study.notebooks), study.records)
    assert "01_adapter_collection: would be skipped, up to date" in text
    assert "03_independent_evaluation: would run, as 02 runs before it" in text
    text = describe(study.workspace, select_stages(None, None, study.notebooks), study.records, fresh=True)
    assert text.count("would run, as what it left is to be forgotten") == 3
    laptop = dataclasses.replace(load_profile("laptop"), cache=str(tmp_path))
    model, tasks = downloads(laptop)
    assert (model.cached, tasks.cached) == (False, False)
    assert 92e6 < model.size < 94e6 and 357e6 < tasks.size < 359e6
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "bigbench-1.0.0.tar.gz").touch()
    assert [d.cached for d in downloads(laptop)] == [False, True]
    (tmp_path / "downloads" / "bigbench-1.0.0.tar.gz").unlink()
    for made in (BIGBENCH_FOLDER, SMOLLM2_FOLDER):
        (tmp_path / made).mkdir(parents=True)
    assert [d.cached for d in downloads(laptop)] == [True, True], "what was made of them serves"
    hub = [d.what for d in downloads(load_profile("llama3-8b"))]
    assert any("meta-llama/Meta-Llama-3-8B" in what for what in hub) and any("gsm8k" in what for what in hub)


def test_failure_is_one_line_and_status_1(capsys, study, monkeypatch, smoke_file) -> None:
    def failing(*_, **__):
        raise execute.NotebookError("02_gate_training.ipynb, cell 3: ValueError: bad gates")

    monkeypatch.setattr(run, "run_study", failing)
    assert run.main(["--profile", str(smoke_file)]) == 1
    assert capsys.readouterr().err == "error: 02_gate_training.ipynb, cell 3: ValueError: bad gates\n"


def test_kill_is_an_interruption(capsys, monkeypatch, smoke_file) -> None:
    monkeypatch.setattr(run, "run_study", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run.main(["--profile", str(smoke_file)]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "Interrupted; the same command goes on" in capsys.readouterr().err


# run_all.sh ----------------------------------------------------------------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
echo "python $*" >> calls
case "$*" in *install*) exit "$(cat pip_status)";; esac
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone whose environment is scripts that only note how they are called."""
    folder = tmp_path / "clone"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    shutil.copytree(PROFILES, folder / "notebooks" / "profiles")
    for name in ("run_all.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / ".ci", folder / ".ci")
    scripts = {"python": FAKE_PYTHON}
    scripts |= {name: f'#!/bin/sh\necho {name} $* >> calls\n' for name in ("meteora-study", "pytest", "jupyter")}
    for name, text in scripts.items():
        (folder / ".venv" / "bin" / name).write_text(text)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    (folder / "pip_status").write_text("0")
    return folder


def shell(
    clone: Path, *arguments: str, script: str = "run_all.sh", folder: str | Path = "/"
) -> subprocess.CompletedProcess:
    (clone / "calls").write_text("")
    return subprocess.run([clone / script, *arguments], capture_output=True, text=True, cwd=folder)


def calls(clone: Path) -> list[str]:
    return (clone / "calls").read_text().splitlines()


def test_environment_is_made_once(clone) -> None:
    first = shell(clone, "--profile", "smoke", "--fresh")
    assert first.returncode == 0 and "installing the pinned packages" in first.stdout
    *_, install, study = calls(clone)
    assert "-c constraints.txt" in install and install.endswith("-e .[notebooks,test]")
    assert study == "meteora-study --profile smoke --fresh"
    second = shell(clone)
    assert ".venv is up to date" in second.stdout and calls(clone) == ["meteora-study"]


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_environment_follows_the_pins(clone, name) -> None:
    shell(clone)
    with open(clone / name, "a") as file:
        file.write("# changed\n")
    assert "installing" in shell(clone).stdout


def test_failed_installation_is_not_trusted(clone) -> None:
    (clone / "pip_status").write_text("1")
    failed = shell(clone)
    assert failed.returncode == 1 and "error: installing the packages failed" in failed.stderr
    assert "meteora-study" not in calls(clone)
    (clone / "pip_status").write_text("0")
    assert "installing" in shell(clone).stdout


def test_test_and_lab(clone) -> None:
    shell(clone)
    assert shell(clone, "test", "-k", "x").returncode == 0
    assert calls(clone)[-1].startswith("pytest -n ") and calls(clone)[-1].endswith("-k x")
    assert shell(clone, script=".ci/run").returncode == 0
    assert calls(clone)[-1].startswith("pytest -n ")
    shell(clone, "lab")
    assert calls(clone) == ["jupyter lab --notebook-dir=notebooks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unknown argument '--bogus'"),
        (["tset"], "unknown argument 'tset'"),
        (["--profile"], "--profile needs a value"),
        (["--profile", "desktop"], "no profile 'desktop'; choose one of: laptop llama2-13b llama3-8b smoke smollm2"),
    ],
)
def test_wrong_shell_arguments_fail_before_anything_is_installed(clone, arguments, message) -> None:
    done = shell(clone, *arguments)
    assert done.returncode == 2 and calls(clone) == []
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_profile_is_looked_for_where_the_command_was_given(clone, tmp_path) -> None:
    here = tmp_path / "with space"
    here.mkdir()
    (here / "my.yaml").write_text("description: mine\nmodel: tiny\nneeds: little\n")
    shell(clone)
    for given, expected in (("my.yaml", here / "my.yaml"), (here / "my.yaml", here / "my.yaml"), ("smoke", "smoke")):
        assert shell(clone, "--profile", str(given), "--only", "02", folder=here).returncode == 0
        assert calls(clone) == [f"meteora-study --profile {expected} --only 02"]
    assert "no profile 'other.yaml'" in shell(clone, "--profile", "other.yaml", folder=here).stderr


def test_help_and_dry_run_need_no_environment(clone) -> None:
    for arguments in (["--help"], ["--profile", "laptop", "--help"]):
        assert shell(clone, *arguments).stdout.startswith("usage: ./run_all.sh")
    told = shell(clone, "--dry-run")
    assert told.returncode == 0 and "would install" in told.stdout and "needs:" in told.stdout
    assert calls(clone) == []
