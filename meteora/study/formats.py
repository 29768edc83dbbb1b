"""Composite prompts to train on, since adapters that only ever answered one question stop after one answer.

A text is a composite problem of training examples with its solved examples and its numbered answers. It trains an
adapter of each of its tasks, on its own answer and on what leads to the next one; and gates, the right adapter changing
from question to question and from answer to answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.composite import Piece, few_shot_pieces, joined, question_pieces
from meteora.study.measures import Example


@dataclass(frozen=True)
class CompositeText:
    """A composite prompt in pieces, and the examples it asks about, whose responses are its answers."""

    prompt: list[Piece]
    examples: list[Example]

    @property
    def answers(self) -> list[str]:
        return [example["response"] for example in self.examples]


def composite_texts(
    examples: Mapping[str, Sequence[Example]],
    count: int,
    *,
    sizes: Sequence[int],
    shots: Sequence[int] = (0, 2),
    characters: int | None = None,
    seed: int = 0,
) -> list[CompositeText]:
    """``count`` composites of different tasks in random order.

    Args:
        examples: task -> training examples. Those whose response is not one line are left out.
        sizes, shots: one of each is drawn for every text.
        characters: longest text; longer ones are drawn again.

    Raises:
        ValueError: if there are fewer tasks than the largest size, or nothing is short enough.
    """
    if max(sizes) > len(examples):
        raise ValueError(f"composites of {max(sizes)} different tasks need as many tasks, not {len(examples)}.")
    draw = random.Random(seed)
    one_line = {task: [row for row in rows if "\n" not in row["response"]] for task, rows in examples.items()}
    if empty := [task for task, rows in one_line.items() if not rows]:
        raise ValueError(f"task {empty[0]!r} has no example whose response is one line.")
    texts: list[CompositeText] = []
    for _ in range(100 * count):
        if len(texts) == count:
            return texts
        tasks = draw.sample(list(one_line), draw.choice(sizes))
        wanted = draw.choice(shots) + 1
        columns = [draw.sample(one_line[task], min(wanted, len(one_line[task]))) for task in tasks]
        asked = [column[-1] for column in columns]
        solved = list(zip(*(column[:-1] for column in columns), strict=False))
        prompt = few_shot_pieces(solved) + question_pieces(asked, introduced=bool(solved))
        if characters is None or len(joined(prompt)) <= characters:
            texts.append(CompositeText(prompt, asked))
    raise ValueError(f"only {len(texts)} of {count} composites were found that have {characters} characters or fewer.")


def gate_row(text: CompositeText) -> dict[str, Any]:
    """A row for `meteora.train_gates`: every token's right adapter is the one that is to write the token behind it."""
    tasks = [example["task"] for example in text.examples]
    segments = [{"text": piece.text, "task": tasks[piece.slot]} for piece in text.prompt]
    # The last line break is where the first answer begins, the full stop of a number where that number's does.
    segments[-1]["text"] = segments[-1]["text"].removesuffix("\n")
    opening = "\n1"
    for slot, answer in enumerate(text.answers):
        segments += [{"text": opening, "task": tasks[max(0, slot - 1)]}]
        segments += [{"text": f". {answer}", "task": tasks[slot]}]
        opening = f"\n{slot + 2}"
    return {"segments": segments}


def adapter_rows(text: CompositeText) -> list[tuple[str, dict[str, Any]]]:
    """Task and row for `meteora.train_adapters`, one for each answer: its text, and the number of the next one."""
    rows, context = [], joined(text.prompt)
    for slot, (example, answer) in enumerate(zip(text.examples, text.answers, strict=True)):
        last = slot == len(text.examples) - 1
        written = ("1." if slot == 0 else "") + f" {answer}" + ("" if last else f"\n{slot + 2}.")
        segments = [{"text": context}, {"text": written, "is_response": True}]
        rows.append((example["task"], {"segments": segments, "ended": last}))
        context += written
    return rows
