"""What was found out about a tensor, kept with it: to find it out again would wait for the GPU in each call.

Free of Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Found = TypeVar("Found")


class Kept(Generic[Found]):
    """``find`` of a tensor, called once for each, as long as the tensor lives and is not written to.

    An inference tensor does not tell whether it was. A CUDA graph that is being captured cannot wait, so there a tensor
    that was not met before has ``None``.
    """

    def __init__(self, find: Callable[[Tensor], Found]) -> None:
        self.find = find
        self.found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> (its version, what was found)

    def __call__(self, tensor: Tensor) -> Found | None:
        version = 0 if tensor.is_inference() else tensor._version
        kept = self.found.get(tensor)
        if kept is not None and kept[0] == version:
            return kept[1]
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        found = self._find_apart(tensor) if tensor.is_cuda else self.find(tensor)
        self.found[tensor] = version, found
        return found

    def _find_apart(self, tensor: Tensor) -> Found:
        """``find`` in a thread of its own, on the caller's stream.

        While torch.compile's CUDA graphs run for the first time, all that their thread allocates is taken for theirs, and
        what outlives that run refused.
        """
        stream = torch.cuda.current_stream(tensor.device)

        def find() -> Found:
            with torch.cuda.stream(stream):
                return self.find(tensor)

        with ThreadPoolExecutor(1) as other:
            return other.submit(find).result()
