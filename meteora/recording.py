"""Passes through a model as CUDA graphs: thousands of kernels that one call from Python starts, not one call each."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meteora.sharding import is_sharded

logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")  # torch's, of what is used here

Step = Callable[[], Any]


def can_be_recorded(model: nn.Module, device: torch.device) -> bool:
    """Whether a GPU may be able to record a causal pass through ``model`` that is given no mask.

    Left out are models on several devices, of which a recording would see one, sharded ones, those with a sliding
    window, which cannot do without a mask, and those whose attention cannot be replaced.
    """
    config = model.config.get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return (
        device.type == "cuda"
        and len({parameter.device for parameter in model.parameters()}) == 1
        and not any(map(is_sharded, model.modules()))
        and all(m._supports_attention_backend for m in model.modules() if isinstance(m, PreTrainedModel))
        and config._attn_implementation == "sdpa"
        and full
        and getattr(config, "sliding_window", None) is None
    )


class Recordings:
    """Steps known by a key: run as they are the first time, recorded the second, and replayed from then on.

    The first time compiles and allocates what is needed, and a step that comes once is not worth recording. A step must
    be the same work on the same memory each time: inputs and results are tensors that stay where they are, and nothing
    else of it survives, so that all recordings share one memory. What cannot be recorded goes on as it is. At the end
    of the context, the memory of the recordings and of the runs before them is given back.

    Args:
        name: of the steps, for the log.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self._device, self._name = device, name
        self._pool = torch.cuda.graph_pool_handle()  # of its own: memory that is kept there serves nobody else
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # of all keys that were met
        self._rehearsed = self._refused = False

    def __enter__(self) -> Recordings:
        return self

    def __exit__(self, *_) -> None:
        self._graphs.clear()
        torch.cuda.empty_cache()  # what is kept for another stream, no recording to come can ask for

    def run(self, key: Hashable, step: Step, rehearsal: Step) -> None:
        """Run the step, or its recording. ``rehearsal`` is the same work but may be broken off, and has no effect."""
        graph = self._graphs.get(key)
        if graph is None:
            stream, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
            stream.wait_stream(current)
            # All that is not replayed runs on this stream: libraries get their workspaces for it before a recording,
            # not from its memory, and autograd adds up gradients on the stream of a parameter's first use.
            with torch.cuda.stream(stream):
                if key in self._graphs and not self._refused:
                    graph = self._record(key, step, rehearsal)
                if graph is None:
                    step()
                    self._graphs.setdefault(key, None)
            current.wait_stream(stream)
        if graph is not None:
            graph.replay()

    def _record(self, key: Hashable, step: Step, rehearsal: Step) -> torch.cuda.CUDAGraph | None:
        """A recording, which computes nothing yet."""
        try:
            if not self._rehearsed:
                with waiting_is_an_error():
                    rehearsal()
                self._rehearsed = True
            self._make_room()
            self._graphs[key], _ = record(step, self._pool)
        except RuntimeError as error:
            self._refused = True
            self._graphs.clear()  # and their memory, which the steps need now
            logger.warning("%s cannot be a CUDA graph: %s.", self._name, str(error).partition("\n")[0])
            return None
        return self._graphs[key]

    def _make_room(self) -> None:
        """A recording has memory of its own, and cannot ask for what earlier runs have left unused."""
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if torch.cuda.mem_get_info(self._device)[0] < unused:
            torch.cuda.empty_cache()


def record(step: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`step` as a graph on the current stream, and where every replay leaves its result."""
    graph = torch.cuda.CUDAGraph()
    # Not `torch.cuda.graph`: it gives torch's unused memory back each time, which prompts then have to ask for again.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        result = step()
    finally:
        graph.capture_end()
    return graph, result


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, whatever makes the CPU wait for the GPU, which no graph can hold, raises a RuntimeError.

    Asking is safer than trying: a capture that fails may leave torch's allocator as if it were still going on.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
