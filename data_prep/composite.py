"""Composite-n problems: n prompts of different tasks at once, answered by numbered lines.

The layout is that of the authors' published composite_10 file. Their two examples were written by hand; ours are
drawn from the training split, as no prompt of it is among those that are measured.
"""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .errors import DataError
from .prepare import load_split
from .splits import Example, stable_rng

ZERO_SHOT_INSTRUCTION = (
    "Generate answers to the questions below, one numbered line for each answer, "
    "starting with 1. for the first question:\n\n"
)


class Piece(NamedTuple):
    """A part of a composite prompt, and the number (from 0) of the sub-task it belongs to."""

    text: str
    slot: int


@dataclass(frozen=True)
class CompositeItem:
    """One composite problem.

    tasks, examples: the sub-tasks in order, and an example of each.
    prefix: the few-shot text, the same for all items of a set; "" without shots.
    body: the questions (with shots=0 preceded by an instruction, as nothing else would ask for numbered lines).
    """

    id: str
    tasks: list[str]
    prefix: str
    body: str
    examples: list[Example]

    @property
    def prompt(self) -> str:
        """All the model gets to see."""
        return self.prefix + self.body


def build_composites(
    data_dir: str | Path, tasks: Sequence[str], items: int, *, shots: int = 2, seed: int = 0, split: str = "test"
) -> list[CompositeItem]:
    """A set of `items` composite problems of the given tasks, from data written by `prepare_tasks`.

    Args:
        tasks: the sub-tasks, in the order of the questions.
        shots: solved examples in the prefix, taken from the training splits; 0 for none.
        seed: seeds the choice of examples; it, the tasks and the split fix the set.
        split: whose examples are asked for, `test` or `valid`.

    Raises:
        DataError: too few prepared examples, or data not prepared.
    """
    if not tasks or items < 1 or shots < 0:
        raise DataError(f"A composite needs tasks, items >= 1 and shots >= 0, not {list(tasks)}, {items}, {shots}.")
    prefix = joined(few_shot_pieces(list(zip(*(_shots(data_dir, task, shots, seed) for task in tasks), strict=True))))
    columns = []
    for position, task in enumerate(tasks):
        examples = load_split(data_dir, task, split)
        if len(examples) < items:
            raise DataError(
                f"{items} composite items need {items} {split} examples of {task} and {data_dir} has {len(examples)}: "
                "ask for fewer items or prepare more."
            )
        stable_rng(seed, "composite", position, task).shuffle(examples)
        columns.append(examples[:items])
    built = []
    for index, examples in enumerate(zip(*columns, strict=True)):
        body = joined(question_pieces(examples, introduced=shots > 0))
        built.append(CompositeItem(f"composite_{len(tasks)}/{index}", list(tasks), prefix, body, list(examples)))
    return built


def parse_answers(text: str, n: int) -> list[str | None]:
    """The n numbered answers in a model's text; None where one is missing or empty, i.e. not attempted.

    Answer i is what follows `i. ` at the start of a line, to the end of that line; its first occurrence counts.
    """
    answers: list[str | None] = [None] * n
    for match in re.finditer(r"^[^\S\n]*(\d+)\.[^\S\n]+(\S.*)$", text, flags=re.MULTILINE):
        # Compared as text: a digit of another script or a leading zero is not the number i.
        if match[1] in (numbers := [str(i + 1) for i in range(n)]):
            index = numbers.index(match[1])
            if answers[index] is None:
                answers[index] = match[2].strip()
    return answers


def _shots(data_dir: str | Path, task: str, shots: int, seed: int) -> list[Example]:
    """Training examples for the prefix: answers of one line, prompts no longer than the median.

    A numbered answer ends with its line, and every item carries the prefix, so long ones would leave no room.
    """
    if shots == 0:
        return []
    examples = load_split(data_dir, task, "train")
    limit = statistics.median(len(example["prompt"]) for example in examples) if examples else 0
    fitting = [e for e in examples if len(e["prompt"]) <= limit and "\n" not in e["response"]]
    if len(fitting) < shots:
        raise DataError(
            f"{shots} shots of {task} need as many training examples with one-line answers and {data_dir} has "
            f"{len(fitting)}: ask for fewer shots or prepare more."
        )
    return stable_rng(seed, "shots", task).sample(fitting, shots)


def few_shot_pieces(shots: Sequence[Sequence[Example]]) -> list[Piece]:
    """The few-shot text: solved examples, one for each sub-task in each of `shots`; nothing without shots."""
    pieces: list[Piece] = []
    for number, examples in enumerate(shots, 1):
        for slot, example in enumerate(examples):
            pieces.append(Piece("\n" if slot else f"\nExample {number}:\n\n", slot))
            pieces.append(Piece(example["prompt"], slot))
        for slot, example in enumerate(examples):
            pieces.append(Piece(f"\n{slot + 1}. {example['response']}", slot))
        pieces.append(Piece("\n\n", len(examples) - 1))
    if shots:
        pieces.append(Piece("\nFollowing the example above, generate answers to the questions below:\n\n", 0))
    return pieces


def question_pieces(examples: Sequence[Example], *, introduced: bool) -> list[Piece]:
    """The questions to be answered; without a few-shot text that introduces them, an instruction does."""
    pieces = [Piece("" if introduced else ZERO_SHOT_INSTRUCTION, 0)]
    for slot, example in enumerate(examples):
        pieces.append(Piece(f"{example['prompt']}\n" + ("\n" if slot + 1 < len(examples) else ""), slot))
    return pieces


def joined(pieces: Sequence[Piece]) -> str:
    """The text that was cut into `pieces`."""
    return "".join(piece.text for piece in pieces)
