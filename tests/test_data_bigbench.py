"""BIG-bench: safe extraction, prompts, answers, and its own split."""

import hashlib
import io
import random
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from data_prep.bigbench import bigbench_names, extract_tasks, extracted_tasks, load_bigbench, render
from data_prep.errors import DataError
from data_prep.sources import BIGBENCH, cache_root
from data_prep.tasks import get_task

FIXTURES = Path(__file__).parent / "fixtures" / "bigbench"
ROOT = PurePosixPath("bigbench-1.0.0/bigbench/benchmark_tasks")

# sha256(prompt + answer)[:16] of the BIG-bench parts of the first line of the authors' composite_10/test.jsonl.
PUBLISHED = {
    "logical_deduction": "9c9e3bc5a88999e5",
    "question_selection": "543142fb4079896a",
    "abstract_narrative_understanding": "3e3110e591506e79",
    "goal_step_wikihow": "ffb46fbf44e345bf",
    "winowhy": "e99db0fb6581b882",
    "strategyqa": "2d0b636657445bf0",
    "disfl_qa": "812b4a78d0f70243",
    "linguistics_puzzles": "09e9d6a29b3d918c",
}


def _archive(path, members, root=ROOT):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name if name.startswith(("/", "..")) else f"{root}/{name}")
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def _load(name):
    train, test = load_bigbench(get_task(name), FIXTURES)
    return train, test, train + test


def test_extraction_takes_the_wanted_members_only(tmp_path):
    evil = {
        "../../../evil/task.json": b"{}",
        "a/../../b/task.json": b"{}",
        "/tmp/meteora-evil/task.json": b"{}",
        "a/link/task.json": None,
        "a/task.py": b"boom",
        "other/task.json": b"{}",
    }
    wanted = {"a/task.json": b"1", "a/sub/task.json": b"2", "b/task.json": b"3"}
    archive = _archive(tmp_path / "x.tar.gz", {**evil, **wanted})
    target = tmp_path / "out" / "tasks"
    extract_tasks(archive, target, ["a", "b"], ROOT)
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert found == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.tar.gz"]
    assert [path.name for path in target.parent.iterdir()] == ["tasks"]
    assert not Path("/tmp/meteora-evil").exists()


def test_a_damaged_archive_leaves_nothing(tmp_path):
    whole = _archive(tmp_path / "x.tar.gz", {"a/task.json": random.Random(0).randbytes(200_000)})
    whole.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(DataError, match="delete it and run again"):
        extract_tasks(whole, tmp_path / "tasks", ["a"], ROOT)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]


def test_another_archive_is_named(tmp_path):
    archive = _archive(tmp_path / "x.tar.gz", {"a/task.json": b"{}"})
    with pytest.raises(DataError, match="lacks the tasks b"):
        extract_tasks(archive, tmp_path / "tasks", ["a", "b"], ROOT)
    assert not (tmp_path / "tasks").exists()


def test_prefixes_and_default_prefixes():
    _, _, rows = _load("cs_algorithms")
    by_id = {row["id"]: row for row in rows}
    assert by_id["cs_algorithms/lcs/0"] == {
        "task": "cs_algorithms",
        "id": "cs_algorithms/lcs/0",
        "prompt": "[INST] Length of the longest common subsequence?\n\nStrings: AB BA\nLength: [/INST]\n",
        "response": "1",
        "choices": [str(n) for n in range(8)],
    }
    assert by_id["cs_algorithms/valid_parentheses/3"]["response"] == "Invalid"
    assert _load("object_counting")[2][0]["prompt"].startswith("[INST] Q: I have ")
    assert _load("object_counting")[2][0]["prompt"].endswith("do I have?\nA: [/INST]\n")


def test_all_subtasks_and_no_repeated_example():
    train, test, rows = _load("cs_algorithms")
    # 5 of 6 (one is repeated) and 20; a fifth of each for testing.
    assert (len(train), len(test), len({row["id"] for row in rows})) == (20, 5, 25)
    assert {row["id"].split("/")[1] for row in test} == {"lcs", "valid_parentheses"}


