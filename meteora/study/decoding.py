"""Greedy decoding of a batch of transcripts that grow in one KV cache.

`model.generate` answers one prompt; the study also needs problem, answer, next problem, next answer, ... in *one*
cache, and a common few-shot prefix that is encoded once for all prompts. Both are the same operation: append some
tokens to every row, read the next token, repeat. Rows have different lengths, so what is appended is left-padded
*within the cache* and masked; positions count real tokens only. A row therefore sees exactly what it would see alone
and without padding (`tests/test_decoding.py` compares with one-at-a-time runs, with uncached runs and with
`model.generate`).

On a GPU the steps of an answer are replayed from a CUDA graph (`graphs.py`), where the model allows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from meteora.study.graphs import FixedSteps, can_be_fixed

# Preparing fixed steps costs about one step as Python runs it, or two where it has to be done again: on a slow CPU a
# fifth of a second, in which a GPU does some fifty steps.
LEAST_STEPS = 4  # for fewer, they are not worth it
LEAST_STEPS_AGAIN = 64  # nor, for fewer, a smaller batch

# (generated so far (B, t), next-token scores (B, V)) -> scores (B, V): the signature of transformers' LogitsProcessor
ScoreProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def model_device(model: torch.nn.Module) -> torch.device:
    """Where the model's weights are, hence where its inputs must be."""
    return next(model.parameters()).device


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all `prompts` share, short enough to leave every prompt one token of its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # all others lie between these two in lexicographic order
    length = 0
    for a, b in zip(first, last):
        if a != b:
            break
        length += 1
    return min(length, min(len(p) for p in prompts) - 1)


