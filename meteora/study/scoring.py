"""When an answer counts as right: a strict metric, which decides, and the authors' published one beside it.

The published metrics (github.com/NJUDeepEngine/meteora, eval/eval.py and eval/clean.py) keep their traps:

* substring accuracy takes "11" for "1" and "non-entailment" for "entailment";
* yes/no looks for the letters in the first five characters, so that "none" is "no";
* exact accuracy does not forgive a final full stop;
* BLEU is handed its references the wrong way round: the first answer alone is scored, against all references;
* for BLEU empty answers are dropped, and the answers are lower-cased while the references are not.

The strict metrics compare whole words, refuse answers that name several choices, and count every empty answer as wrong.
BLEU is 0..100, everything else 0..1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")

# A minus counts as a sign only where nothing stands before it: "5-3" holds 5 and 3.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.)])\.\d+)")
_LEADING = re.compile(
    r"\W*(yes|no)\b(?!-)(?!\W*(?:and|or|/)\W*(?:yes|no)\b)(?!\W*(?!\1\b)(?:yes|no)\b(?!\s+\w))"
)
_ANSWER_MARK = re.compile(r"####|the answer is", re.IGNORECASE)
# Ahead of a choice these turn it into its opposite: "not valid", "isn't the same".
_NEGATION = r"(?:non|not|never|no|cannot|\w+n't)(?:\s+(?:a|an|the))?\s+"
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand"
).split()


class ScoredTask(Protocol):
    """What scoring needs to know of a task; ``accuracy`` is exact, substring, number, yesno, or ``None``."""

    name: str
    accuracy: str | None


def score(
    task: ScoredTask, prediction: str, references: Sequence[str] | str, choices: Sequence[str] | None = None
) -> float:
    """1.0 if ``prediction`` answers as one of ``references``, else 0.0, by the task's strict metric.

    Args:
        choices: all choices of a multiple-choice sample. With them an answer that names two of them is wrong.

    Raises:
        ValueError: if the task has no accuracy, or there is no reference.
    """
    compare = _rule(_STRICT, task)
    return float(compare(prediction, _as_list(references, task), list(choices or [])))


def published(
    task: ScoredTask, prediction: str, references: Sequence[str] | str, choices: Sequence[str] | None = None
) -> float:
    """1.0 or 0.0 by the authors' metric, which knows the first reference only and no choices. Traps: see above."""
    compare = _rule(_PUBLISHED, task)
    answer = prediction.strip().lower()
    if task.name == "formal_fallacies_syllogisms_negation":
        # Their cleaning step reduces this task's answers to a label wherever it stands.
        answer = next((label for label in ("invalid", "valid") if label in answer), "illegal answer")
    return float(compare(answer, _as_list(references, task)[0]))


def normalise(text: str) -> str:
    """Unicode-normalised, case-folded, single spaces, without the quotes around it and the punctuation at its end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    before = None
    while text != before:
        before = text
        text = text.rstrip(".,;:!?").strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`*":
            text = text[1:-1].strip()
    return text


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str] | str]) -> float:
    """Corpus BLEU of sacrebleu, 0..100; ``references[i]`` are those of ``predictions[i]``, empty answers included."""
    _check_paired(predictions, references)
    return bleu_from_statistics(sum(bleu_statistics(p, r) for p, r in zip(predictions, references)))


def bleu_statistics(prediction: str, references: Sequence[str] | str) -> np.ndarray:
    """What corpus BLEU adds up over the samples: (10,) = matching n-grams, all n-grams (n = 1..4), both lengths."""
    one = BLEU().corpus_score([prediction], [[reference] for reference in _as_list(references)])
    return np.array([*one.counts, *one.totals, one.sys_len, one.ref_len], dtype=np.int64)


def bleu_from_statistics(statistics: np.ndarray) -> float:
    """Corpus BLEU, 0..100, of the sum (10,) of its samples' :func:`bleu_statistics`."""
    counts, totals = statistics[:4].tolist(), statistics[4:8].tolist()
    return BLEU.compute_bleu(counts, totals, int(statistics[8]), int(statistics[9]), smooth_method="exp").score


def corpus_bleu_published(predictions: Sequence[str], references: Sequence[Sequence[str] | str]) -> float:
    """BLEU as the authors call it: the first non-empty answer, lower-cased, against every sample's first reference."""
    _check_paired(predictions, references)
    pairs = [(p.strip().lower(), _as_list(r)[0]) for p, r in zip(predictions, references) if p.strip()]
    if not pairs:
        return 0.0
    return BLEU().corpus_score([pairs[0][0]], [[reference] for _, reference in pairs]).score


