"""A directory appears complete or not at all."""

import os
import shutil

import pytest

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


def test_a_failing_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "b"
    target.mkdir()
    (target / "old").write_text("kept")
    replace = os.replace

    def failing(source, destination):
        if str(source).endswith(".new"):
            raise OSError("no space")
        replace(source, destination)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no space"), atomic_directory(target):
        pass
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


def test_what_is_not_its_own_is_kept(tmp_path, monkeypatch):
    target = tmp_path / "b"
    (target / "folder" / "deep").mkdir(parents=True)
    for name in ("mine", "yours", "folder/deep/yours"):
        (target / name).write_text("old")
    (target / "link").symlink_to("folder")
    for linked in (True, False):
        if not linked:
            monkeypatch.setattr(os, "link", lambda *args, **options: (_ for _ in ()).throw(OSError("no links here")))
        with atomic_directory(target, ("mine", "also mine")) as new:
            (new / "also mine").write_text("new")
        assert names(target) == ["also mine", "folder", "link", "yours"]
        assert (target / "yours").read_text() == (target / "link" / "deep" / "yours").read_text() == "old"
        assert (target / "link").is_symlink()
    with pytest.raises(RuntimeError), atomic_directory(target, ("mine",)):
        raise RuntimeError
    assert names(target) == ["also mine", "folder", "link", "yours"] and names(tmp_path) == ["b"]


def test_a_link_stays_one_and_the_working_directory_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    with atomic_directory(tmp_path / "latest") as new:
        (new / "file").write_text("")
    assert (tmp_path / "latest").is_symlink() and names(tmp_path / "run") == ["file"] and names(tmp_path) == ["latest", "run"]
    (tmp_path / "run" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "run" / "here")
    for path in (".", "..", tmp_path / "latest"):
        with pytest.raises(FileExistsError, match="holds the working directory, which cannot be replaced"):
            with atomic_directory(path):
                pass
    assert names(tmp_path / "run") == ["file", "here"]
