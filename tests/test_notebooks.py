"""Every notebook runs, in order, on profile smoke, through the runner and into a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest

from meteora.study.artifacts import STAGES, Workspace, existing_stages
from meteora.study.execute import NotebookError, run_notebook
from meteora.study.profiles import PROFILES
from meteora.study.records import Records
from meteora.study.run import run_study

STAGES_HERE = existing_stages()


def smoke_profile(folder: Path) -> Path:
    """Profile smoke with its artifacts and results in ``folder``."""
    path = folder / "smoke.yaml"
    path.write_text((PROFILES / "smoke.yaml").read_text(encoding="utf-8") + f"\nroot: {folder}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """One run of the study: a notebook's test leaves what the next one's needs."""
    return smoke_profile(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("stage", STAGES_HERE, ids=lambda stage: stage.notebook)
def test_notebook(stage, profile) -> None:
    workspace = Workspace(profile)
    for needed in stage.needs:
        if STAGES[needed] in STAGES_HERE:
            workspace.require(needed)
    run_study(workspace, [stage], profile_source=str(profile))
    workspace.require(stage.number)
    assert (workspace.notebooks / f"{stage.notebook}.html").is_file()
    assert Records(workspace).why_run(stage) is None  # a second run would skip it


@pytest.mark.parametrize(
    "stage", [s for s in STAGES_HERE if s.number in ("02", "03", "04", "05")], ids=lambda s: s.notebook
)
def test_a_notebook_says_which_one_is_missing(stage, tmp_path) -> None:
    profile = smoke_profile(tmp_path)
    notebook = tmp_path / f"{stage.notebook}.ipynb"
    shutil.copy(Workspace("smoke").root / "notebooks" / notebook.name, notebook)
    with pytest.raises(NotebookError, match="ArtifactError: .* is missing: run notebook 01_adapter_collection first"):
        run_notebook(notebook, tmp_path / "out.ipynb", tmp_path / "out.html", {"profile": str(profile)})


def test_a_page_shows_its_figures_whatever_backend_matplotlib_has_been_given(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    source = "import matplotlib.pyplot as plt\nfrom IPython.display import display\n"
    cell = nbformat.v4.new_code_cell(source + "figure, _ = plt.subplots()\nplt.close(figure)\ndisplay(figure)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "figure.ipynb")
    run_notebook(tmp_path / "figure.ipynb", tmp_path / "out.ipynb", tmp_path / "out.html", {})
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs
    assert "image/png" in output["data"]
    assert output["data"]["image/png"][:40] in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_a_page_shows_warnings_and_no_bars(tmp_path):
    bar = "import sys\nfrom tqdm import tqdm\nfor _ in tqdm(range(3), desc='all of it'):\n    "
    behind, within = "pass\nprint('mind', 'the gap', file=sys.stderr)", "print('beware', 'of it', file=sys.stderr)"
    cells = [nbformat.v4.new_code_cell(bar + rest) for rest in ("pass", behind, within)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bars.ipynb")
    run_notebook(tmp_path / "bars.ipynb", tmp_path / "out.ipynb", tmp_path / "out.html", {})
    assert "all of it: 100%" in (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "all of it: " not in page and page.count("mind the gap") == 1 and page.count("beware of it") == 3
