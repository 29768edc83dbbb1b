"""Training examples of several tasks put into one context, so that the gates learn to switch where the task does."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

Example = Mapping


def gate_examples(examples: Mapping[str, Sequence[Example]], transcripts: int, *, seed: int = 0) -> list[dict]:
    """What gates are trained on: all examples, task by task, then so many `mixed_transcripts` of them."""
    return [row for rows in examples.values() for row in rows] + mixed_transcripts(examples, transcripts, seed=seed)


def mixed_transcripts(
    examples: Mapping[str, Sequence[Example]], count: int, *, most_turns: int = 5, seed: int = 0
) -> list[dict]:
    """``count`` rows {turns: [...]} for `meteora.train_gates`: 2 to ``most_turns`` random problems and responses.

    Args:
        examples: task -> training examples.
    """
    draw = random.Random(seed)
    tasks = list(examples)
    rows = []
    for _ in range(count):
        chosen = draw.choices(tasks, k=draw.randint(2, most_turns))
        rows.append({"turns": [draw.choice(examples[task]) for task in chosen]})
    return rows
