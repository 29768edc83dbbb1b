"""Decoding steps over a KV cache of fixed size: all the same work on the same memory, so a GPU can replay a recording.

In a step of one token a row the GPU works for a fraction of the time that Python needs to start a thousand kernels. As
a CUDA graph they are started all at once. Prompts are encoded in a cache that grows, as ever: `FixedSteps` takes such a
cache over for some steps, and gives it back with their tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from meteora.recording import record
from meteora.study.timing import waits_for_gpu

logger = logging.getLogger(__name__)

ROOM = 256  # steps for which a cache has room, at most: most answers end long before their limit
ROUND = 64  # capacities are multiples of it; attention kernels read masks in aligned pieces

_refused: WeakSet[torch.nn.Module] = WeakSet()  # models whose steps could not be recorded


def can_be_fixed(model: torch.nn.Module, cache: Any) -> bool:
    """Whether `FixedSteps` computes what the model does, and a GPU may be able to record it.

    Left out are caches of another kind (a sliding window moves), attention that wants another mask, PEFT's own models,
    models on several devices, of which a recording would see one, and those that failed before.
    """
    return (
        all(type(part) is DynamicCache for part in _parts(cache))
        and all(type(layer) is DynamicLayer for part in _parts(cache) for layer in part.layers)
        and not isinstance(model, PeftModel)
        and model.config._attn_implementation in ("sdpa", "eager")
        and model not in _refused
        and len({parameter.device for parameter in model.parameters()}) == 1
    )


def _parts(cache: Any) -> Sequence[Any]:
    """The caches that a cache consists of: X-LoRA's is two, of which each has its layers."""
    return getattr(cache, "parts", (cache,))


class FixedLayer(DynamicLayer):
    """One layer's keys and values (B, heads, capacity, head size), taken from a growing layer, which is left empty.

    Args:
        place: (1,), where the next token of all rows is written.
    """

    def __init__(self, growing: DynamicLayer, capacity: int, place: Tensor) -> None:
        super().__init__()
        self._growing, self._place = growing, place
        # Zeros: what a mask hides has no weight, but would still make 0 * NaN of uninitialised memory.
        missing = (0, 0, 0, capacity - growing.keys.shape[2])
        self.keys, growing.keys = torch.nn.functional.pad(growing.keys, missing), None
        self.values, growing.values = torch.nn.functional.pad(growing.values, missing), None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, head size) and return all places, of which the mask knows those that count."""
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values

    def give_back(self, columns: int) -> DynamicLayer:
        """The growing layer, with what is written in the first `columns` places."""
        self._growing.keys, self._growing.values = self.keys[:, :, :columns], self.values[:, :, :columns]
        return self._growing


class FixedSteps:
    """Steps of at most one token a row, until `close`. On a GPU all but the first, or the first two, are replayed.

    A recording reads the model's state as it was: adapters, gates and routing must stay the same until `close`, and
    hooks or traces see nothing of a replay.

    Args:
        cache: of all tokens before; its layers are replaced by fixed ones until `close`.
        mask: (B, columns) int64, 1 for the tokens in the cache that count.
        most: steps that may follow.
    """

    def __init__(self, model: torch.nn.Module, cache: Any, mask: Tensor, most: int) -> None:
        self._model, self._cache, self._parts = model, cache, _parts(cache)
        batch, self._columns = mask.shape
        capacity = -(-(self._columns + min(most, ROOM)) // ROUND) * ROUND
        self.room = capacity - self._columns  # steps that are left
        device, dtype = mask.device, self._parts[0].layers[0].keys.dtype
        self._place = torch.tensor([self._columns], device=device)
        for part in self._parts:
            for n, layer in enumerate(part.layers):  # one after the other, so that one layer at most is there twice
                part.layers[n] = FixedLayer(layer, capacity, self._place)
        # What attention adds to its scores. Of four dimensions, which transformers passes on as it is.
        self._hidden = torch.full((batch, 1, 1, capacity), -torch.inf, dtype=dtype, device=device)
        self._hidden[:, 0, 0, : self._columns].masked_fill_(mask.bool(), 0.0)
        self._positions = mask.sum(1, keepdim=True)  # (B, 1)
        self._inputs = torch.zeros(2, batch, dtype=torch.long, device=device)  # tokens, and whether there is one
        self._graph = StepGraph(model, device) if device.type == "cuda" else None

    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The scores (B, V) behind one more token, or none, of every row; they are overwritten by the next call."""
        self._inputs.copy_(torch.tensor([[row[0] if row else 0 for row in rows], [len(row) for row in rows]]))
        scores = self._graph.run(self._step) if self._graph else self._step()
        self._columns, self.room = self._columns + 1, self.room - 1
        return scores

    @torch.no_grad()
    def _step(self) -> Tensor:
        """From `_inputs` to scores. What moves on does so at the end: a step that was broken off can be run again."""
        tokens, given = self._inputs
        new = self._hidden.new_zeros(len(given)).masked_fill(given == 0, -torch.inf)
        self._hidden.index_copy_(3, self._place, new[:, None, None, None])
        scores = self._model(
            input_ids=tokens[:, None],
            attention_mask=self._hidden,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self._positions.add_(given[:, None])
        self._place.add_(1)
        return scores

    def close(self) -> Tensor:
        """Let the cache grow again, and return its mask (B, columns)."""
        for part in self._parts:
            part.layers[:] = [layer.give_back(self._columns) for layer in part.layers]
        return (self._hidden[:, 0, 0, : self._columns] == 0).long()


class StepGraph:
    """A step on a GPU: run once as it is, which compiles and allocates what it needs, then recorded and replayed.

    A step that waits for the GPU cannot be recorded. It is broken off there and run again; if the next waits as well,
    the model's steps stay as they are.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._ran = self._proved = False  # whether a step has run, and one without waiting for the GPU
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """What `step` returns; it is the same at every call, and not kept, as it holds the cache."""
        if self._graph is None:
            stream, pool = _recorder(self._device)[:2]
            current = torch.cuda.current_stream(self._device)
            stream.wait_stream(current)
            # Libraries get their workspaces for this stream in the first runs, not from the graph's own memory.
            with torch.cuda.stream(stream):
                result = self._run_or_record(step, pool)
            current.wait_stream(stream)
            if self._graph is None:
                return result
        self._graph.replay()
        return self._result

    def _run_or_record(self, step: Callable[[], Tensor], pool: Any) -> Tensor | None:
        """The step's result, or none where it was recorded, which computes nothing yet."""
        if self._model in _refused:
            return step()
        if not self._proved:
            results: list[Tensor] = []
            if not waits_for_gpu(lambda: results.append(step())):
                self._proved = True
                return results[0]
            # The first time a model may wait for what it makes once and keeps.
            if self._ran:
                self._refuse("it waits for the GPU")
            self._ran = True
            return step()
        try:
            self._graph, self._result = record(step, pool)
        except RuntimeError as error:
            self._refuse(str(error).partition("\n")[0])
            return step()
        return None

    def _refuse(self, reason: str) -> None:
        _refused.add(self._model)
        logger.warning("a decoding step of %s cannot be a CUDA graph: %s.", type(self._model).__name__, reason)


@functools.cache
def _recorder(device: torch.device) -> tuple[torch.cuda.Stream, Any, Any]:
    """The stream on which steps are recorded and the memory that their graphs have, one after another.

    The memory would be given up with its last graph and be of no use to others, so a small graph is kept.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        return stream, pool, record(lambda: torch.zeros(1, device=device), pool)
