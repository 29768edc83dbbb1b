"""A directory appears complete or not at all."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteora import files
from meteora.files import atomic_directory


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_it_appears_at_the_end_and_replaces_what_was_there(tmp_path):
    target = tmp_path / "a" / "b"
    for content in ("first", "second"):
        with atomic_directory(target) as new:
            assert not (target / content).exists()
            if content == "second":
                assert names(target) == ["first"]
            (new / content).write_text(content)
        assert names(target) == [content]
    assert names(tmp_path / "a") == ["b"]


def test_a_failure_inside_leaves_the_old_one(tmp_path):
    target = tmp_path / "b"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(RuntimeError, match="half way"), atomic_directory(target) as new:
        (new / "half").write_text("")
        raise RuntimeError("half way")
    assert names(target) == ["old"] and names(tmp_path) == ["b"]


def test_what_a_killed_process_left_is_no_obstacle_and_not_reused(tmp_path, monkeypatch):
    target = tmp_path / "b"
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    with pytest.raises(RuntimeError), atomic_directory(target) as new:
        (new / "half").write_text("")
        raise RuntimeError
    monkeypatch.undo()
    with atomic_directory(target) as new:
        (new / "whole").write_text("")
    assert names(target) == ["whole"]


def test_a_relative_path_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_directory("here") as new:
        (new / "file").write_text("")
    assert names(tmp_path / "here") == ["file"]


def test_a_directory_that_stays_may_be_a_mount_point(tmp_path, monkeypatch):
    """Nothing is renamed into or out of it, and nothing written beside it."""
    target = tmp_path / "b"
    target.mkdir()
    real = os.replace

    def within(source, there):
        assert target in Path(source).parents and target in Path(there).parents
        real(source, there)

    monkeypatch.setattr(os, "replace", within)
    for content in ("first", "second"):
        with atomic_directory(target, own=("file",)) as new:
            (new / "file").write_text(content)
            assert names(tmp_path) == ["b"]
        assert names(target) == ["file"] and (target / "file").read_text() == content


def test_a_directory_that_is_removed_meanwhile_is_told(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError, match="was removed while it was being written to"), atomic_directory(
        tmp_path / "b", own=("file",)
    ) as new:
        (new / "file").write_text("")
        shutil.rmtree(tmp_path / "b")


def test_tensors_are_as_readable_as_other_files(tmp_path):
    before = os.umask(0o022)
    try:
        files.write_tensors(tmp_path / "t.safetensors", {"a": torch.arange(3)}, {"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o644
    assert load_file(tmp_path / "t.safetensors")["a"].tolist() == [0, 1, 2]


def test_what_is_not_its_own_stays_where_it_is(tmp_path):
    target = tmp_path / "b"
    (target / "folder").mkdir(parents=True)
    for name in ("mine", "yours", "folder/yours"):
        (target / name).write_text("old")
    places = {name: (target / name).stat().st_ino for name in (".", "yours", "folder", "folder/yours")}
    for content in ("new", "newer"):
        with atomic_directory(target, ("mine", "also mine")) as new:
            (new / "also mine").write_text(content)
        assert names(target) == ["also mine", "folder", "yours"] and (target / "also mine").read_text() == content
    assert places == {name: (target / name).stat().st_ino for name in places}
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("own", [None, ("first", "second", "third")])
def test_wherever_it_stops_the_old_is_back(tmp_path, monkeypatch, error, at, own):
    target, replace, calls = tmp_path / "b", os.replace, []
    target.mkdir()
    for name in ("first", "second", "other"):
        (target / name).write_text("old")

    def stopping(source, destination):
        calls.append(source)
        if len(calls) == at + 1:
            if error is KeyboardInterrupt:
                replace(source, destination)  # and right after it
            raise error
        replace(source, destination)

    def make():
        with atomic_directory(target, own) as new:
            for name in ("third", "first"):
                (new / name).write_text("new")

    monkeypatch.setattr(files.os, "replace", stopping)
    moves = 2 if own is None else 4
    if at < moves:
        with pytest.raises(error):
            make()
        assert names(target) == ["first", "other", "second"]
        assert {(target / name).read_text() for name in names(target)} == {"old"}
    else:
        make()
        assert names(target) == (["first", "third"] if own is None else ["first", "other", "third"])
        order = [path.name for path in calls]
        assert own is None or (order[0] == "first" and order[-1] == "first"), "by which the rest is known to be whole"
    assert names(tmp_path) == ["b"]


def test_a_link_stays_one_and_the_working_directory_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    for path in (tmp_path / "latest", "."):
        with atomic_directory(path, ("file",)) as new:
            (new / "file").write_text(str(path))
        assert (tmp_path / "run" / "file").read_text() == str(path)
    assert (tmp_path / "latest").is_symlink() and names(tmp_path) == ["latest", "run"]
    with atomic_directory(tmp_path / "latest") as new:
        (new / "file").write_text("whole")
    assert (tmp_path / "latest" / "file").read_text() == "whole" and (tmp_path / "latest").is_symlink()
