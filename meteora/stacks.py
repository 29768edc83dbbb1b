"""The adapters' weights of all layers in a few tensors, so that what is done to all of them takes few operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meteora.layer import MeteoraLinear


@dataclass(frozen=True)
class Stack:
    """The A's or B's of all layers where they have one shape, in one tensor: few operations do for a step of them all.

    Attributes:
        values: (L, N * r, in) or (L, out, N * r) float32, of which every layer has a view.
        gradient: likewise, that of ``values``; the layers' gradients are views of it.
        best: likewise, each adapter's as it was at its lowest validation loss.
        axis: of the N * r columns.
        scaling: the gradient of PEFT's own matrix is that of ours times it.
    """

    modules: list[str]
    values: nn.Parameter
    gradient: Tensor
    best: Tensor
    axis: int
    scaling: float

    def by_adapter(self, tensor: Tensor, count: int) -> Tensor:
        """``tensor``, shaped like the values, with an axis of ``count`` adapters in front."""
        return tensor.unflatten(self.axis, (count, -1)).movedim(self.axis, 0)


def stack_weights(layers: Mapping[str, MeteoraLinear], half: str, axis: int, scaling: float) -> list[Stack]:
    """The stacks of ``lora_A`` or ``lora_B``, whose parameters become float32 and trainable."""
    alike: dict[tuple, list[str]] = {}
    for module, layer in layers.items():
        weight = getattr(layer, half)
        alike.setdefault((weight.shape, weight.device), []).append(module)
    stacks = []
    for modules in alike.values():
        values = torch.stack([getattr(layers[module], half).detach().float() for module in modules])
        stack = Stack(modules, nn.Parameter(values), torch.zeros_like(values), values.clone(), axis, scaling)
        stack.values.grad = stack.gradient
        for n, module in enumerate(modules):
            parameter = nn.Parameter(values[n])
            parameter.grad = stack.gradient[n]
            setattr(layers[module], half, parameter)
        stacks.append(stack)
    return stacks
