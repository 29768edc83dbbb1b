"""Do the gates switch where the task does? Every token behind a junction, by its distance from it (`switching.csv`).

A token's dominant adapter is the one with the largest routing weight, averaged over all adapted modules. It is compared
with the adapter of the token's own problem, and with that of the problem before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from data_prep.composite import CompositeItem
from meteora import MeteoraModel
from meteora.batches import token_ids
from meteora.study.measures import Row
from meteora.study.routing import token_routing
from meteora.study.sequential import transcript
from meteora.study.statistics import bootstrap_interval

PARTS = ("problem", "answer")


class Switching(NamedTuple):
    """What the gates chose behind the junctions, problem 2 to n of every item.

    Attributes:
        rows: ``composite,part,distance,own,previous,weight,tokens``: of the tokens at that distance from the first one
            of the problem's prompt (part ``problem``) or of its answer (``answer``), the shares whose dominant adapter
            is their own problem's or the previous problem's, and the mean routing weight of their own.
        totals: ``composite,part,value,low,high,n``: share of own over all distances, every one of n items counting the
            same, with a bootstrap interval over the items.
    """

    rows: list[Row]
    totals: list[Row]


def trace_switching(
    model: MeteoraModel,
    tokenizer,
    items: Sequence[CompositeItem],
    answers: Sequence[Sequence[str | None]],
    *,
    active: Callable[[], AbstractContextManager],
    progress: bool = True,
) -> Switching:
    """Run the transcripts of sequential composites once more, as text, and look at every token's adapters.

    Args:
        model: its adapters have the tasks' names.
        items: of one size.
        answers: what the method answered in protocol `sequential`, one list per item; None for an empty answer.
        active: the context in which the model is the method that answered.
    """
    counts = defaultdict(lambda: np.zeros(4))  # (part, distance) -> own, previous, weight of own, tokens
    by_item: dict[str, list[float]] = {part: [] for part in PARTS}
    with tqdm(total=len(items), desc="switching", unit="item", disable=not progress) as bar, active():
        for item, texts in zip(items, answers, strict=True):
            written = token_ids(tokenizer, [text or "" for text in texts], add_special_tokens=False)
            text = transcript(tokenizer, [example["prompt"] for example in item.examples], written)
            routing = token_routing(model, text.tokens)
            adapters = [model.adapter_names.index(task) for task in item.tasks]
            own_of_item: dict[str, list[bool]] = {part: [] for part in PARTS}
            for n, (part, distance) in enumerate(_places(text.problem, text.is_answer)):
                problem = text.problem[n]
                if problem == 0:
                    continue
                own = routing.dominant[n] == adapters[problem]
                previous = not own and routing.dominant[n] == adapters[problem - 1]
                counts[part, distance] += own, previous, routing.mass[n, adapters[problem]].item(), 1
                own_of_item[part].append(own)
            for part, found in own_of_item.items():
                if found:
                    by_item[part].append(float(np.mean(found)))
            bar.update()
    size = len(items[0].examples)
    rows = []
    for (part, distance), (own, previous, weight, tokens) in sorted(counts.items(), key=lambda kv: kv[0]):
        shares = {"own": own / tokens, "previous": previous / tokens, "weight": weight / tokens, "tokens": int(tokens)}
        rows.append({"composite": size, "part": part, "distance": distance, **shares})
    rows.sort(key=lambda row: PARTS.index(row["part"]))
    totals = [
        {"composite": size, "part": part, **dict(zip(("value", "low", "high"), bootstrap_interval(values)))}
        | {"n": len(values)}
        for part, values in by_item.items()
        if values
    ]
    return Switching(rows, totals)


def _places(problems: Sequence[int], is_answer: Sequence[bool]) -> list[tuple[str, int]]:
    """Every token's part, and its distance from the part's first token."""
    places, last, distance = [], None, 0
    for here in zip(problems, is_answer, strict=True):
        distance = distance + 1 if here == last else 0
        last = here
        places.append((PARTS[here[1]], distance))
    return places
