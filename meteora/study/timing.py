"""How long a call takes and how much memory it needs, on a CPU or a GPU.

What is measured is given as ``prepare``: it does what comes before, such as the forward pass of a backward pass, and
returns the call that counts.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from meteora.recording import waiting_is_an_error

BLOCK = 0.010  # seconds; on a CPU calls are timed in blocks of at least this length: the clock's own cost vanishes
FLUSH = 1 << 28  # bytes written between two calls on a GPU; no cache is as large
LEAST = 3  # measurements of a call, however long it takes
AHEAD = 10  # such writes before the first call, so that the GPU does not wait for the CPU between calls
DOUBLINGS = 4  # of that, if the CPU was slower

Call = Callable[[], Any]
Quantiles = tuple[float, float, float]


class Stopwatch:
    """Times calls on one device: the median, the 20% and the 80% quantile of one call's time in microseconds.

    On a GPU every call starts with a cold L2 cache, as ``triton.testing.do_bench`` does it.

    Args:
        repeats: measurements of a call, at most.
        seconds: what they may take in all, unless they are but LEAST.
    """

    def __init__(self, device: torch.device, repeats: int, seconds: float) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
            self._stream = torch.cuda.Stream(device)

    def eager(self, prepare: Callable[[], Call]) -> Quantiles:
        """As a program calls it that has to wait for the result: what the CPU does to start the GPU's work counts.

        On a GPU the call must have run before, as its first time may load or compile something.
        """
        call = prepare()
        if self.device.type == "cuda":
            return self._on_gpu(call, idle=True)
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        one = timer.timeit(1).median  # timeit has warm-up calls of its own
        number = math.ceil(BLOCK / one)
        return quantiles([1e6 * timer.timeit(number).median for _ in range(self._count(one * number))])

    def graph(self, prepare: Callable[[], Call]) -> Quantiles:
        """Replayed from a CUDA graph that holds the call and nothing else: the GPU's own time.

        All replays are started while the GPU is still busy with something else; else a CPU that is held up, as on a
        machine with other guests, would let it wait within a measurement.
        """
        default = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            # Autograd runs a backward pass on the stream of its forward pass, so that has to be the captured one; and
            # libraries get their workspaces for that stream before the capture, not from the graph's own memory.
            self._stream.wait_stream(default)
            call = prepare()
            call()
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`: it empties torch's memory cache each time, which costs more than the measurement.
            graph.capture_begin()
            try:
                call()
            finally:
                graph.capture_end()
        graph.replay()
        return self._on_gpu(graph.replay, idle=False)

    def _on_gpu(self, call: Call, *, idle: bool) -> Quantiles:
        """``idle``: the GPU has nothing to do when the call begins, so that it waits for the CPU's part of it."""
        first = self._events(call, 1, idle)
        return quantiles(first + self._events(call, self._count(1e-6 * first[0]) - 1, idle))

    def _events(self, call: Call, count: int, idle: bool) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for doubling in range(DOUBLINGS + 1):
            for _ in range(0 if idle else AHEAD << doubling):
                self._flush.zero_()
            in_time = self._start(call, pairs, idle)
            torch.cuda.synchronize(self.device)
            if idle or in_time:
                break
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]

    def _start(self, call: Call, pairs: list[list[torch.cuda.Event]], idle: bool) -> bool:
        """Whether each call had been started before the GPU came to it."""
        in_time = True
        for begin, end in pairs:
            self._flush.zero_()
            if idle:
                torch.cuda.synchronize(self.device)
            begin.record()
            call()
            end.record()
            in_time &= not begin.query()
        return in_time

    def _count(self, seconds: float) -> int:
        return max(LEAST, min(self.repeats, int(self.seconds / max(seconds, 1e-9))))


def quantiles(times: list[float]) -> Quantiles:
    return tuple(np.quantile(times, [0.5, 0.2, 0.8]).tolist())


def measure_peak(call: Call, device: torch.device) -> int:
    """Largest number of bytes that lived at once during ``call``, above what was allocated before it.

    On a GPU that is ``torch.cuda.max_memory_allocated``. On a CPU the profiler reports every allocation and release of
    torch's allocator, and their running sum has a peak; buffers that a math library allocates for itself are not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder, _native_stderr_hidden():
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            call()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["args"]["Ev Idx"])
    live = np.cumsum([0, *(event["args"]["Bytes"] for event in memory)])
    return int(live.max())


@contextmanager
def _native_stderr_hidden() -> Iterator[None]:
    """The profiler of some torch versions writes two lines to the process's stderr each time it is used."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def waits_for_gpu(call: Call) -> bool:
    """Whether the CPU needs a result of the GPU on its way through ``call``, as a loop over the adapters that occur."""
    try:
        with waiting_is_an_error():
            call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    return False


def free_memory(device: torch.device) -> float:
    """Bytes that torch can still allocate on a GPU; on a CPU, where nobody can tell, infinity."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
