"""FSDP: the frozen base model in pieces, one on each process; gates and adapters, a few percent of it, whole on all."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from meteora.model import MeteoraModel


def wants_sharding(accelerator: Accelerator) -> bool:
    """Whether accelerate was started with an FSDP configuration."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def shard_base_model(model: MeteoraModel, accelerator: Accelerator) -> None:
    """Shard every parameter of the base model over the processes, one decoder layer at a time, in place.

    The weights of a layer are gathered for its forward and backward pass, in which all processes must take part. What
    MeteoRA adds is moved to the process's device and stays an ordinary tensor: it is saved, clipped and summed as
    without FSDP. The base model stays sharded afterwards.

    Raises:
        ValueError: for version 1 of FSDP, which cannot leave single parameters out.
    """
    plugin, base = accelerator.state.fsdp_plugin, model.base_model
    if plugin.fsdp_version != 2:
        raise ValueError("the FSDP configuration is of version 1; set fsdp_version: 2 in it.")
    added = {p for layer in model.layers.values() for p in (layer.gate.weight, layer.lora_A, layer.lora_B)}
    for parameter in added:
        parameter.data = parameter.data.to(accelerator.device)
    if is_sharded(base):
        return
    options = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    for module in [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)] + [base]:
        fully_shard(module, ignored_params=added, **options)
