"""Splits: shares, caps, determinism, and no prompt in two of them."""

import subprocess
import sys

import pytest

from data_prep.splits import SPLITS, split_examples, stable_rng


def _examples(count, start=0, answer="a"):
    return [{"id": str(n), "prompt": f"p{n}", "response": answer} for n in range(start, start + count)]


def _split(train, test=None, task="t", seed=0, **options):
    return split_examples(train, test, task=task, seed=seed, sizes=options.pop("sizes", {}), **options)


def _prompts(examples):
    return [example["prompt"] for example in examples]


def test_80_20_and_a_tenth_of_the_80_for_validation():
    splits, counted = _split(_examples(1000))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 720, "valid": 80, "test": 200}
    assert counted == {"available": 1000, "duplicates": 0, "too_long": 0}
    assert len({prompt for rows in splits.values() for prompt in _prompts(rows)}) == 1000


def test_published_parts_are_kept():
    splits, _ = _split(_examples(100), _examples(50, start=100))
    assert sorted(_prompts(splits["test"])) == sorted(_prompts(_examples(50, start=100)))
    assert len(splits["train"]) == 90 and len(splits["valid"]) == 10


@pytest.mark.parametrize("test_part", [None, 60])
def test_no_prompt_twice(test_part):
    # Every prompt three times, with other answers: a memorised one must not be asked again.
    rows = [{**row, "response": str(n)} for n in range(3) for row in _examples(100)]
    test = None if test_part is None else _examples(test_part, start=50)
    splits, counted = _split(rows, test)
    prompts = [prompt for split in SPLITS for prompt in _prompts(splits[split])]
    assert len(prompts) == len(set(prompts))
    assert counted["duplicates"] == counted["available"] - len(prompts)
    if test is not None:
        assert set(_prompts(test)) == set(_prompts(splits["test"]))


def test_a_smaller_cap_gives_a_prefix():
    whole, _ = _split(_examples(500))
    small, _ = _split(_examples(500), sizes={"train": 7, "valid": 3, "test": 5})
    for name, size in {"train": 7, "valid": 3, "test": 5}.items():
        assert small[name] == whole[name][:size]


def test_a_length_limit_moves_nothing_between_splits():
    rows = [{**row, "response": "a" * n} for n, row in enumerate(_examples(200))]
    whole, _ = _split(rows)
    limited, counted = _split(rows, max_characters=100)
    assert 0 < counted["too_long"] < 200
    for name in SPLITS:
        assert limited[name] == [row for row in whole[name] if len(row["prompt"] + row["response"]) <= 100]


def test_seed_and_task_change_the_order_and_nothing_else_does():
    test_of = [_prompts(_split(_examples(100), task=task, seed=seed)[0]["test"]) for task in "ab" for seed in (0, 1)]
    assert len({tuple(prompts) for prompts in test_of}) == 4
    assert _split(_examples(100)) == _split(_examples(100))


def test_shuffles_do_not_depend_on_pythons_hash_seed():
    code = "from data_prep.splits import stable_rng; print(stable_rng(3, 'task').random())"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in "12"
    }
    # The literal holds on every machine and for every version of Python.
    assert printed == {str(stable_rng(3, "task").random())} == {"0.5804547725390647"}