class EncodedPrefix:
    """The KV cache of tokens with which every prompt of a set begins, computed once.

    This is valid for MeteoRA as well: gates route every token by itself, so a prefix's keys and values do not depend on
    what follows it. It belongs to one model in one setting (adapters, top-k, temperature): make a new one for another.
    """

    def __init__(self, model: torch.nn.Module, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        ids = torch.tensor([self.tokens], device=model_device(model))
        with torch.no_grad():
            self._cache = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1
            ).past_key_values

    def expand(self, batch: int) -> Any:
        """A fresh cache that holds the prefix for `batch` rows; the stored one stays as it is."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(batch)
        return cache


class TranscriptBatch:
    """`batch` transcripts that grow together: `extend` appends given tokens, `decode` appends the model's own.

    Args:
        model: any Hugging Face causal LM, or a `MeteoraModel`; in eval mode, as routing and dropout are part of it.
        batch: number of rows.
        pad_token_id: what stands in the masked positions; any valid id, since nothing attends to it.
        eos_token_id: the token that ends an answer; it is not part of the answer that `decode` returns.
        prefix: tokens already encoded for all rows.
        fixed: whether an answer's steps run over a cache of fixed size; by default on a GPU, where they are a graph.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: int,
        *,
        pad_token_id: int,
        eos_token_id: int,
        prefix: EncodedPrefix | None = None,
        fixed: bool | None = None,
    ) -> None:
        self.model, self.pad, self.eos = model, pad_token_id, eos_token_id
        self.device = model_device(model)
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        known = len(prefix.tokens) if prefix else 0
        self._cache = prefix.expand(batch) if prefix else None
        self._mask = torch.ones(batch, known, dtype=torch.long, device=self.device)  # (B, tokens in the cache)
        self._pending: list[list[int]] = [[] for _ in range(batch)]  # generated, but not yet fed back
        self._scores: torch.Tensor | None = None  # (B, V), for the token after the last one fed
        self._steps: FixedSteps | None = None  # while they hold cache and mask; only within `decode`

    def extend(self, segments: Sequence[Sequence[int]]) -> None:
        """Append one segment of tokens to every row (at least one token each, lengths may differ)."""
        rows = [pending + list(segment) for pending, segment in zip(self._pending, segments, strict=True)]
        if not all(rows):
            raise ValueError("Every row of a TranscriptBatch must be extended by at least one token.")
        self._pending = [[] for _ in rows]
        self._feed(rows)

    def _feed(self, rows: list[list[int]]) -> None:
        """One forward pass over `rows`, left-padded to the longest; an empty row adds a masked position only."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.pad] * (longest - len(row)) + row for row in rows], device=self.device)
        new = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        # position = number of real tokens before it, so padding moves nothing
        positions = (self._mask.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self._mask = torch.cat([self._mask, new], dim=1)
        with torch.no_grad():
            out = self.model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,  # only the next token is asked for: no (B, tokens, V) logits of the prompt
            )
        self._cache, self._scores = out.past_key_values, out.logits[:, -1]

    def _step(self, rows: list[list[int]], most: int) -> None:
        """Feed at most one token a row; no more than `most` such steps follow each other, this one included."""
        if self._steps is None:
            if not self.fixed or most < LEAST_STEPS or not can_be_fixed(self.model, self._cache):
                self._feed(rows)
                return
            self._steps = FixedSteps(self.model, self._cache, self._mask, most)
        self._scores = self._steps.feed(rows)
        if not self._steps.room:
            self._end_steps()

    def _end_steps(self) -> None:
        """Take cache and mask back from the fixed steps, if there are any."""
        if self._steps is not None:
            self._mask, self._steps = self._steps.close(), None

    def _leaving_pays(self, kept: int, rows: int, most: int) -> bool:
        """Whether finished rows should leave now: without delay, unless steps have to be prepared anew for that."""
        if self._steps is None:
            return kept < rows
        return 2 * kept <= rows and most >= LEAST_STEPS_AGAIN

    def decode(
        self, limits: Sequence[int], *, processor: ScoreProcessor | None = None, last: bool = False
    ) -> list[list[int]]:
        """Greedy continuation of every row, up to its end-of-text token or its limit.

        Args:
            limits: most new tokens per row.
            processor: changes the scores before the arg max; it sees the tokens generated by this call only.
            last: nothing will be appended afterwards, so finished rows can leave the batch and cost nothing more.

        Returns:
            The new tokens of each row without the end-of-text token. The cache holds all of them but the last, which
            the next `extend` feeds first.
        """
        if self._scores is None:
            raise RuntimeError("Call extend() before decode(): there is no token to continue from.")
        answers: list[list[int]] = [[] for _ in limits]
        rows = list(range(len(limits)))  # which transcript each row of the batch is
        finished = [limit <= 0 for limit in limits]
        scores = self._scores
        # By this call; pads where a row has ended.
        written = torch.empty(len(rows), 0, dtype=torch.long, device=self.device)
        while True:
            if processor is not None and not all(finished):
                scores = processor(written, scores)
            chosen = scores.argmax(-1).tolist()
            fed: list[list[int]] = []
            for row, token in zip(rows, chosen):
                fed.append([])
                if finished[row]:
                    continue
                if token == self.eos:
                    finished[row] = True
                    continue
                answers[row].append(token)
                if len(answers[row]) >= limits[row]:
                    finished[row] = True
                    self._pending[row] = [token]
                else:
                    fed[-1] = [token]
            if all(finished):
                break
            if processor is not None:
                new = [token[0] if token else self.pad for token in fed]
                written = torch.cat([written, torch.tensor(new, device=self.device)[:, None]], dim=1)
            keep = [i for i, row in enumerate(rows) if not finished[row]]
            most = max(limits[rows[i]] - len(answers[rows[i]]) for i in keep)
            if last and self._leaving_pays(len(keep), len(rows), most):
                self._end_steps()
                index = torch.tensor(keep, device=self.device)
                self._cache.batch_select_indices(index)
                self._mask, written = self._mask[index], written[index]
                rows, fed = [rows[i] for i in keep], [fed[i] for i in keep]
            self._step(fed, most)
            scores = self._scores
        self._scores = None
        self._end_steps()
        if last:
            self._cache = None
        return answers
