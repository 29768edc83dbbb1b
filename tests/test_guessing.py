"""What is right without a look at the prompt: its expectation, its most frequent answer, and who is no better."""

import json
import logging

import pandas as pd
import pytest
import yaml

from meteora.study.artifacts import ArtifactError, Workspace
from meteora.study.guessing import (
    expected_correct, guess, guessing_rows, load_guessing, main, tasks_at_a_guess,
)  # fmt: skip
from meteora.study.profiles import PROFILES
from meteora.study.tables import table1

CHOICES = ["yes", "no"]


def examples(task: str, *answers: str, choices: list[str] = CHOICES) -> list[dict]:
    return [{"task": task, "id": f"{n}", "prompt": "?", "response": a, "choices": choices} for n, a in enumerate(answers)]


def by_method(rows: list[dict]) -> dict[str, dict]:
    return {row["method"]: row for row in rows}


def test_chance_is_the_expectation_and_majority_is_learned_from_training_examples():
    train = {"winowhy": examples("winowhy", "correct", "correct", "incorrect", choices=["correct", "incorrect"])}
    tests = {"winowhy": examples("winowhy", "incorrect", "incorrect", "incorrect", "correct", choices=["correct", "incorrect"])}
    found = by_method(guessing_rows(train, tests))
    assert found["chance"] == {
        "task": "winowhy", "method": "chance", "metric": "accuracy", "value": 0.5, "low": None, "high": None, "n": 4,
    }  # fmt: skip
    assert (found["majority"]["value"], found["majority"]["n"]) == (0.25, 4), "correct is more frequent in training"
    assert found["majority"]["low"] <= 0.25 <= found["majority"]["high"]


def test_chance_counts_every_right_choice_and_questions_of_any_size():
    few = examples("winowhy", "a", choices=["a", "b"])
    many = examples("winowhy", "a", choices=["a", "b", "c", "d"])
    both = [{**many[0], "references": ["a", "b"]}]
    rows = by_method(guessing_rows({"winowhy": few}, {"winowhy": few + many + both}))
    assert rows["chance"]["value"] == pytest.approx((1 / 2 + 1 / 4 + 2 / 4) / 3)


def test_without_choices_there_is_nothing_to_choose_from_but_a_frequent_answer():
    train = {"object_counting": examples("object_counting", "4", "4", "7", choices=[])}
    tests = {"object_counting": examples("object_counting", "4", "9", choices=[])}
    found = by_method(guessing_rows(train, tests))
    assert (found["chance"]["value"], found["majority"]["value"]) == (0.0, 0.5)


def test_a_task_without_an_accuracy_has_no_row(tmp_path):
    rows = {"topical_chat": examples("topical_chat", "hello", choices=[])}
    assert guessing_rows(rows, rows) == []
    workspace = Workspace("smoke", root=tmp_path)
    (workspace.data / "topical_chat").mkdir()
    (workspace.data / "manifest.json").write_text('{"tasks": {"topical_chat": {}}}')
    for split in ("train", "test"):
        (workspace.data / "topical_chat" / f"{split}.jsonl").write_text(json.dumps(rows["topical_chat"][0]) + "\n")
    with pytest.raises(ArtifactError, match=r"guessing.csv is missing: run notebook 01_adapter_collection first"):
        load_guessing(workspace)
    found = guess(workspace)
    workspace.write_csv("guessing.csv", found)
    for frame in (found, load_guessing(workspace)):
        assert frame.empty and list(frame.columns) == list(GUESSING.columns)


GUESSING = pd.DataFrame(
    [(t, m, "accuracy", v, None, None, 40) for t, m, v in (
        ("winowhy", "chance", 0.5), ("winowhy", "majority", 0.6), ("strategyqa", "chance", 0.4), ("strategyqa", "majority", 0.1),
    )],
    columns=["task", "method", "metric", "value", "low", "high", "n"],
)  # fmt: skip


def test_a_composites_guess_is_the_sum_over_its_tasks_with_an_accuracy():
    rows = [(2, "winowhy", "accuracy"), (3, "winowhy", "accuracy"), (3, "strategyqa", "accuracy"), (3, "topical_chat", "bleu")]
    composite = pd.DataFrame([*rows, *rows], columns=["composite", "subtask", "metric"])
    assert expected_correct(GUESSING, composite) == pytest.approx({2: 0.6, 3: 1.0})


def test_the_better_guess_is_what_an_interval_must_be_above():
    own = [("winowhy", 0.7, 0.61), ("strategyqa", 0.5, 0.4)]
    independent = pd.DataFrame(
        [(t, m, "accuracy", v, low, 1.0, 40) for t, v, low in own for m in ("peft", "base")], columns=GUESSING.columns
    )
    assert tasks_at_a_guess(GUESSING, independent) == (1, 2)
    table = table1(pd.concat([independent, GUESSING])).set_index("method")
    assert table.loc["A choice at random"].item() == "0.450", "an expectation has no interval"
    assert "[" in table.loc["Base model"].item()


def test_the_command(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    values = yaml.safe_load((PROFILES / "smoke.yaml").read_text(encoding="utf-8"))
    profile = tmp_path / "own.yaml"
    profile.write_text(yaml.safe_dump(values | {"name": "own", "root": str(tmp_path / "files")}), encoding="utf-8")
    assert main(["--profile", str(profile)]) == 0
    frame = pd.read_csv(tmp_path / "files" / "results" / "own" / "metrics" / "guessing.csv")
    assert set(frame["method"]) == {"chance", "majority"} and frame["value"].between(0, 1).all()
    assert caplog.messages[-1].startswith("method")
    assert main(["--profile", "nowhere"]) == 2
