"""Encoding, balanced steps and micro-batches."""

import pytest
import torch

from data_prep.base_models import load_base_model
from meteora import batches
from meteora.batches import MIXED, Sample, balanced_steps, by_task, collate, encode, micro_batches
from meteora.training_loop import response_places

CPU = torch.device("cpu")


def encoded(core, rows, max_length=100):
    return encode(rows, {"one": 0, "two": 1}, core.Tokenizer(), max_length)


def test_a_sample_is_prompt_response_and_end(core):
    (sample,) = encoded(core, [{"task": "two", "prompt": "ab", "response": "c"}])
    prompt = core.Tokenizer()("ab")["input_ids"]
    assert sample.ids == prompt + core.Tokenizer()("c", add_special_tokens=False)["input_ids"] + [2]
    assert (sample.is_response, sample.tasks, sample.task) == ([False] * 3 + [True] * 2, [1] * 5, 1)


def test_a_long_prompt_loses_its_beginning_and_only_then_the_response_its_end(core):
    row = {"task": "one", "prompt": "abcdef", "response": "xyz"}
    (whole,) = encoded(core, [row])
    (cut,) = encoded(core, [row], max_length=6)
    assert cut.ids == whole.ids[-6:] and cut.response_tokens == 4
    (tight,) = encoded(core, [row], max_length=3)
    assert tight.ids == [whole.ids[6], *whole.ids[7:9]] and tight.is_response.index(True) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the dataset is empty"),
        (["a text"], "row 0 of the dataset is a str; the dataset must be a list of rows, each a dict with prompt, "),
        ({"one": [{"prompt": "a", "response": "b"}]}, "row 0 of the dataset is a str; .* must be a list of rows"),
        ([{"task": "one", "prompt": "a", "response": ""}, None], "row 1 of the dataset is a NoneType"),
        ([{"task": "one", "prompt": "a"}], "row 0 of the dataset has no 'response'"),
        ([{"segments": [{"task": "one"}]}], "row 0 of the dataset has no 'text'; each needs text, task"),
        ([{"turns": 5}], r"row 0 of the dataset has turns=5; it must be a list of dicts"),
        ([{"turns": [None]}], r"row 0 of the dataset has turns=\[None\]; it must be a list of dicts"),
        ([{"segments": ["a"]}], r"row 0 of the dataset has segments=\['a'\]; it must be a list of dicts"),
        ([{"segments": []}], "row 0 of the dataset has no segments with a text; give at least one"),
        ([{"segments": [{"task": "one", "text": ""}]}], "row 0 of the dataset has no segments with a text; give at least one"),
        ([{"task": "one", "prompt": "a", "response": None}], "row 0 of the dataset has response=None, which must be a"),
        ([{"task": "one", "prompt": 7, "response": "a"}], "row 0 of the dataset has prompt=7, which must be a string"),
        (
            [
                {"task": "one", "prompt": "a", "response": ""},
                {"turns": [{"task": "one", "prompt": "a", "response": 0.5}]},
            ],
            "row 1 of the dataset has response=0.5, which must be a string",
        ),
        ([{"segments": [{"task": "one", "text": b"a"}]}], "row 0 of the dataset has text=b'a', which must be a string"),
        ([{"task": ["one"], "prompt": "a", "response": "b"}], "row 0 .* has task=.'one'., which must be a string"),
        ([{"task": "one", "prompt": "a", "response": ""}, {"task": "3", "prompt": "", "response": ""}], "row 1 .*'3'"),
    ],
)
def test_bad_rows_are_named(core, rows, message):
    with pytest.raises(ValueError, match=message):
        encoded(core, rows)


def test_a_prompt_without_a_token_and_a_tokenizer_without_an_end_are_refused(core):
    tokenizer = core.Tokenizer()
    without_start = lambda text, add_special_tokens=True: tokenizer(text, add_special_tokens=False)  # noqa: E731
    bare = type("Bare", (), {"eos_token_id": 2, "__call__": staticmethod(without_start)})()
    with pytest.raises(ValueError, match="row 0 .* empty prompt"):
        encode([{"task": "one", "prompt": "", "response": "x"}], {"one": 0}, bare, 10)
    bare.eos_token_id = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode([], {"one": 0}, bare, 10)


def test_labels_are_masked_by_length_where_pad_is_end_of_text(core):
    samples = encoded(core, [
        {"task": "one", "prompt": "abc", "response": "xy"}, {"task": "two", "prompt": "a", "response": ""},
    ])  # fmt: skip
    batch = collate(samples, core.Tokenizer.pad_token_id, CPU)
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert batch.labels[0].tolist() == [-100] * 4 + samples[0].ids[4:]
    assert batch.labels[1].tolist() == [-100, -100, 2, -100, -100, -100, -100]  # one end is learned, the padding is not
    assert batch.tasks == [0, 1]


def test_every_step_is_balanced_and_every_task_goes_round(core):
    rows = core.rows(count=3) + [{"task": "one", "prompt": f"more {n}", "response": "x"} for n in range(2)]
    groups = by_task(encoded(core, rows))
    assert list(groups) == [0, 1] and [len(group) for group in groups.values()] == [5, 3]
    steps = list(balanced_steps(groups, 2, 15, seed=1))
    assert all([sample.task for sample in step] == [0, 0, 1, 1] for step in steps)
    drawn = [tuple(sample.ids) for step in steps for sample in step if sample.task == 0]
    assert all(drawn.count(tuple(sample.ids)) == 6 for sample in groups[0])  # 30 draws of 5 samples
    assert steps == list(balanced_steps(groups, 2, 15, seed=1)) != list(balanced_steps(groups, 2, 15, seed=2))


