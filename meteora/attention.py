"""Causal attention that is given no mask: over rows of one text each, or over one row of many texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils import deterministic
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

_WITHOUT_MASKS = "sdpa_without_masks"


class Texts(NamedTuple):
    """Texts that stand one behind another in one row; a token attends to its own text alone.

    Attributes:
        bounds: (M + 1,) int32, from 0 to the row's end: text m is the tokens from ``bounds[m]`` to ``bounds[m + 1]``.
        longest: tokens that a text may have at most.
    """

    bounds: Tensor
    longest: int

    def of_tokens(self, tokens: int) -> tuple[Tensor, Tensor]:
        """For each of so many tokens (T,) int32 where its text begins, and where it ends."""
        places = torch.arange(tokens, dtype=torch.int32, device=self.bounds.device)
        behind = torch.bucketize(places, self.bounds, right=True)
        return self.bounds[behind - 1], self.bounds[behind]


_texts: Texts | None = None  # of the row that the model is called with at the moment


@contextmanager
def one_row_of(texts: Texts | None, input_ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """Inside, a model under :func:`without_masks` takes ``input_ids`` (1, S) for these texts.

    Yields:
        What else the model has to be called with. With ``None``, every row is one text, and that is nothing.
    """
    global _texts
    if texts is None:
        yield {}
        return
    begins, _ = texts.of_tokens(input_ids.shape[1])
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    _texts = texts
    try:
        yield {"position_ids": (places - begins).unsqueeze(0)}
    finally:
        _texts = None


@contextmanager
def without_masks(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, ``model`` makes no mask where it is given none, if ``wanted``; its attention is causal all the same.

    Otherwise transformers looks into the positions for texts that share a row. For that the CPU waits for the GPU, and
    in a recording, where it cannot, a mask is made in any case, with which attention is several times as slow.
    """
    config = model.config.get_text_config()
    before = config._attn_implementation
    if wanted:
        # To transformers an attention that it does not know is one that wants no mask.
        AttentionInterface.register(_WITHOUT_MASKS, _attention)
        config._attn_implementation = _WITHOUT_MASKS
    try:
        yield
    finally:
        config._attn_implementation = before


def takes_texts_in_a_row(model: nn.Module, device: torch.device) -> bool:
    """Whether there is a kernel for texts that share a row: FlashAttention, on a GPU and for 16 bits alone."""
    return device.type == "cuda" and model.config.get_text_config().dtype in (torch.float16, torch.bfloat16)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Query (B, heads, S, head size), of key and value perhaps fewer heads -> (B, S, heads, head size)."""
    if _texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if query.dtype == torch.float32 or not query.is_cuda:
        begins, _ = _texts.of_tokens(query.shape[2])
        mask = (begins.unsqueeze(1) == begins).tril()[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    repeats = query.shape[1] // key.shape[1]
    rows = (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    tensors = (tensor[0].transpose(0, 1) for tensor in rows)
    bounds, longest = _texts
    scale, causal = options.get("scaling"), (-1, 0)
    found = _reproducible(
        lambda *tensors: varlen_attn(*tensors, bounds, bounds, longest, longest, scale=scale, window_size=causal),
        *tensors,
    )
    return found.unsqueeze(0), None


def _reproducible(operation: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``operation(*tensors)`` whose gradients are the same bits every time.

    FlashAttention adds up the queries' gradients in the order in which its blocks happen to end, unless torch is told
    otherwise while it computes them; and torch is told for all operations, of which some would then refuse.
    """
    switches = _Switches()
    return _Identity.apply(switches.on, operation(*_Identity.apply(switches.back, *tensors)))


class _Switches:
    """Deterministic algorithms for a piece of a backward pass, which begins where the forward pass ends."""

    def on(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
        self._set(True, False)

    def back(self) -> None:
        self._set(*self._before)

    def _set(self, enabled: bool, fill: bool) -> None:
        torch.use_deterministic_algorithms(enabled)
        deterministic.fill_uninitialized_memory = fill


class _Identity(torch.autograd.Function):
    """Nothing, but for something that is done when a backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, action: Callable[[], None], *tensors: Tensor) -> Any:
        ctx.action = action
        same = tuple(tensor.view_as(tensor) for tensor in tensors)
        return same if len(same) > 1 else same[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.action()
        return None, *gradients
