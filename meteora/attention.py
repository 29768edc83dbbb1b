"""Causal attention that is given no mask: over rows of one text each, or over one row of many texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils import deterministic
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from meteora.batches import Texts

_WITHOUT_MASKS = "sdpa_without_masks"
_HALF = (torch.float16, torch.bfloat16)

_texts: Texts | None = None  # of the row that the model is called with at the moment
_asked = False  # whether its attention has asked for them


@contextmanager
def one_row_of(texts: Texts | None, input_ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """Inside, a model under :func:`without_masks` takes ``input_ids`` (1, S) for these texts.

    Yields:
        What else the model has to be called with. With ``None``, every row is one text, and that is nothing.

    Raises:
        RuntimeError: if the model was called in another way, or has an attention of its own.
    """
    global _texts, _asked
    if texts is None:
        yield {}
        return
    begins, _ = texts.of_tokens(input_ids.shape[1])
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    before, _texts, _asked = _texts, texts, False
    try:
        yield {"position_ids": (places - begins).unsqueeze(0)}
    finally:
        _texts = before
    if not _asked:
        raise RuntimeError("the model's attention does not keep a row's texts apart; load it with 'eager' attention.")


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
    """Whether there is a kernel for texts that share a row: FlashAttention, on a GPU that has it and for 16 bits alone.

    What is recomputed in the backward pass would ask for the texts when they are gone.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    recomputed = any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())
    fits = device.type == "cuda" and dtype in _HALF and torch.cuda.get_device_capability(device) >= (8, 0)
    return fits and not recomputed


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Query (B, heads, S, head size), of key and value perhaps fewer heads -> (B, S, heads, head size)."""
    global _asked
    if _texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    _asked = True
    if not _flash_can(query, value, options):
        begins, _ = _texts.of_tokens(query.shape[2])
        mask = (begins.unsqueeze(1) == begins).tril()[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    repeats = query.shape[1] // key.shape[1]
    rows = (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    tensors = (tensor[0].transpose(0, 1) for tensor in rows)
    bounds, longest = _texts
    scale, causal = options.get("scaling"), (-1, 0)
    found = varlen_attn(*tensors, bounds, bounds, longest, longest, scale=scale, window_size=causal)
    _same_gradients_always(found)
    return found.unsqueeze(0), None


def _flash_can(query: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether FlashAttention takes these heads, and all that the model wants of its attention."""
    size = query.shape[-1]
    heads = query.is_cuda and query.dtype in _HALF and size == value.shape[-1] and size % 8 == 0 and size <= 256
    more = options.get("dropout") or any(options.get(name) is not None for name in ("softcap", "position_bias"))
    return heads and not more and options.get("is_causal") is not False


def _same_gradients_always(found: Tensor) -> None:
    """Let the gradients of the operation that ``found`` comes from be the same bits every time.

    FlashAttention adds up the queries' gradients in the order in which its blocks happen to end, unless torch is told
    otherwise while it computes them; told for good, other operations would refuse.
    """
    if found.grad_fn is None:
        return
    before: list[tuple[bool, bool, bool]] = []

    def begin(gradients: tuple) -> None:
        before.append(_algorithms())
        _set_algorithms(True, False, False)

    def end(gradients: tuple, outputs: tuple) -> None:
        _set_algorithms(*before.pop())

    found.grad_fn.register_prehook(begin)
    found.grad_fn.register_hook(end)


@contextmanager
def algorithms_as_before() -> Iterator[None]:
    """Afterwards torch's choice of algorithms is what it was, also when a backward pass broke off in between."""
    before = _algorithms()
    try:
        yield
    finally:
        _set_algorithms(*before)


def _algorithms() -> tuple[bool, bool, bool]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only, deterministic.fill_uninitialized_memory


def _set_algorithms(enabled: bool, warn_only: bool, fill: bool) -> None:
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    deterministic.fill_uninitialized_memory = fill
