"""What holds for the repository as a whole: import rules, thin notebooks, links that lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from meteora.study.artifacts import NOTEBOOKS, STAGES, existing_stages
from meteora.study.profiles import REPOSITORY
from meteora.study.records import PACKAGE_FOLDERS, _imported, notebook_code

NOTEBOOK_FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
SOURCES = sorted(path for folder in PACKAGE_FOLDERS.values() for path in (REPOSITORY / folder).rglob("*.py"))


# kernels/ is importable as meteora.kernels alone ---------------------------------------------------------------------

PROBE = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
assert spec is None or not spec.origin.startswith({root!r}), f"top-level kernels is ours: {{spec}}"
import transformers.integrations.hub_kernels  # what would import it
assert importlib.util.find_spec("meteora") and importlib.util.find_spec("data_prep")
taken = sys.modules.get("kernels")
assert taken is None or not taken.__file__.startswith({root!r}), "transformers took ours"
"""


def run_probe(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def probe(tmp_path) -> Path:
    """A script like the console scripts in .venv/bin: its own folder, not the working directory, is on sys.path."""
    path = tmp_path / "probe.py"
    path.write_text(PROBE.format(root=str(REPOSITORY / "kernels")))
    return path


def test_transformers_does_not_take_our_kernels(probe) -> None:
    run_probe([sys.executable, str(probe)], REPOSITORY)


def test_nor_in_a_notebook(probe) -> None:
    """A kernel puts its working directory, which is notebooks/, on sys.path; so does ``python -c``."""
    run_probe([sys.executable, "-c", probe.read_text()], NOTEBOOKS)


def test_nor_in_this_test_run() -> None:
    if Path(sys.argv[0]).name == "__main__.py":
        pytest.skip("started by python -m, which puts the working directory on sys.path; the script pytest does not")
    assert str(REPOSITORY) not in sys.path
    assert "kernels" not in sys.modules or not sys.modules["kernels"].__file__.startswith(str(REPOSITORY))


def test_a_python_started_in_the_root_still_imports_transformers() -> None:
    """There the hazard is real (``python`` puts the working directory on sys.path): it must at least do no harm."""
    text = "import kernels, transformers.integrations.hub_kernels; assert kernels.__path__"
    run_probe([sys.executable, "-c", text], REPOSITORY)


def test_our_kernels_are_importable_under_their_own_name() -> None:
    import meteora.kernels

    assert meteora.kernels.__file__ == str(REPOSITORY / "kernels" / "__init__.py")


def test_kernels_package_imports_nothing() -> None:
    tree = ast.parse((REPOSITORY / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    assert [type(node) for node in tree.body] == [ast.Expr]  # the docstring


def test_no_conftest_puts_the_root_on_the_path() -> None:
    assert not (REPOSITORY / "conftest.py").exists()
    assert not (REPOSITORY / "tests" / "__init__.py").exists()


# Packages and who imports whom ---------------------------------------------------------------------------------------


def test_every_package_is_installed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in SOURCES}
    moved = {REPOSITORY / folder: name for name, folder in project["tool"]["setuptools"]["package-dir"].items()}
    assert packages == {moved.get(f) or ".".join(f.relative_to(REPOSITORY).parts) for f in folders}


LAYERS = [  # each may import those after it, and itself
    ("meteora.study",),
    ("meteora",),
    ("data_prep",),
]


def layer_of(module: str) -> int | None:
    for i, packages in enumerate(LAYERS):
        if any(module == package or module.startswith(f"{package}.") for package in packages):
            return i
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_run_one_way(path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    own = "meteora.kernels" if package == "kernels" else ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    own = own.removesuffix(".__init__")
    modules = list(_imported(path.read_text(encoding="utf-8"), own, path.name == "__init__.py"))
    below = layer_of(own)
    for module in modules:
        if layer_of(module) is None:
            continue
        assert layer_of(module) >= below, f"{own} imports {module}"
        if own.startswith("meteora") and not own.startswith("meteora.study"):
            assert not module.startswith("data_prep"), f"the library needs no data: {own} imports {module}"


def test_the_library_does_not_print_or_read_the_environment() -> None:
    for path in SOURCES:
        if path.name == "run.py":  # the command line
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        names = [ast.unparse(call.func) for call in calls]
        assert "print" not in names, path
        assert "os.getenv" not in names and "os.environ.get" not in names, path


# Notebooks -----------------------------------------------------------------------------------------------------------


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_every_notebook_is_a_stage() -> None:
    assert [stage.notebook for stage in existing_stages()] == [path.stem for path in NOTEBOOK_FILES]
    assert {path.stem for path in NOTEBOOK_FILES} <= {stage.notebook for stage in STAGES.values()}


@pytest.mark.parametrize("path", NOTEBOOK_FILES, ids=lambda path: path.stem)
class TestNotebook:
    def test_one_parameters_cell_of_literals(self, path) -> None:
        tagged = [cell for cell in cells_of(path) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1
        for statement in ast.parse("".join(tagged[0]["source"])).body:
            assert isinstance(statement, ast.Assign)
            ast.literal_eval(statement.value)
        assert 'profile = "laptop"' in "".join(tagged[0]["source"])

    def test_no_outputs(self, path) -> None:
        for cell in cells_of(path):
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None

    def test_is_explained_and_checked(self, path) -> None:
        cells = cells_of(path)
        assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
        text = sum(cell["cell_type"] == "markdown" for cell in cells)
        assert text >= len(cells) // 3, "say what a cell shows before it shows it"
        assert "assert " in notebook_code(path), "a notebook ends in assertions about what it has shown"

    def test_is_thin(self, path) -> None:
        for cell in cells_of(path):
            if cell["cell_type"] == "code":
                assert len("".join(cell["source"]).splitlines()) <= 45, "".join(cell["source"])[:80]

    def test_runs_on_python(self, path) -> None:
        ast.parse(notebook_code(path))


# Documents -----------------------------------------------------------------------------------------------------------

DOCUMENTS = sorted(
    path
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "kernels").glob("*.md"), *NOTEBOOK_FILES]
    if path.name != "CHANGELOG.md"
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target = (target[0] or target[1]).partition("#")[0]
        if target and not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
