"""How well the gates know the task: every gate by itself, and all gates of a token by majority."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from meteora import GateTrainingConfig, MeteoraModel
from meteora.batches import Batch, balanced_steps, encode, micro_batches
from meteora.study.measures import Example, Row
from meteora.study.routing import split_module
from meteora.training import samples_of_stages


def training_tokens(
    model: MeteoraModel, tokenizer, dataset: Sequence[Mapping], config: GateTrainingConfig
) -> int:
    """How many tokens ``train_gates`` shows the gates, prompts included and pads left out."""
    total = 0
    for stage, groups in samples_of_stages(model, dataset, config, tokenizer):
        steps = stage.steps(max(map(len, groups.values())))
        drawn = balanced_steps(groups, stage.samples_per_step, steps, stage.seed, stage.mixed_per_step)
        total += sum(len(sample.ids) for samples in drawn for sample in samples)
    return total


class GateAccuracy(NamedTuple):
    """Shares of the tokens that were given to the adapter of their sample's task.

    Attributes:
        gates: rows ``task, part, layer, module, accuracy, tokens``; part is prompt or response.
        votes: rows ``task, part, accuracy, tokens`` of the model's majority: the adapter most gates put first.
        positions: rows ``position, accuracy, tokens`` of the majority by the token's place in the text, from 0.
    """

    gates: list[Row]
    votes: list[Row]
    positions: list[Row]


@torch.no_grad()
def gate_accuracy(
    model: MeteoraModel,
    tokenizer,
    examples: Mapping[str, Sequence[Example]],
    *,
    forced: bool = False,
    max_length: int = 1024,
    tokens_per_batch: int = 16384,
    progress: bool = True,
) -> GateAccuracy:
    """Compare every gate's largest logit with the sample's task, at every token that is no padding.

    Args:
        examples: task -> rows {prompt, response, task}; every task is an adapter of the model.
        forced: the sample's own adapter is used everywhere, whatever the gates say. Otherwise the model runs as it is
            set, on its own choices, and a mistake has its consequences for later layers.
    """
    device = next(model.parameters()).device
    counts = defaultdict(lambda: torch.zeros(2, dtype=torch.int64))  # key -> right, all
    ids = {name: n for n, name in enumerate(model.adapter_names)}
    samples = encode([row for rows in examples.values() for row in rows], ids, tokenizer, max_length)
    with tqdm(total=len(samples), desc="gate accuracy", unit="text", disable=not progress) as bar:
        for batch in micro_batches(samples, tokens_per_batch, tokenizer.pad_token_id, device):
            names = [model.adapter_names[task] for task in batch.tasks]
            with model.route_to(names) if forced else nullcontext(), model.trace() as trace:
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                model(**inputs, use_cache=False, logits_to_keep=1)
            by_row, by_position = _count(trace.logits, batch)
            for key, of_rows in zip([(), *((module,) for module in trace.logits)], by_row, strict=True):
                for name, (prompt, response) in zip(names, of_rows, strict=True):
                    counts[name, "prompt", *key] += prompt
                    counts[name, "response", *key] += response
            for position, count in enumerate(by_position):
                counts[position] += count
            bar.update(len(batch.tasks))
    return _rows(counts, model.adapter_names)


def _count(logits: Mapping[str, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU how many tokens are right, and how many there are.

    Of the majority and then of each module, of each row's prompt and response (1 + modules, B, 2, 2), and of the
    majority at each position (S, 2).
    """
    real, response = batch.attention_mask.bool(), batch.labels >= 0
    parts = torch.stack([real & ~response, response], dim=1)  # (B, 2, S)
    tasks = torch.tensor(batch.tasks, device=real.device).unsqueeze(1)
    ballots, found = 0, []
    for of_module in logits.values():
        choice = of_module.argmax(-1)  # (B, S)
        ballots = ballots + torch.nn.functional.one_hot(choice, of_module.shape[-1])
        found.append(choice == tasks)
    right = ballots.argmax(-1) == tasks
    by_row = torch.stack([_right_and_all(choice.unsqueeze(1), parts, dim=2) for choice in (right, *found)])
    return by_row.cpu(), _right_and_all(right, real, dim=0).cpu()


def _right_and_all(right: torch.Tensor, where: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.stack([(right & where).sum(dim), where.sum(dim)], dim=-1)


def _rows(counts: Mapping, names: Sequence[str]) -> GateAccuracy:
    result = GateAccuracy([], [], [])
    for key, (right, tokens) in counts.items():
        values = {"accuracy": int(right) / max(1, int(tokens)), "tokens": int(tokens)}
        if isinstance(key, int):
            result.positions.append({"position": key, **values})
        elif len(key) == 2:
            result.votes.append({"task": key[0], "part": key[1], **values})
        else:
            layer, module = split_module(key[2])
            result.gates.append({"task": key[0], "part": key[1], "layer": layer, "module": module, **values})
    result.positions.sort(key=lambda row: row["position"])
    for rows in (result.gates, result.votes):
        rows.sort(key=lambda row: names.index(row["task"]))
    return result


def pooled_accuracy(rows: Sequence[Row]) -> float:
    """The accuracy over all tokens that ``rows`` were counted on."""
    return sum(row["accuracy"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
