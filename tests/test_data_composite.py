"""Composite problems: the published layout, examples from training only, and the parser of answers."""

import json

import pytest

from data_prep.composite import ZERO_SHOT_INSTRUCTION, build_composites, parse_answers
from data_prep.errors import DataError
from data_prep.prepare import load_split, prepare_tasks, write_atomically
from data_prep.tasks import TOY_TASKS

TASKS = list(TOY_TASKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_tasks(TASKS, folder, sizes={"train": 40, "valid": 5, "test": 12})
    return folder


def test_the_layout_is_the_published_one(data):
    item = build_composites(data, TASKS[:2], 3, shots=2)[0]
    lines = item.prompt.split("\n")
    shape = [line if not line.startswith("[INST]") else "Q" for line in lines]
    answers = [line[:3] if line[:3] in ("1. ", "2. ") else line for line in shape]
    shot = ["Q", "", "Q", "", "1. ", "2. ", "", ""]
    assert answers == [
        "", "Example 1:", "", *shot, "Example 2:", "", *shot,
        "Following the example above, generate answers to the questions below:", "", "Q", "", "", "Q", "", "",
    ]  # fmt: skip


def test_shots_are_solved_training_examples_and_the_same_for_all_items(data):
    items = build_composites(data, TASKS, 12)
    assert len({item.prefix for item in items}) == 1
    training = {row["prompt"]: row["response"] for task in TASKS for row in load_split(data, task, "train")}
    for shot in items[0].prefix.split("Example ")[1:]:
        questions = [line + "\n" for line in shot.split("\n") if line.startswith("[INST]")]
        assert parse_answers(shot, 3) == [training[question] for question in questions]


def test_items_hold_each_test_example_once(data):
    items = build_composites(data, TASKS, 12)
    assert len({item.id for item in items}) == 12
    for position, task in enumerate(TASKS):
        rows = [item.examples[position] for item in items]
        assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in load_split(data, task, "test"))
    for item in items:
        assert item.tasks == TASKS == [row["task"] for row in item.examples]
        places = [item.body.index(row["prompt"]) for row in item.examples]
        assert places == sorted(places) and item.prompt == item.prefix + item.body


def test_without_shots_an_instruction_asks_for_numbered_lines(data):
    item = build_composites(data, TASKS, 1, shots=0)[0]
    assert item.prefix == "" and item.prompt.startswith(ZERO_SHOT_INSTRUCTION + "[INST] ")
    # The questions themselves do not depend on the shots.
    assert item.examples == build_composites(data, TASKS, 1, shots=2)[0].examples


def test_the_seed_fixes_the_set(data):
    assert build_composites(data, TASKS, 4, seed=1) == build_composites(data, TASKS, 4, seed=1)
    first, second = (build_composites(data, TASKS, 4, seed=seed) for seed in (1, 2))
    assert first[0].prefix != second[0].prefix
    assert [i.examples for i in first] != [i.examples for i in second]
    # Fewer items are the first of more.
    assert build_composites(data, TASKS, 2, seed=1) == first[:2]


def test_shots_are_short_and_their_answers_one_line(tmp_path):
    prepare_tasks(["toy_echo"], tmp_path, sizes={"train": 20, "valid": 2, "test": 2})
    rows = load_split(tmp_path, "toy_echo", "train")
    for n, row in enumerate(rows):
        if n >= 12:
            row["prompt"] = f"[INST] {'long ' * n} [/INST]\n"
        elif n >= 2:
            row["response"] = "two\nlines"
    write_atomically(tmp_path / "toy_echo" / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prefix = build_composites(tmp_path, ["toy_echo"], 1)[0].prefix
    assert "long long" not in prefix and "lines" not in prefix
    with pytest.raises(DataError, match="3 shots of toy_echo"):
        build_composites(tmp_path, ["toy_echo"], 1, shots=3)


@pytest.mark.parametrize(
    ("tasks", "items", "shots", "message"),
    [
        ([], 1, 2, "needs tasks"),
        (TASKS, 0, 2, "items >= 1"),
        (TASKS, 13, 2, "13 composite items need 13 test examples of toy_echo and .* has 12"),
        (["winowhy"], 1, 2, "winowhy was not prepared"),
    ],
)
def test_bad_arguments(data, tasks, items, shots, message):
    with pytest.raises(DataError, match=message):
        build_composites(data, tasks, items, shots=shots)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. a\n2. b b\n3. c", ["a", "b b", "c"]),
        ("Sure:\n\n 1.  a \n3. c\nbye", ["a", None, "c"]),
        ("1. \n2.\n3. c", [None, None, "c"]),
        ("1. a\n1. again\n2. b", ["a", "b", None]),
        ("1.\na\n2. b", [None, "b", None]),
        # Not numbers of answers: in the middle of a line, as a part of another number, in a decimal.
        ("a 1. b\n11. x\n21. y\n3.5 m", [None, None, None]),
        ("11. x\n1. a", ["a", None, None]),
        ("1) a\n2: b\n(3. c", [None, None, None]),
        ("1. 2. b\n4. d", ["2. b", None, None]),
        ("1. a\r\n2. b\r\n", ["a", "b", None]),
        ("01. a\n٢. b", [None, None, None]),
        ("", [None, None, None]),
    ],
)
def test_parse_answers(text, expected):
    assert parse_answers(text, 3) == expected


def test_parse_answers_with_two_digits():
    assert parse_answers("\n".join(f"{n}. a{n}" for n in range(1, 11)), 10) == [f"a{n}" for n in range(1, 11)]
