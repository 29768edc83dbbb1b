"""The numbered scaffold: exactly n answers, whatever the model writes, and nothing but the scaffold is forced."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.base_models import load_base_model
from meteora.study.guided import GuidedNumbering


@pytest.fixture(scope="module")
def tokenizer():
    return load_base_model("tiny")[1]


class Scripted:
    """A model that writes its lines one after another, whatever stands before; `|` is its end-of-text token."""

    def __init__(self, tokenizer, lines):
        self.tokenizer, self.lines, self.eos = tokenizer, lines, tokenizer.eos_token_id

    def run(self, guide):
        generated, script = [], []
        for line in self.lines:
            for piece in line.replace("|", "\0|\0").split("\0"):
                script += [self.eos] if piece == "|" else self.tokenizer.encode(piece, add_special_tokens=False)
        for _ in range(guide.max_new_tokens + 1):
            _, wanted = guide.split(generated)
            scores = torch.zeros(1, len(self.tokenizer))
            scores[0, script[0] if script else self.eos] = 1.0
            token = guide(torch.tensor([generated], dtype=torch.long), scores).argmax().item()
            if token == self.eos:
                return generated
            if wanted is None and script:
                script.pop(0)
            generated.append(token)
        raise AssertionError("the scaffold let the model write more than max_new_tokens")


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([" yes\n", " no\n", " both\n", " more\n"], "1. yes\n2. no\n3. both"),
        ([" yes|", " no|", " both|"], "1. yes\n2. no\n3. both"),  # ends the text after every answer
        (["|", "\n", " both|"], "1. \n2. \n3. both"),  # empty answers stay empty
        ([" abcdefghijklmno\n", " z|"], "1. abcdefghi\n2. jklm\n3. no"),  # cut after 10 and 4 tokens
        ([], "1. \n2. \n3. "),
    ],
)
def test_exactly_n_answers_of_the_models_own(tokenizer, lines, expected):
    guide = GuidedNumbering(tokenizer, [10, 4, 10])
    assert guide.text(Scripted(tokenizer, lines).run(guide)) == expected


def test_what_a_token_holds_before_a_line_break_is_the_answers(tokenizer, monkeypatch):
    """As Llama-3's `.\n` and `)\n` do; here one letter's token is taken for such a one."""
    (joint,) = tokenizer.encode("q", add_special_tokens=False)[-1:]
    guide = GuidedNumbering(tokenizer, [10, 4])
    guide.ends_line.add(joint)
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decode(ids, **options).replace("q", ".\n"))
    letters = tokenizer.encode("ab", add_special_tokens=False)[-2:]
    first, second = guide.numbers
    list_of_two = [*first, *letters, joint, *second, letters[0], guide.line_break]
    assert guide.split(list_of_two) == ([[*letters, joint], [letters[0]]], guide.eos)
    assert guide.text(list_of_two) == "1. ab.\n2. a"


def test_rows_are_independent_and_what_is_the_models_is_untouched(tokenizer):
    guide = GuidedNumbering(tokenizer, [10, 10])
    first, second = guide.numbers
    letter = tokenizer.encode("a", add_special_tokens=False)[0]
    scores = torch.randn(2, len(tokenizer))
    scores[:, tokenizer.eos_token_id] = -9.0
    out = guide(torch.tensor([[*first, letter], [*first, guide.line_break]]), scores)
    assert torch.equal(out[0], scores[0])
    assert out[1].argmax() == second[0] and out[1].isfinite().sum() == 1


@settings(max_examples=60, deadline=None)
@given(limits=st.lists(st.integers(1, 4), min_size=1, max_size=12), seed=st.integers(0, 999), rows=st.integers(1, 4))
def test_all_rows_at_once_are_each_row_taken_apart(tokenizer, limits, seed, rows):
    guide = GuidedNumbering(tokenizer, limits)
    draw = random.Random(seed)
    some = [guide.eos, guide.line_break, *sorted(guide.ends_line)[:2], *tokenizer.encode("a b", add_special_tokens=False)]
    written = [[] for _ in range(rows)]
    for _ in range(draw.randint(0, 40)):
        best = [draw.choice(some) for _ in written]
        found = guide._wanted(torch.tensor(written, dtype=torch.long).view(rows, -1), torch.tensor(best)).tolist()
        for row, choice, wanted in zip(written, best, found, strict=True):
            answers, token = guide.split(row)
            if token is None and choice == guide.eos and len(answers) < len(limits):
                token = guide.line_break
            assert wanted == (-1 if token is None else token)
            row.append(choice if token is None else token)


def test_max_new_tokens_is_reached_by_a_model_that_never_stops(tokenizer):
    guide = GuidedNumbering(tokenizer, [4, 2, 3])
    generated = Scripted(tokenizer, [" a" * 50]).run(guide)
    assert len(generated) == guide.max_new_tokens - 1  # the last answer's line break is the end of the text
    answers, token = guide.split(generated)
    assert [len(answer) for answer in answers] == [4, 2, 3] and token == tokenizer.eos_token_id


def test_the_same_with_generate(tokenizer):
    model, _ = load_base_model("tiny")
    ids = torch.tensor([tokenizer.encode("question")])
    guide = GuidedNumbering(tokenizer, [5, 5, 5], prompt_length=ids.shape[1])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=guide.max_new_tokens,
        logits_processor=[guide], pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    assert [line[:2] for line in guide.text(out[0, ids.shape[1] :].tolist()).split("\n")] == ["1.", "2.", "3."]


def test_bad_numbers_are_refused(tokenizer):
    for limits in ([], [5, 0]):
        with pytest.raises(ValueError, match="at least 1"):
            GuidedNumbering(tokenizer, limits)
