"""Prepared data on disk: files, manifest, determinism, what is missing, what went wrong."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from data_prep import prepare
from data_prep.bigbench import bigbench_names
from data_prep.errors import DataError, DownloadError, UnknownTaskError
from data_prep.prepare import load_split, prepare_tasks
from data_prep.sources import BIGBENCH, cache_root
from data_prep.tasks import TOY_TASKS

FIXTURES = Path(__file__).parent / "fixtures" / "bigbench"
SIZES = {"train": 8, "valid": 1, "test": 4}


@pytest.fixture
def cache(tmp_path):
    """A cache in which the fixtures stand where the extracted archive would."""
    shutil.copytree(FIXTURES, tmp_path / "cache" / "bigbench" / BIGBENCH.sha256[:16])
    return tmp_path / "cache"


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_and_manifest(tmp_path, cache):
    out = tmp_path / "data"
    manifest = prepare_tasks(["cs_algorithms", "toy_parity"], out, sizes=SIZES, seed=3, cache_dir=cache)
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert manifest["seed"] == 3 and manifest["sizes"] == SIZES and manifest["unavailable"] == {}
    assert manifest["sources"] == {BIGBENCH.filename: BIGBENCH.sha256, "generated": None}
    entry = manifest["tasks"]["cs_algorithms"]
    assert entry["counts"] == SIZES and entry["available"] == 25 and entry["category"] == "mathematics"
    for task in manifest["tasks"]:
        for split, size in SIZES.items():
            assert len(load_split(out, task, split)) == size
            digest = hashlib.sha256((out / task / f"{split}.jsonl").read_bytes()).hexdigest()
            assert manifest["tasks"][task]["sha256"][split] == digest
    assert sorted(_files(out)) == sorted(
        ["manifest.json", *(f"{t}/{s}.jsonl" for t in ("cs_algorithms", "toy_parity") for s in SIZES)]
    )


def test_examples_survive_the_file(tmp_path, cache):
    tasks = ["contextual_parametric_knowledge_conflicts", "object_counting"]
    prepare_tasks(tasks, tmp_path, sizes={"valid": 0}, cache_dir=cache)
    row = load_split(tmp_path, "contextual_parametric_knowledge_conflicts", "train")[0]
    assert row["response"] == "Åsa" and row["choices"] == ["Åsa", "Bo"]
    assert len(load_split(tmp_path, "object_counting", "test")[0]["references"]) == 2


def test_the_same_bytes_again_and_others_for_another_seed(tmp_path, cache):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_tasks(["cs_algorithms"], tmp_path / name, sizes=SIZES, seed=seed, cache_dir=cache)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert _files(tmp_path / "a")["cs_algorithms/train.jsonl"] != _files(tmp_path / "c")["cs_algorithms/train.jsonl"]


def test_what_the_hub_does_not_give_is_left_out_and_said(tmp_path, caplog):
    (tmp_path / "mirror").mkdir()
    manifest = prepare_tasks(
        ["gsm8k", "toy_echo"], tmp_path / "data", sizes=SIZES, hub_mirror=tmp_path / "mirror"
    )
    assert list(manifest["tasks"]) == ["toy_echo"]
    assert "openai/gsm8k" in manifest["unavailable"]["gsm8k"] and "openai/gsm8k" in caplog.text
    with pytest.raises(DataError, match="Task gsm8k was not prepared"):
        load_split(tmp_path / "data", "gsm8k", "test")


def test_nothing_at_all_is_an_error_with_the_reason(tmp_path):
    (tmp_path / "mirror").mkdir()
    with pytest.raises(DataError, match="None of the tasks gsm8k could be prepared: .*openai/gsm8k"):
        prepare_tasks(["gsm8k"], tmp_path / "data", sizes=SIZES, hub_mirror=tmp_path / "mirror")
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_failed_download_of_the_package_stops(tmp_path, monkeypatch):
    def fail(_):
        raise DownloadError("no network")

    monkeypatch.setattr(prepare, "extracted_tasks", fail)
    with pytest.raises(DownloadError, match="no network"):
        prepare_tasks(["toy_echo", "winowhy"], tmp_path, sizes=SIZES)


def test_an_interrupted_run_is_not_trusted(tmp_path, monkeypatch):
    prepare_tasks(list(TOY_TASKS), tmp_path, sizes=SIZES)
    written = []

    def interrupt(path, text):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_text(text)

    monkeypatch.setattr(prepare, "write_atomically", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_tasks(list(TOY_TASKS), tmp_path, sizes=SIZES, seed=1)
    with pytest.raises(DataError, match="was not prepared"):
        load_split(tmp_path, "toy_echo", "train")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    prepare.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        prepare.write_atomically(path, "new \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["nonsense"]}, "no task 'nonsense'"),
        ({"tasks": []}, "name at least one"),
        ({"sizes": {"dev": 3}}, "no split 'dev'"),
        ({"sizes": {"train": -1}}, "must not be negative"),
        ({"source": "web"}, "no source 'web'; choose among auto, authors"),
        ({"max_characters": 3}, "too few examples for a train split.*raise the limit"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        prepare_tasks(**{"tasks": ["toy_echo"], "out_dir": tmp_path / "x", "sizes": SIZES, **arguments})


def test_what_cannot_be_read_is_named(tmp_path):
    prepare_tasks(["toy_echo"], tmp_path, sizes=SIZES)
    path = tmp_path / "toy_echo" / "test.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"test\.jsonl cannot be read \(.*\): prepare the tasks again"):
        load_split(tmp_path, "toy_echo", "test")
    path.unlink()
    with pytest.raises(DataError, match=r"test\.jsonl cannot be read"):
        load_split(tmp_path, "toy_echo", "test")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        load_split(tmp_path, "toy_echo", "train")


def test_unknown_names_when_loading(tmp_path):
    prepare_tasks(["toy_echo"], tmp_path, sizes=SIZES)
    with pytest.raises(DataError, match="no split 'dev'; choose among train, valid, test"):
        load_split(tmp_path, "toy_echo", "dev")
    with pytest.raises(UnknownTaskError):
        load_split(tmp_path, "toy_ecko", "test")


def test_all_22_tasks_of_the_real_archive(tmp_path):
    cache = cache_root()
    if not (cache / "downloads" / BIGBENCH.filename).exists() and not (cache / "bigbench").exists():
        pytest.skip(f"{BIGBENCH.filename} is not in {cache}; a run of the study puts it there")
    sizes = {"train": 700, "valid": 50, "test": 100}
    manifest = prepare_tasks(bigbench_names(), tmp_path, sizes=sizes)
    counts = {name: entry["counts"] for name, entry in manifest["tasks"].items()}
    assert counts == dict.fromkeys(bigbench_names(), sizes)
    # What the hub's copy of BIG-bench counts, after its removal of repeated examples.
    available = {name: entry["available"] for name, entry in manifest["tasks"].items()}
    assert available["abstract_narrative_understanding"] == 3000
    assert available["elementary_math_qa"] == 38160
    assert available["unit_conversion"] == 23936
    for name in bigbench_names():
        rows = [row for split in sizes for row in load_split(tmp_path, name, split)]
        assert len({row["prompt"] for row in rows}) == len(rows)
        for row in rows:
            assert row["prompt"].startswith("[INST] ") and row["prompt"].endswith(" [/INST]\n")
            assert row["response"] == row["response"].strip() != ""
            if row["choices"] and name != "strategyqa":
                assert row["response"] in row["choices"]
