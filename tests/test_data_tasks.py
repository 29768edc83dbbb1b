"""The catalogue: the paper's tasks and metrics, the made-up ones."""

import pytest

from data_prep.errors import UnknownTaskError
from data_prep.tasks import TASKS, TOY_TASKS, get_task
from data_prep.toy import EXAMPLES_PER_TASK, toy_examples


def test_the_papers_28_tasks():
    assert len(TASKS) == 28
    assert list(TASKS) == sorted(TASKS)
    assert sum(task.source == "bigbench" for task in TASKS.values()) == 22
    assert {name for name, task in TASKS.items() if task.source == "hub"} == {
        "alpaca", "cnn_dailymail", "gsm8k", "news_commentary_de", "news_commentary_es", "news_commentary_it",
    }  # fmt: skip


def test_metrics_are_the_papers():
    by_accuracy = {kind: sum(t.accuracy == kind for t in TASKS.values()) for kind in ("substring", "exact")}
    assert by_accuracy == {"substring": 11, "exact": 8}
    assert [t.name for t in TASKS.values() if t.accuracy == "number"] == ["gsm8k"]
    assert [t.name for t in TASKS.values() if t.accuracy == "yesno"] == ["strategyqa"]
    assert {t.name for t in TASKS.values() if "rouge" in t.text_metrics} == {
        "linguistics_puzzles", "topical_chat", "cnn_dailymail", "alpaca", "strategyqa",
    }  # fmt: skip
    assert all(t.accuracy or t.text_metrics for t in [*TASKS.values(), *TOY_TASKS.values()])


def test_tasks_whose_choices_the_paper_appends():
    assert {t.name for t in TASKS.values() if t.append_choices} == {
        "logical_deduction", "abstract_narrative_understanding", "tracking_shuffled_objects", "unit_conversion",
    }  # fmt: skip


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(UnknownTaskError, match=r"no task 'gsm9k'.*gsm8k.*toy_parity"):
        get_task("gsm9k")


@pytest.mark.parametrize("name", TOY_TASKS)
def test_toy_examples(name):
    examples = toy_examples(name)
    assert len({example["prompt"] for example in examples}) == len(examples) == EXAMPLES_PER_TASK
    assert examples == toy_examples(name)
    for example in examples:
        question = example["prompt"].removeprefix("[INST] ").removesuffix(" [/INST]\n").split(": ")[1]
        expected = {
            "toy_echo": question,
            "toy_first_letter": question[0],
            "toy_parity": "even" if question[-1] in "02468" else "odd",
        }[name]
        assert example["response"] == expected
        assert example["choices"] is None or expected in example["choices"]