def rouge_scores(prediction: str, references: Sequence[str] | str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F1, 0..1) of one answer, against the best matching of its references; 0 if empty."""
    scores = _rouge_scorer().score_multi(_as_list(references), prediction)
    return {metric: float(scores[metric].fmeasure) for metric in ROUGE_METRICS}


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str] | str]) -> dict[str, float]:
    """Means of :func:`rouge_scores` over all samples, empty answers included."""
    _check_paired(predictions, references)
    rows = [rouge_scores(p, r) for p, r in zip(predictions, references)]
    return {metric: float(np.mean([row[metric] for row in rows])) for metric in ROUGE_METRICS}


def _exact(prediction: str, references: list[str], choices: list[str]) -> bool:
    answer = normalise(prediction)
    return bool(answer) and answer in {normalise(reference) for reference in references}


def _whole_words(prediction: str, references: list[str], choices: list[str]) -> bool:
    """Whether the answer names a reference, and no other choice (or, for a number, no other number)."""
    answer = normalise(prediction)
    wanted = {normalise(reference) for reference in references} - {""}
    if not answer or not wanted:
        return False
    if answer in wanted:
        return True
    candidates = wanted | {normalise(choice) for choice in choices} - {""}
    if any(word in _NUMBER_WORDS or _NUMBER.fullmatch(word) for word in wanted):
        candidates |= {*_NUMBER_WORDS, *_NUMBER.findall(answer)}
    named = _named(answer, candidates)
    return bool(named) and named <= wanted


def _named(answer: str, candidates: set[str]) -> set[str]:
    """The candidates that stand in ``answer`` as whole words, the longest taking precedence, negated ones aside."""
    found = set()
    for candidate in sorted(candidates, key=lambda text: (-len(text), text)):  # not in a set's order, which is chance
        if candidate not in answer:  # as by far most are not
            continue
        negated, word = _as_words(candidate)
        answer, named = word.subn("\0", negated.sub("\0", answer))
        if named:
            found.add(candidate)
    return found


@lru_cache(maxsize=1 << 14)  # to compile takes longer than to search; the next method's answers are to the same choices
def _as_words(text: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds a text as whole words: behind a negation, and anywhere.

    A hyphen, a point or an apostrophe joins: "1" is not in "1.5" or "-1", "entailment" not in "non-entailment".
    """
    word = rf"(?<![\w-])(?<!\w[.,'/]){re.escape(text)}(?![\w-])(?![.,'/]\w)"
    return re.compile(rf"(?<![\w-]){_NEGATION}{word}"), re.compile(word)


def _yes_or_no(prediction: str, references: list[str], choices: list[str]) -> bool:
    answer = _leading_yes_or_no(prediction)
    return answer is not None and answer in {_leading_yes_or_no(reference) for reference in references}


def _leading_yes_or_no(text: str) -> str | None:
    """``yes`` or ``no`` if the text begins with that word and does not take it back ("yes and no", "yes, no").

    Only the next word is looked at: with another word directly behind it ("Yes. No dogs are allowed.") it takes nothing back.
    """
    match = _LEADING.match(text.casefold())
    return match.group(1) if match else None


def _same_number(prediction: str, references: list[str], choices: list[str]) -> bool:
    answer = _final_number(prediction)
    return answer is not None and answer in {_final_number(reference) for reference in references}


def _final_number(text: str) -> Decimal | None:
    """The number after the last "####" or "the answer is", else the last number; ``None`` without one."""
    *reasoning, last = _ANSWER_MARK.split(text.replace("\u2212", "-").replace("$", ""))  # a minus of its own, dollars
    numbers = _NUMBER.findall(last)
    if not numbers:
        return None
    return Decimal((numbers[0] if reasoning else numbers[-1]).replace(",", ""))


def _published_exact(answer: str, reference: str) -> bool:
    return answer == reference.lower()


def _published_substring(answer: str, reference: str) -> bool:
    return reference.lower() in answer


def _published_yes_or_no(answer: str, reference: str) -> bool:
    return any(word in reference.lower()[:5] and word in answer[:5] for word in ("yes", "no"))


def _published_number(answer: str, reference: str) -> bool:
    marked = answer.split("the answer is")
    numbers = re.findall(r"-?\d+\.?\d*", (marked[1] if len(marked) > 1 else marked[-1]).replace(",", ""))
    if not numbers:
        return False
    truth = re.search(r"#### (-?[0-9.,]+)", reference)
    number = (numbers[0] if len(marked) > 1 else numbers[-1]).removesuffix(".")
    return number == (truth.group(1) if truth else reference.strip()).replace(",", "")


_STRICT = {"exact": _exact, "substring": _whole_words, "number": _same_number, "yesno": _yes_or_no}
_PUBLISHED = {
    "exact": _published_exact,
    "substring": _published_substring,
    "number": _published_number,
    "yesno": _published_yes_or_no,
}


def _rule(rules: dict, task: ScoredTask):
    if task.accuracy not in rules:
        raise ValueError(f"task {task.name!r} has accuracy {task.accuracy!r}; it must be one of {', '.join(rules)}.")
    return rules[task.accuracy]


def _as_list(references: Sequence[str] | str, task: ScoredTask | None = None) -> list[str]:
    listed = [references] if isinstance(references, str) else list(references)
    if not listed:
        raise ValueError(f"a sample{f' of task {task.name!r}' if task else ''} has no reference answer; give one.")
    return listed


def _check_paired(predictions: Sequence[str], references: Sequence) -> None:
    if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references):
        raise ValueError("give one list of answers and one of references, of the same length.")
    if not predictions:
        raise ValueError("a corpus metric needs at least one answer.")


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(list(ROUGE_METRICS), use_stemmer=False)
