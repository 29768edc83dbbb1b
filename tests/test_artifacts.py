"""Workspaces: where files go, what is missing and who makes it, and writing whole or not at all."""

from __future__ import annotations

import json
import os

import pandas
import pytest
from matplotlib.figure import Figure

from meteora.study import artifacts
from meteora.study.artifacts import ArtifactError, Workspace, find_stage
from meteora.study.profiles import REPOSITORY


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace("smoke", root=tmp_path)


def test_folders(workspace, tmp_path) -> None:
    for name in ("data", "adapters", "gates", "predictions"):
        assert getattr(workspace, name) == tmp_path / "artifacts/smoke" / name
    for name in ("metrics", "figures", "tables", "notebooks"):
        assert getattr(workspace, name) == tmp_path / "results/smoke" / name
        assert getattr(workspace, name).is_dir()


def test_default_root_is_the_repository() -> None:
    assert Workspace("smoke").results == REPOSITORY / "results" / "smoke"


def test_require_names_the_notebook_to_run(workspace) -> None:
    with pytest.raises(ArtifactError, match=r"data/manifest\.json is missing: run notebook 01_adapter_coll"):
        workspace.require("01")
    artifacts.write_json(workspace.data / "manifest.json", {})
    with pytest.raises(ArtifactError, match=r"artifacts/smoke/adapters is missing"):  # an empty folder is no adapter
        workspace.require("01")
    artifacts.write_text(workspace.adapters / "toy_echo" / "adapter_config.json", "{}")
    workspace.require("01")
    with pytest.raises(ArtifactError, match=r"\(\./run_all\.sh --profile smoke --only 02\)"):
        workspace.require("01", "02_gate_training")
    workspace.require("00")


@pytest.mark.parametrize("name", ["", "9", "99", "xx", "02_gates"])
def test_unknown_stage(name) -> None:
    with pytest.raises(ArtifactError, match="there is no notebook"):
        find_stage(name)


def test_stages_build_on_earlier_ones() -> None:
    assert [s.number for s in artifacts.STAGES.values()] == sorted(artifacts.STAGES)
    assert all(need < stage.number for stage in artifacts.STAGES.values() for need in stage.needs)


def test_csv_takes_rows_and_frames(workspace) -> None:
    rows = [{"task": "a,b", "value": 0.1}, {"task": "c", "value": None}]
    path = workspace.write_csv("x.csv", rows)
    assert path == workspace.metrics / "x.csv"
    assert path.read_bytes() == b'task,value\n"a,b",0.1\nc,\n'
    assert workspace.write_csv("x.csv", pandas.DataFrame(rows)).read_bytes() == b'task,value\n"a,b",0.1\nc,\n'


def test_json_and_tables(workspace) -> None:
    path = workspace.write_json("facts.json", {"ü": (1, 2), "path": workspace.root})
    assert path == workspace.results / "facts.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, 2], "path": str(workspace.root)}
    assert workspace.write_table("t.md", "| a |\n").read_text() == "| a |\n"


def test_figures_are_reproducible(workspace) -> None:
    def draw() -> list[bytes]:
        figure = Figure()
        figure.subplots().plot([1, 2], label="a")
        return [path.read_bytes() for path in workspace.save_figure(figure, "figure9")]

    svg, png = draw()
    assert svg.lstrip().startswith(b"<?xml") and png.startswith(b"\x89PNG")
    assert (svg, png) == tuple(draw())
    assert sorted(p.name for p in workspace.figures.iterdir()) == ["figure9.png", "figure9.svg"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(workspace, monkeypatch) -> None:
    path = artifacts.write_text(workspace.metrics / "x.csv", "old")

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        artifacts.write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in workspace.metrics.iterdir()] == ["x.csv"]


def test_versions_and_device() -> None:
    found = artifacts.versions()
    assert {"python", "meteora", "torch", "transformers", "peft"} <= set(found)
    assert artifacts.device_name("cpu").endswith("cores)")


def test_cuda_without_a_gpu_is_an_error(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert artifacts.pick_device("auto").type == "cpu"
    with pytest.raises(ArtifactError, match="torch sees no GPU"):
        artifacts.pick_device("cuda")


def test_set_up_seeds(workspace) -> None:
    import random

    import numpy
    import torch

    def draw() -> tuple:
        assert artifacts.set_up(workspace.profile).type == "cpu"
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    assert draw() == draw()
    assert torch.get_num_threads() == workspace.profile.threads


def test_the_peak_of_memory_is_told_and_kept_for_the_manifest(workspace) -> None:
    import torch

    from meteora.study.records import Records

    assert Records(workspace).peak(find_stage("03")) is None
    told = artifacts.peak_memory(workspace, "03", torch.device("cpu"))
    kept = Records(workspace).peak(find_stage("03"))
    assert kept["memory"] == "main" and kept["bytes"] > 1e8
    assert told == f"peak of main memory: {kept['bytes'] / 1e9:.1f} GB"
