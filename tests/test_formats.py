"""Composite training texts: the evaluated layout, answers given to the right adapters, gates' labels that switch."""

import itertools

import pytest

from data_prep.base_models import load_base_model
from data_prep.composite import build_composites, joined, parse_answers
from data_prep.prepare import load_split, prepare_tasks
from data_prep.tasks import TOY_TASKS
from meteora.batches import encode
from meteora.study.formats import adapter_rows, composite_texts, gate_row

TASKS = list(TOY_TASKS)
IDS = {task: n for n, task in enumerate(TASKS)}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_tasks(TASKS, folder, sizes={"train": 40, "valid": 5, "test": 12})
    return {task: load_split(folder, task, "train") for task in TASKS}, folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_base_model("tiny")[1]


def test_texts_have_the_layout_that_is_evaluated(examples):
    shown, folder = examples
    for shots in (0, 2):
        item = build_composites(folder, TASKS, 1, shots=shots)[0]
        for text in composite_texts(shown, 20, sizes=[3], shots=[shots]):
            shape = [[line[:6] for line in s.split("\n") if line[:1] not in "123"] for s in (item.prompt, joined(text.prompt))]
            assert shape[0] == shape[1]
            assert len({row["task"] for row in text.examples}) == 3
            assert all(row in shown[row["task"]] for row in text.examples)
            assert all(f"\n{row['prompt']}" in joined(text.prompt) for row in text.examples)


def test_texts_are_seeded_of_all_sizes_orders_and_shots_and_short_enough(examples):
    shown = examples[0]
    texts = composite_texts(shown, 60, sizes=[2, 3], seed=1)
    assert texts == composite_texts(shown, 60, sizes=[2, 3], seed=1) != composite_texts(shown, 60, sizes=[2, 3])
    assert {len(text.examples) for text in texts} == {2, 3}
    orders = {tuple(row["task"] for row in text.examples) for text in texts}
    assert orders >= set(itertools.permutations(TASKS, 2)) | set(itertools.permutations(TASKS, 3))
    assert {joined(text.prompt).count("Example ") for text in texts} == {0, 2}
    longest = sorted(len(joined(text.prompt)) for text in texts)[30]
    short = composite_texts(shown, 20, sizes=[2, 3], characters=longest)
    assert all(len(joined(text.prompt)) <= longest for text in short)


def test_what_cannot_be_drawn_is_said(examples):
    shown = examples[0]
    with pytest.raises(ValueError, match="composites of 4 different tasks need as many tasks, not 3"):
        composite_texts(shown, 1, sizes=[4])
    with pytest.raises(ValueError, match="only 0 of 2 composites were found that have 10 characters"):
        composite_texts(shown, 2, sizes=[2], characters=10)
    with pytest.raises(ValueError, match="task 'long' has no example whose response is one line"):
        composite_texts(shown | {"long": [{"prompt": "a", "response": "b\nc"}]}, 2, sizes=[2])


def test_adapters_write_the_whole_list_one_answer_each(examples, tokenizer):
    for text in composite_texts(examples[0], 10, sizes=[2, 3]):
        rows, written = adapter_rows(text), ""
        for (task, row), example in zip(rows, text.examples, strict=True):
            assert task == example["task"]
            context, response = (segment["text"] for segment in row["segments"])
            assert context == joined(text.prompt) + written
            written += response
            (sample,) = encode([{**row, "task": task}], IDS, tokenizer, 4096)
            assert set(sample.tasks) == {IDS[task]}
            first = sample.is_response.index(True)
            assert all(sample.is_response[first:]), "nothing behind the answer counts"
            own = [token for token, response in zip(sample.ids, sample.is_response, strict=True) if response]
            ended = own[-1] == tokenizer.eos_token_id
            assert ended == (example is text.examples[-1])
            assert tokenizer.decode(own[:-1] if ended else own).strip() == response.strip()
        assert parse_answers(written, len(rows)) == text.answers


def test_gates_labels_switch_with_questions_and_answers(examples, tokenizer):
    for text in composite_texts(examples[0], 10, sizes=[3], shots=[2]):
        row = gate_row(text)
        whole = "".join(segment["text"] for segment in row["segments"])
        lines = "\n".join(f"{n}. {answer}" for n, answer in enumerate(text.answers, 1))
        assert whole == joined(text.prompt) + lines
        (sample,) = encode([row], IDS, tokenizer, 4096)
        offsets = tokenizer(whole, return_offsets_mapping=True)["offset_mapping"]
        order = [IDS[example["task"]] for example in text.examples]
        for slot, example in enumerate(text.examples):
            question = whole.rindex(example["prompt"])
            inside = [
                task for task, (start, end) in zip(sample.tasks, offsets, strict=False)
                if question <= start and end < question + len(example["prompt"])
            ]  # fmt: skip
            assert inside and set(inside) == {order[slot]}
            stop = len(joined(text.prompt)) + lines.index(f"{slot + 1}.") + 1  # the full stop decides what comes next
            (at,) = [n for n, (start, end) in enumerate(offsets) if start <= stop < end]
            assert sample.tasks[at] == order[slot]
            assert sample.tasks[at - 1] == order[max(0, slot - 1)], "its number is written by the answer before"
        assert sample.ids[-1] == tokenizer.eos_token_id and sample.tasks[-1] == order[-1]
