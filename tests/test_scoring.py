"""Scoring against sacrebleu and rouge-score called directly, and against every trap of the published metrics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu as sacrebleu_corpus_bleu

from meteora.study import scoring


@dataclass(frozen=True)
class FakeTask:
    accuracy: str | None
    name: str = "a_task"


EXACT, SUBSTRING, NUMBER, YESNO = map(FakeTask, ("exact", "substring", "number", "yesno"))
TEXT = FakeTask(None)
HYPOTHESES = ["The cat sat on the mat.", "", "a quick brown fox jumps over", "Nothing alike here at all"]
REFERENCES = ["The cat is on the mat.", "An answer was due.", "The quick brown fox jumps over it", "zzz yyy xxx www"]


@pytest.mark.parametrize(
    ("task", "answer", "reference"),
    [
        (SUBSTRING, "11", "1"),
        (SUBSTRING, "I count 1.5 of them", "1"),
        (SUBSTRING, "-1", "1"),
        (SUBSTRING, "invalid", "valid"),
        (SUBSTRING, "It is incorrect.", "correct"),
        (SUBSTRING, "non-entailment", "entailment"),
        (SUBSTRING, "different people", "differ"),
        (EXACT, "invalid", "valid"),
        (EXACT, "incorrect", "correct"),
        (EXACT, "non-entailment", "entailment"),
        (EXACT, "11", "1"),
    ],
)
def test_part_of_a_word_is_no_answer(task, answer, reference):
    assert scoring.score(task, answer, reference) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("11", "1"), ("invalid", "valid"), ("incorrect", "correct"), ("non-entailment", "entailment")],
)
def test_published_substring_falls_into_every_trap(answer, reference):
    assert scoring.published(SUBSTRING, answer, reference) == 1.0


@pytest.mark.parametrize("answer", ["not valid", "It isn't valid", "this is not a valid argument", "non valid"])
def test_a_negated_choice_is_not_named(answer):
    assert scoring.score(SUBSTRING, answer, "valid", ["valid", "invalid"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("red", 1), ("Red.", 1), ("The booklet is red.", 1), ("not blue but red", 1), ("It's red, isn't it?", 1),
        ("red or blue", 0), ("red, orange, blue", 0), ("blue", 0), ("", 0), ("   ", 0), ("reddish", 0), ("infrared", 0),
        ("dark red", 0), ("I do not know", 0),
    ],
)  # fmt: skip
def test_choices(answer, right):
    assert scoring.score(SUBSTRING, answer, "red", ["red", "blue", "orange", "dark red"]) == right


def test_a_choice_within_a_longer_one_is_not_a_second_answer():
    choices = ["How many teams?", "How many teams have won?"]
    assert scoring.score(SUBSTRING, "How many teams have won?", choices[1], choices) == 1.0
    assert scoring.score(SUBSTRING, "How many teams have won?", choices[0], choices) == 0.0
    assert scoring.score(SUBSTRING, "How many teams have won? How many teams?", choices[1], choices) == 0.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("three", 1), ("3", 1), ("There are three.", 1), ("3 objects", 1), ("1, 2, 3, 4, 5", 0), ("two or three", 0),
        ("33", 0), ("thirty-three", 0), ("thirty three", 0), ("three hundred", 0), ("3 or 47", 0), ("3.5", 0), ("3,000", 0),
    ],
)  # fmt: skip
def test_counting_takes_any_reference_and_no_list_of_numbers(answer, right):
    assert scoring.score(SUBSTRING, answer, ["three", "3"]) == right


def test_choices_as_long_as_each_other_are_looked_for_in_a_fixed_order():
    choices = [f"{one} {other}" for one in ("red", "big", "old") for other in ("red", "big", "old") if one != other]
    program = (
        "from meteora.study import scoring; from types import SimpleNamespace as S; "
        f"print(scoring.score(S(name='x', accuracy='substring'), 'the red big old', 'red big', {choices!r}))"
    )
    found = set()
    for seed in ("0", "1", "2", "3", "4", "5"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-P", "-c", program]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


def test_a_phrase_is_found_in_a_sentence():
    assert scoring.score(SUBSTRING, "They use eight General\n Education units.", "eight general education") == 1
    assert scoring.score(SUBSTRING, "the majority", "major") == 0


@pytest.mark.parametrize("answer", ["Valid", " valid\n", "VALID.", '"valid"', "valid", "‘Valid’."])
def test_exact_forgives_case_space_quotes_and_final_stop(answer):
    assert scoring.score(EXACT, answer, "Valid") == 1.0


@pytest.mark.parametrize("answer", ["", " ", "valid argument", "valid invalid", "v a l i d", "."])
def test_exact_forgives_nothing_else(answer):
    assert scoring.score(EXACT, answer, "Valid") == 0.0


def test_published_exact_does_not_forgive_a_full_stop():
    assert scoring.published(EXACT, " Valid ", "valid") == 1.0
    assert scoring.published(EXACT, "valid.", "valid") == 0.0


def test_published_cleans_the_answers_of_formal_fallacies():
    task = FakeTask("exact", name="formal_fallacies_syllogisms_negation")
    assert scoring.published(task, "I hold it to be invalid, sir", "invalid") == 1.0
    assert scoring.published(task, "not valid", "valid") == 1.0
    assert scoring.score(task, "not valid", "valid") == 0.0


def test_only_the_first_reference_is_known_to_the_published_metric():
    assert scoring.published(SUBSTRING, "3", ["three", "3"]) == 0.0
    assert scoring.score(SUBSTRING, "3", ["three", "3"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("Yes. Frost is no problem.", "Yes. Ceremonies happen in winter.", 1),
        ("no", "No. It would not.", 1),
        ("Yes and no", "Yes.", 0), ("yes or no", "No.", 0), ("Yes/No", "Yes", 0),
        ("none of them", "No.", 0), ("Nobody knows", "No.", 0), ("Probably yes", "Yes.", 0), ("", "No.", 0),
        ("no", "Yes", 0), ("No. No one has been there.", "No.", 1), ("Yes. No dogs are allowed.", "Yes.", 1),
        ("Yes. Yes, it is", "Yes", 1), ("no", "No. No one lives there.", 1), ("Yes, no", "Yes", 0), ("Yes no", "Yes", 0),
        ("No, yes.", "No", 0), ("No-one", "No", 0),
    ],
)  # fmt: skip
def test_yes_and_no(answer, reference, right):
    assert scoring.score(YESNO, answer, reference) == right


def test_published_yes_no_reads_letters():
    assert scoring.published(YESNO, "none of them", "No. It would not.") == 1.0
    assert scoring.published(YESNO, "I know", "No.") == 1.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("So 6 * 7 = 42. The answer is 42.", 1), ("7 times 6\n#### 42", 1), ("... hence 42", 1),
        ("The answer is $42.00", 1),
        ("The answer is 42 apples, not 43", 1), ("The answer is 420", 0), ("42 is wrong, 41", 0), ("", 0), ("many", 0),
        ("The answer is -42", 0), ("42km", 1), ("84-42 is 42", 1), ("The answer is -$42", 0), ("The answer is \u221242", 0),
        ("The answer is .42", 0), ("The answer is...42", 1), ("No.42", 1),
    ],
)  # fmt: skip
def test_number(answer, right):
    assert scoring.score(NUMBER, answer, "6 a day for 7 days\n#### 42") == right


def test_number_with_thousands():
    assert scoring.score(NUMBER, "The answer is 1,234.", "#### 1234") == 1.0
    assert scoring.score(NUMBER, "The answer is 1234", "#### 1,234") == 1.0


def test_number_with_a_sign_or_without_a_zero():
    assert scoring.score(NUMBER, "The answer is -$42", "#### -42") == 1.0
    assert scoring.score(NUMBER, "The answer is \u221242", "#### -42") == 1.0
    assert scoring.score(NUMBER, "The answer is .5", "#### 0.5") == 1.0


def test_published_number_compares_strings():
    assert scoring.published(NUMBER, "The answer is 1,234.", "#### 1,234") == 1.0
    assert scoring.published(NUMBER, "The answer is 42.00", "#### 42") == 0.0
    assert scoring.published(NUMBER, "many", "#### 42") == 0.0


def test_bleu_is_sacrebleus_corpus_bleu():
    expected = sacrebleu_corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert expected > 5
    assert scoring.corpus_bleu(HYPOTHESES, REFERENCES) == pytest.approx(expected)


def test_bleu_with_two_references_each_is_sacrebleus():
    second = ["A cat sat on a mat.", "yes", "one fox jumps over", "Nothing at all"]
    expected = sacrebleu_corpus_bleu(HYPOTHESES, [REFERENCES, second]).score
    assert scoring.corpus_bleu(HYPOTHESES, list(zip(REFERENCES, second))) == pytest.approx(expected)


def test_an_empty_answer_costs_bleu_and_rouge():
    full, dropped = REFERENCES, [REFERENCES[0], *REFERENCES[2:]]
    assert scoring.corpus_bleu([REFERENCES[0], "", *REFERENCES[2:]], full) < scoring.corpus_bleu(dropped, dropped)
    assert scoring.rouge([REFERENCES[0], ""], REFERENCES[:2])["rouge1"] == pytest.approx(0.5)


def test_published_bleu_is_the_authors_call_with_its_bugs():
    answered = [(h.lower(), r) for h, r in zip(HYPOTHESES, REFERENCES) if h]
    as_called = sacrebleu_corpus_bleu([h for h, _ in answered], [[r] for _, r in answered]).score
    assert scoring.corpus_bleu_published(HYPOTHESES, REFERENCES) == pytest.approx(as_called)
    # Only the first answer matters, any reference will do for it, and capitals count against it.
    assert scoring.corpus_bleu_published(["aa bb cc dd", "junk"], ["ee ff gg hh", "aa bb cc dd"]) == pytest.approx(100)
    assert scoring.corpus_bleu_published(["", "aa bb cc dd"], ["zz", "aa bb cc dd"]) == pytest.approx(100)
    assert scoring.corpus_bleu_published(["The Cat Sat Down"], ["The Cat Sat Down"]) < 50
    assert scoring.corpus_bleu_published(["", " "], ["a", "b"]) == 0.0


def test_rouge_is_rouge_scores():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for metric, value in scoring.rouge(HYPOTHESES, REFERENCES).items():
        each = [scorer.score(r, h)[metric].fmeasure for h, r in zip(HYPOTHESES, REFERENCES)]
        assert value == pytest.approx(sum(each) / len(each)) and value > 0
    assert scoring.rouge_scores("a b", ["x y", "a b"])["rouge2"] == 1.0


words = st.text(alphabet="abcXYZ019 .,-'\n", max_size=20)


@given(st.text(max_size=60))
def test_normalising_twice_changes_nothing(text):
    assert scoring.normalise(scoring.normalise(text)) == scoring.normalise(text)


@given(words, st.sampled_from([EXACT, SUBSTRING]))
def test_the_reference_itself_is_right_whatever_its_case(reference, task):
    if scoring.normalise(reference):
        assert scoring.score(task, f"  {reference.upper()}\n", reference) == 1.0


@given(words, words)
def test_exact_implies_contained(prediction, reference):
    if scoring.score(EXACT, prediction, reference):
        assert scoring.score(SUBSTRING, prediction, reference) == 1.0


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_numbers_are_right_when_equal(answer, truth):
    assert scoring.score(NUMBER, f"The answer is {answer:,}.", f"#### {truth}") == float(answer == truth)
    assert scoring.score(SUBSTRING, f"there are {answer}", str(truth)) == float(answer == truth)


@given(words, st.sampled_from([EXACT, SUBSTRING, NUMBER, YESNO]))
def test_empty_answers_are_wrong(reference, task):
    assert scoring.score(task, "", reference) == 0.0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=6))
def test_bleu_agrees_with_sacrebleu_on_anything(pairs):
    hypotheses, references = map(list, zip(*pairs))
    expected = sacrebleu_corpus_bleu(hypotheses, [references]).score
    assert scoring.corpus_bleu(hypotheses, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.score(TEXT, "a", "a"), "task 'a_task' has accuracy None; it must be one of exact, substring"),
        (lambda: scoring.score(EXACT, "a", []), "'a_task' has no reference answer"),
        (lambda: scoring.corpus_bleu(["a"], ["a", "b"]), "of the same length"),
        (lambda: scoring.rouge([], []), "at least one answer"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
