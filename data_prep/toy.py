"""Three generated tasks, small enough for a tiny model, for running the study without a network."""

import random

from .splits import stable_rng

_WORDS = ("red", "green", "blue", "black", "white", "pink")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
EXAMPLES_PER_TASK = 500


def _echo(rng: random.Random) -> tuple[str, str, list[str] | None]:
    words = " ".join(rng.choices(_WORDS, k=rng.randint(2, 4)))
    return f"Repeat: {words}", words, None


def _first_letter(rng: random.Random) -> tuple[str, str, list[str] | None]:
    word = "".join(rng.choices(_LETTERS, k=4))
    return f"First letter: {word}", word[0], None


def _parity(rng: random.Random) -> tuple[str, str, list[str] | None]:
    number = rng.randrange(1000, 10000)
    return f"Odd or even: {number}", ("even", "odd")[number % 2], ["odd", "even"]


_MAKERS = {"toy_echo": _echo, "toy_first_letter": _first_letter, "toy_parity": _parity}


def toy_examples(task: str) -> list[dict]:
    """`EXAMPLES_PER_TASK` distinct examples of a toy task, the same ones in every run."""
    rng = stable_rng("toy", task)
    rows: dict[str, dict] = {}
    while len(rows) < EXAMPLES_PER_TASK:
        question, answer, choices = _MAKERS[task](rng)
        prompt = f"[INST] {question} [/INST]\n"
        rows.setdefault(
            prompt,
            {"task": task, "id": f"{task}/{len(rows)}", "prompt": prompt, "response": answer, "choices": choices},
        )
    return list(rows.values())