def test_the_split_is_bigbenchs_own():
    _, test, _ = _load("strategyqa")
    order = list(range(10))
    random.Random(42).shuffle(order)
    assert [int(row["id"].split("/")[1]) for row in test] == order[-2:]


def test_choices_the_paper_appends_keep_their_order():
    row = _load("logical_deduction")[2][0]
    assert row["prompt"].endswith(
        " Which choice is correct?\nchoice: The cup is the leftmost.\nchoice: The jar is the leftmost.\n"
        "choice: The pan is the leftmost.\n [/INST]\n"
    )
    assert row["response"] in row["choices"]


@pytest.mark.parametrize("name", ["question_selection", "contextual_parametric_knowledge_conflicts"])
def test_choices_bigbench_lists_itself_stand_before_the_answer(name):
    """By default, and also where the field is the string "false", which BIG-bench takes for true."""
    row = _load(name)[2][0]
    listed = [line.removeprefix("  choice: ") for line in row["prompt"].split("\n") if line.startswith("  choice: ")]
    assert sorted(listed) == sorted(row["choices"])
    assert row["prompt"].split("\n")[-3].startswith("  choice: ")


def test_the_order_of_listed_choices_is_bigbenchs():
    data = {"task_prefix": "", "example_input_prefix": "", "example_output_prefix": "", "choice_prefix": " "}
    row = {"input": "", "target_scores": {"d": 0, "a": 1, "c": 0, "b": 0, "e": 0}}
    # numpy.random.RandomState(42).permutation(list("abcde"))
    assert render(get_task("goal_step_wikihow"), data, row, "x")["prompt"] == "[INST] b e c a d [/INST]\n"


def test_several_answers():
    row = _load("object_counting")[2][0]
    assert row["references"] == [row["response"], row["references"][1]] and row["response"].isdigit()
    tied = {"input": "q", "target_scores": {"x": 0, "0": 1, "zero": 1}}
    example = render(get_task("reasoning_about_colored_objects"), {}, tied, "id")
    assert (example["response"], example["references"]) == ("0", ["0", "zero"])
    assert "references" not in _load("cs_algorithms")[2][0]


def test_a_target_wins_over_scores():
    row = _load("strategyqa")[2][0]
    assert row["choices"] == ["Yes", "No"] and len(row["response"]) > 10
    assert "references" not in row


def test_an_example_without_an_answer_is_named():
    with pytest.raises(DataError, match="example t/3 has no answer"):
        render(get_task("winowhy"), {}, {"input": "q"}, "t/3")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no task.json of winowhy"):
        load_bigbench(get_task("winowhy"), tmp_path)
    (tmp_path / "winowhy").mkdir()
    (tmp_path / "winowhy" / "task.json").write_text('{"examples": [')
    with pytest.raises(DataError, match="task.json is not valid JSON"):
        load_bigbench(get_task("winowhy"), tmp_path)


@pytest.fixture(scope="module")
def real_tasks():
    downloaded = cache_root() / "downloads" / BIGBENCH.filename
    if not downloaded.exists() and not (cache_root() / "bigbench" / BIGBENCH.sha256[:16]).exists():
        pytest.skip(f"{BIGBENCH.filename} is not in {downloaded.parent}; a run of the study puts it there")
    return extracted_tasks()


def test_the_real_archive_has_all_22_tasks(real_tasks):
    assert sorted(path.name for path in real_tasks.iterdir()) == bigbench_names()


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_answers_and_split_are_the_papers(real_tasks, name):
    """The authors published composites of their test examples: ours must contain the same ones, in the test part."""
    train, test = load_bigbench(get_task(name), real_tasks)

    def digests(rows):
        return {hashlib.sha256((row["prompt"] + row["response"]).encode()).hexdigest()[:16] for row in rows}

    assert PUBLISHED[name] in digests(test)
    assert PUBLISHED[name] not in digests(train)