def test_as_many_samples_of_several_tasks_as_wanted(core):
    rows = core.rows(count=3)
    groups = by_task(encoded(core, rows + [{"turns": [rows[0], rows[-1]]}, {"turns": [rows[-1], rows[0]]}]))
    counts = lambda *mixed: [  # noqa: E731
        [[sample.task for sample in step].count(task) for task in (MIXED, 0, 1)]
        for step in balanced_steps(groups, 2, 3, 0, *mixed)
    ]
    assert counts() == counts(None) == [[2, 2, 2]] * 3 and counts(5) == [[5, 2, 2]] * 3


@pytest.mark.parametrize("max_tokens", [1, 20, 50, 10_000])
def test_micro_batches_hold_every_sample_once_and_fit(core, max_tokens):
    samples = encoded(core, core.rows(count=9))
    batches = list(micro_batches(samples, max_tokens, 2, CPU))
    assert all(batch.input_ids.numel() <= max_tokens or len(batch.tasks) == 1 for batch in batches)
    lines = [
        ids[mask.bool()].tolist() for b in batches for ids, mask in zip(b.input_ids, b.attention_mask, strict=True)
    ]
    assert sorted(lines) == sorted(sample.ids for sample in samples)
    assert len(batches) == (18 if max_tokens == 1 else 1 if max_tokens == 10_000 else len(batches))


def test_turns_share_one_context_and_keep_their_tasks(core):
    turns = [{"task": "two", "prompt": "ab", "response": "c"}, {"task": "one", "prompt": "d", "response": "ef"}]
    (sample,) = encoded(core, [{"turns": turns}])
    (first,) = encoded(core, turns[:1])
    text = core.Tokenizer()("\nd", add_special_tokens=False)["input_ids"]
    rest = core.Tokenizer()("ef", add_special_tokens=False)["input_ids"]
    assert sample.ids == [*first.ids, *text, *rest, core.Tokenizer.eos_token_id]
    assert sample.is_response == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 3
    assert sample.tasks == [1] * 5 + [0] * 5 and sample.task == MIXED
    assert by_task([sample, first]) == {MIXED: [sample], 1: [first]}
    batch = collate([sample, first], 0, torch.device("cpu"))
    assert batch.token_tasks.tolist() == [sample.tasks, [1] * 5 + [0] * 5] and batch.tasks == [MIXED, 1]
    assert torch.equal(batch.labels[0] != -100, torch.tensor(sample.is_response))


def test_long_turns_lose_the_beginning(core):
    turns = [{"task": "two", "prompt": "ab", "response": "c"}, {"task": "one", "prompt": "d", "response": "ef"}]
    (whole,), (cut,) = encoded(core, [{"turns": turns}]), encoded(core, [{"turns": turns}], 7)
    assert cut.ids == whole.ids[-7:] and cut.tasks == whole.tasks[-7:] and cut.is_response == whole.is_response[-7:]


def test_a_row_without_turns_is_refused(core):
    with pytest.raises(ValueError, match="row 0 of the dataset has no turns"):
        encoded(core, [{"turns": []}])


def test_a_list_of_texts_is_encoded_as_each_alone(core, monkeypatch):
    tokenizer = load_base_model("tiny")[1]
    one_by_one = lambda _, *texts, **options: tokenizer(*texts, **options)  # noqa: E731
    alone = type("Alone", (), {"eos_token_id": tokenizer.eos_token_id, "__call__": one_by_one})
    rows = core.rows()
    rows += [{"turns": [rows[0], {"task": "two", "prompt": "ünd?", "response": ""}, rows[9]]}, *rows[3:5]]
    rows.insert(4, {"task": "two", "segments": [{"text": "ab "}, {"text": "cd", "is_response": True}], "ended": False})
    monkeypatch.setattr(batches, "_ROWS_AT_ONCE", 5)
    for max_length in (100, 8):
        together, apart = (encode(rows, {"one": 0, "two": 1}, t, max_length) for t in (tokenizer, alone()))
        assert together == apart and len(together) == len(rows)
    rows[11] = {"task": "one", "prompt": "x"}
    for t in (tokenizer, alone()):
        with pytest.raises(ValueError, match="row 11 of the dataset has no 'response'"):
            encode(rows, {"one": 0, "two": 1}, t, 100)


def test_a_turn_ends_where_a_response_does(core):
    turns = [{"task": "two", "prompt": "ab", "response": "c"}, {"task": "one", "prompt": "d", "response": "efg"}]
    samples = encoded(core, [{"turns": turns}, turns[0], {"turns": turns * 2}])
    assert [sample.turns for sample in samples] == [2, 1, 4]
    lengths = collate(samples, 2, CPU).turn_lengths()
    both = [5] * 5 + [6] * 6
    assert [row[: len(sample.ids)].tolist() for row, sample in zip(lengths, samples)] == [both, both[:5], both * 2]


def test_what_was_cut_off_may_leave_a_text_that_begins_with_its_response(core):
    rows = [{"task": "two", "prompt": "ab", "response": "cdef"}, {"task": "one", "prompt": "g", "response": "h"}]
    (sample,) = encode([{"turns": rows}], {"one": 0, "two": 1}, core.Tokenizer(), 8)
    assert sample.is_response == [True] * 4 + [False] * 2 + [True] * 2 and sample.turns == 2
    assert collate([sample], 2, CPU).turn_lengths().tolist() == [[4] * 8]


def test_a_first_token_that_nothing_predicts_does_not_count():
    sample = Sample([5, 6, 7, 8], [True, True, False, True], [0] * 4)
    batch = collate([sample], 0, torch.device("cpu"))
    assert sample.response_tokens == 2 == len(response_places(batch.labels)[0])
