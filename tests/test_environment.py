"""The environment is described once: constraints.txt pins what pyproject.toml needs, environment.yml adds nothing."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from meteora.study.profiles import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
HEADER = """\
# Every version of a reproducible run, on Python 3.11 or newer; pyproject.toml and environment.yml name none.
# To change one: install it into .venv, then `.venv/bin/pytest tests/test_environment.py` tells the lines that differ.
"""


def read_pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def direct_requirements() -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *EXTRAS["notebooks"], *EXTRAS["test"], "setuptools>=77"]
    return [r for r in map(Requirement, texts) if r.name != "meteora"]


def installed_closure() -> dict[str, str]:
    """Name -> installed version of the direct requirements and everything that they need on this platform."""
    found: dict[str, str] = {}
    queue = [(r.name, frozenset(r.extras)) for r in direct_requirements()]
    seen = set()
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution.version.partition("+")[0]
        for text in distribution.requires or ():
            requirement = Requirement(text)
            environments = [{"extra": extra} for extra in extras or {""}]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                queue.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def test_pins_are_what_the_project_needs() -> None:
    pins, closure = read_pins(), installed_closure()
    if any(closure[name] != pins[name] for name in ("torch", "transformers", "peft")):
        pytest.skip("another set of versions than the pinned one is installed")
    # a GPU build of torch brings libraries that torch itself pins
    closure = {n: v for n, v in closure.items() if not re.match(r"nvidia-|cuda-", n)}
    assert pins == dict(sorted(closure.items())), "constraints.txt should read:\n" + HEADER + "".join(
        f"{name}=={version}\n" for name, version in sorted(closure.items())
    )


def test_pins_satisfy_the_bounds() -> None:
    pins = read_pins()
    for requirement in direct_requirements():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_bounds_admit_both_supported_sets_of_versions() -> None:
    bounds = {r.name: r.specifier for r in direct_requirements()}
    for versions in ({"torch": "2.13.0", "transformers": "5.23.0"}, {"torch": "2.11.0", "transformers": "5.17.0"}):
        for name, version in versions.items():
            assert bounds[name].contains(version)
    assert bounds["peft"].contains("0.21.0")
    for python in ("3.11", "3.12"):
        assert SpecifierSet(PROJECT["requires-python"]).contains(python)


def test_no_version_is_pinned_twice() -> None:
    assert not any(s.operator == "==" for requirement in direct_requirements() for s in requirement.specifier)


def test_conda_environment_cannot_drift() -> None:
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))
    python, pip, packages = environment["dependencies"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert pip == "pip"
    assert packages == {"pip": ["-c constraints.txt", "-e .[notebooks,test]"]}


def test_shell_script_installs_the_same() -> None:
    script = (REPOSITORY / "run_all.sh").read_text(encoding="utf-8")
    assert "-c constraints.txt" in script and "-e '.[notebooks,test]'" in script
    assert not re.search(r"==\d", script)
