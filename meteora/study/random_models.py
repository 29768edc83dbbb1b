"""Decoders of any size with random weights and random adapters, made where they are used: speed without a download.

A model's speed and memory depend on its shape alone, as long as the tokens choose among the adapters as they would in
use. Here every gate is random, so that every token chooses for itself (routing ``uniform``): no case is harder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from meteora import MeteoraConfig, MeteoraModel
from meteora.adapters import Adapter, LoraWeights
from meteora.study.model_settings import DecoderShape

# The linear layers of a Llama's block, as in the paper.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALING = 2.0  # alpha / rank, as in the paper
SIZE = 0.5  # of an adapter's update, over the layer's own output: neither lost in the other's rounding


def random_decoder(
    shape: DecoderShape, *, context: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """A Llama of that shape in eval mode, its weights as transformers initialises them; ``context`` tokens at most."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LlamaConfig(**asdict(shape), **ids, max_position_embeddings=context)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    return model.eval()


def adapted_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Dotted name -> linear layer of a decoder block."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS}


def random_adapters(base: PreTrainedModel, count: int, rank: int, *, seed: int = 0) -> list[Adapter]:
    """``count`` adapters of all linear layers, in memory, of the model's own type and on its device."""
    device, layers = base.device, adapted_layers(base)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, deviation: float) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=base.dtype, device=device).normal_(0, deviation, generator=generator)

    adapters = []
    for n in range(count):
        modules = {}
        for name, linear in layers.items():
            # For an input of variance 1, the layer's output has variance in * initializer_range^2, A x has 1.
            output = base.config.initializer_range * math.sqrt(linear.in_features)
            A = normal(rank, linear.in_features, 1 / math.sqrt(linear.in_features))
            B = normal(linear.out_features, rank, SIZE * output / (SCALING * math.sqrt(rank)))
            modules[name] = LoraWeights(A, B, SCALING)
        adapters.append(Adapter(f"adapter {n}", "", Path(), "", base.config._name_or_path, modules))
    return adapters


def random_mixture(
    base: PreTrainedModel, adapters: Sequence[Adapter], config: MeteoraConfig, *, seed: int = 0
) -> MeteoraModel:
    """Put the adapters into ``base``, with gates whose logits have variance 1 for an input of variance 1."""
    model = MeteoraModel(base, adapters, config)
    generator = torch.Generator(base.device).manual_seed(seed)
    for layer in model.layers.values():
        layer.gate.weight.data.normal_(0, 1 / math.sqrt(layer.in_features), generator=generator)
    model.state.untrained.clear()
    return model.eval()


@torch.no_grad()
def peft_model(base: PreTrainedModel, adapter: Adapter) -> nn.Module:
    """Stock PEFT with that one adapter on ``base``, which is changed.

    The adapter keeps the model's type. PEFT's default is float32, which takes it longer.
    """
    rank = next(iter(adapter.modules.values())).rank
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=list(TARGETS), inference_mode=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    for name, weights in adapter.modules.items():
        layer = model.get_base_model().get_submodule(name)
        for half, values in ((layer.lora_A, weights.A), (layer.lora_B, weights.B)):
            half["default"].weight.copy_(values)
    return model
