"""How long a call takes and how much memory it needs, on a CPU or a GPU."""

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

BLOCK = 0.010  # seconds; calls are timed in blocks of at least this length, so that the clock's own cost vanishes

Call = Callable[[], Any]


def measure_time(call: Call, device: torch.device, repeats: int) -> tuple[float, float, float]:
    """Median, 20% and 80% quantile of one call's time in microseconds, over ``repeats`` blocks of ``BLOCK`` seconds.

    On a GPU each call starts with a cold L2 cache, as ``triton.testing.do_bench`` does it.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(1e3 * t for t in do_bench(call, rep=1e3 * BLOCK * repeats, quantiles=[0.5, 0.2, 0.8]))
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    number = math.ceil(BLOCK / timer.timeit(1).median)  # timeit has warm-up calls of its own
    times = [1e6 * timer.timeit(number).median for _ in range(repeats)]
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
    """Whether the CPU needs a result of the GPU on its way through ``call``, which no CUDA graph can hold.

    Such as a loop over the adapters that occur. Asking is safer than trying: a capture that fails may leave torch's
    allocator as if it were still going on.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def captured(call: Call) -> Callable[[], None]:
    """The replay of a CUDA graph of ``call``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
