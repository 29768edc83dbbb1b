"""What a run holds on the GPU at once, reckoned from the model's shape and the profile's batches before anything is loaded.

Activations are counted, not guessed: this library's own forward pass runs on tensors that have a shape and no memory,
and what autograd keeps of it is added up. What is not counted is what a kernel needs for a moment, and fragmentation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from meteora import MeteoraConfig
from meteora.config import GateTrainingConfig, TrainingConfig
from meteora.study.model_settings import DecoderShape
from meteora.study.profiles import Profile
from meteora.study.random_models import random_adapters, random_decoder, random_mixture

# Bytes of each trained number: its value, gradient and AdamW's two moments, in float32.
TRAINED = 16
KEPT = 4  # and the best so far, in float32
INDEPENDENT_PROMPT, COMPOSITE_PROMPT = 2048, 8192  # tokens; about the longest that the tasks have


def parameters(shape: DecoderShape) -> int:
    """How many numbers a Llama of that shape has, its own language-model head included."""
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    linear = sum(a * b for a, b in _linears(shape)) * shape.num_hidden_layers
    return 2 * shape.vocab_size * shape.hidden_size + linear + norms


def adapter_parameters(shape: DecoderShape, rank: int) -> int:
    """The numbers of one adapter of all linear layers."""
    return rank * sum(a + b for a, b in _linears(shape)) * shape.num_hidden_layers


def gate_parameters(shape: DecoderShape, adapters: int) -> int:
    """The numbers of all gates."""
    return adapters * sum(a for a, _ in _linears(shape)) * shape.num_hidden_layers


def _linears(shape: DecoderShape) -> list[tuple[int, int]]:
    """(in, out) of the seven linear layers of a block."""
    h, f = shape.hidden_size, shape.intermediate_size
    kv = h // shape.num_attention_heads * shape.num_key_value_heads
    return [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]


@functools.cache  # LoRA-B and LoRA-F are usually trained alike
def activation_bytes(
    shape: DecoderShape, tokens: int, *, adapters: int, rank: int, trained: str, checkpointing: bool = False
) -> int:
    """What a forward pass of ``tokens`` tokens keeps for its backward pass.

    Args:
        trained: ``adapters``, every sample using its own, or ``gates``, in objective ``joint``.
        checkpointing: of every block but one its input alone.
    """
    one, two = (
        _kept(replace(shape, num_hidden_layers=n), tokens, adapters=adapters, rank=rank, trained=trained) for n in (1, 2)
    )
    block = two - one
    inputs = tokens * shape.hidden_size * 2
    blocks = block + shape.num_hidden_layers * inputs if checkpointing else block * shape.num_hidden_layers
    return one - block + blocks + 2 * tokens * shape.vocab_size * 2  # the logits and their gradient


def _kept(shape: DecoderShape, tokens: int, *, adapters: int, rank: int, trained: str) -> int:
    kept: dict[int, int] = {}
    with FakeTensorMode():
        base = random_decoder(shape, context=tokens, dtype=torch.bfloat16, device=torch.device("cpu"))
        made = random_adapters(base, adapters, rank)
        model = random_mixture(base, made, MeteoraConfig(top_k=min(2, adapters)))
        own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for layer in model.layers.values():
            for weight in (layer.lora_A, layer.lora_B) if trained == "adapters" else (layer.gate.weight,):
                weight.requires_grad_(True)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if _storage(tensor) not in own:
                kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.int64)
        forced = model.route_to(model.adapter_names[0]) if trained == "adapters" else nullcontext()
        with forced, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model.base_model(input_ids=ids, use_cache=False)
    return sum(kept.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def gpu_bytes(profile: Profile) -> dict[str, int]:
    """Phase of the run -> bytes on the GPU at its fullest; nothing for a profile whose model's shape it does not say."""
    shape = profile.model.shape
    if shape is None:
        return {}
    count, rank = len(profile.tasks), profile.adapters.rank
    base = parameters(shape) * _item(profile.model.dtype)
    one = adapter_parameters(shape, rank)
    gates = gate_parameters(shape, count)
    mixture = base + count * one * _item(profile.model.dtype) + 4 * gates
    found = {}
    trainings = (("adapters", profile.adapters, count), ("LoRA-B", profile.lora_b, 1), ("LoRA-F", profile.lora_f, 1))
    for name, settings, adapters in trainings:
        if settings is not None and settings.path is None:
            tokens = _largest_batch(settings.config())
            kept = activation_bytes(shape, tokens, adapters=adapters, rank=rank, trained="adapters")
            found[f"training {name}"] = base + adapters * one * (TRAINED + KEPT) + kept
    kept = max(_kept_by_gates(shape, stage, count, rank) for stage in profile.gate_config().stages())
    found["training gates"] = mixture + gates * (TRAINED - 4) + kept
    for name, (batch, tokens) in answered_texts(profile).items():
        # Where a prompt is read, a block holds its widest results, two and their product, and some of the others' size.
        read = batch * tokens * (3 * shape.intermediate_size + 4 * shape.hidden_size) * 2
        found[name] = mixture + batch * tokens * _cache_bytes(shape) + batch * shape.vocab_size * 4 + read
    return found


def answered_texts(profile: Profile) -> dict[str, tuple[int, int]]:
    """Phase of the run -> texts at once, and the tokens of a long one, with its answers."""
    alone, several = profile.evaluation, profile.composite
    answers = several.max_new_tokens_per_answer * max(several.sizes)
    return {
        "answering": (alone.batch_size, INDEPENDENT_PROMPT + alone.max_new_tokens),
        "answering composites": (several.batch_size, COMPOSITE_PROMPT + answers),
    }


def _kept_by_gates(shape: DecoderShape, config: GateTrainingConfig, adapters: int, rank: int) -> int:
    tokens = _largest_batch(config)
    if config.objective == "gate":
        # Nothing is kept: a block's widest results, twice, and one layer's input in float32.
        return tokens * (4 * shape.intermediate_size * 2 + 4 * shape.intermediate_size)
    options = {"adapters": adapters, "rank": rank, "trained": "gates", "checkpointing": config.gradient_checkpointing}
    return activation_bytes(shape, tokens, **options)


def _largest_batch(config: TrainingConfig) -> int:
    return max(config.tokens_per_batch, config.max_length)


def _cache_bytes(shape: DecoderShape) -> int:
    """Keys and values of one token in all layers, 16 bits each."""
    return 4 * shape.num_hidden_layers * shape.num_key_value_heads * (shape.hidden_size // shape.num_attention_heads)


def _item(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def in_words(found: dict[str, int]) -> Iterable[str]:
    """One line a phase."""
    width = max(map(len, found), default=0)
    return (f"{name:{width}}  {count / 1e9:5.1f} GB" for name, count in found.items())
