"""Layers that get one input, as the q, k and v projections do, computed together in passes without gradients.

For few tokens the time of a mixture goes into starting small kernels one after another, and for many into reading x:
each is done once for all siblings. So the first of them that is called computes the outputs of all, and the others
find theirs, if it is the same tensor that they are called with and nothing has been written to since. A layer without
siblings is computed in the same way, as that hides half of its kernels behind the base layer in a CUDA graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from meteora.backends import get_gated_mix, triton

if TYPE_CHECKING:
    from meteora.layer import MeteoraLinear, MixtureState

# What decoders call the layers of one module that get its input.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def link_siblings(layers: Mapping[str, MeteoraLinear]) -> None:
    """Let layers, given by their dotted names in a model, know their siblings: of one parent, with adapters alike."""
    families: dict[tuple, list[MeteoraLinear]] = {}
    for name, layer in layers.items():
        layer.siblings, layer.widest = Siblings([layer]), layer.out_features
        parent, _, child = name.rpartition(".")
        for names in FAMILIES:
            if child in names:
                families.setdefault((parent, names), []).append(layer)
    for family in families.values():
        if all(_alike(family[0], layer) for layer in family):
            siblings, widest = Siblings(family), max(layer.out_features for layer in family)
            for layer in family:
                layer.siblings, layer.widest = siblings, widest


def _alike(one: MeteoraLinear, other: MeteoraLinear) -> bool:
    return (
        one.gate.weight.shape == other.gate.weight.shape
        and one.gate.weight.device == other.gate.weight.device
        and one.ranks == other.ranks
    )


@dataclass(frozen=True)
class _Ready:
    """Outputs that wait for their layers to be called with ``x``."""

    x: weakref.ref[Tensor]
    circumstances: tuple
    outputs: dict[MeteoraLinear, tuple[tuple, Tensor]]  # and the state of the weights that they were computed with

    def take(self, layer: MeteoraLinear, x: Tensor, circumstances: tuple) -> Tensor | None:
        state, y = self.outputs.pop(layer, (None, None))
        same = self.x() is x and self.circumstances == circumstances and state == layer.state_of_weights()
        return y if same else None


class Siblings:
    """One or more layers of a module whose inputs are expected to be one tensor, with the same adapters and ranks.

    Attributes:
        apart: it was not one tensor, or some were not called at all, so that computing them together was in vain. From
            then on each layer computes for itself.
    """

    def __init__(self, layers: list[MeteoraLinear], apart: bool = False) -> None:
        # Layers hold this object: did it hold them too, a model would stay until the garbage collector comes.
        self._layers = [weakref.ref(layer) for layer in layers]
        self.apart = apart
        self._ready: dict[int, _Ready] = {}  # of each thread
        self._packed: Tensor | None = None
        self._parts: list[Tensor] = []  # views of it

    def __getstate__(self) -> tuple:
        return self.layers, self.apart  # a copied layer's siblings are copies

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    @property
    def layers(self) -> list[MeteoraLinear]:
        return [layer for found in self._layers if (layer := found()) is not None]

    def output(self, layer: MeteoraLinear, x: Tensor) -> Tensor | None:
        """What ``layer`` makes of x (..., in); ``None`` if it has to see to that itself."""
        state = layer.state
        # A replica that nn.DataParallel makes of a layer has the layer's siblings, and is none of them.
        if self.apart or layer not in self.layers or not self._nobody_watches(x, state):
            return None
        thread, circumstances = threading.get_ident(), _circumstances(x, state)
        ready = self._ready.pop(thread, None)
        if ready is None:
            return self._compute(layer, x, thread, circumstances) if self._fit(layer, x) else None
        y = ready.take(layer, x, circumstances)
        self.apart = y is None
        if ready.outputs and not self.apart:
            self._ready[thread] = ready
        return y

    def _nobody_watches(self, x: Tensor, state: MixtureState) -> bool:
        """Whether this is a plain pass without gradients, in which a tensor that was written to can be told."""
        return state.enabled and not (
            torch.is_grad_enabled()
            or state.watched
            or state.own is not None
            or (x.is_inference() and len(self._layers) > 1)  # it does not count what is written to it
            or torch.is_autocast_enabled(x.device.type)
        )

    def _fit(self, layer: MeteoraLinear, x: Tensor) -> bool:
        """Whether the kernels take x and the layers as they are."""
        return (
            get_gated_mix(layer.state.backend, x.device.type) is not None
            and x.is_contiguous()
            and x.numel() > 0
            and all(_plain(sibling, x.dtype) for sibling in self.layers)
            and triton.for_siblings(x.numel() // layer.in_features, layer.column_adapter, layer.state.top_k)
        )

    def _compute(self, layer: MeteoraLinear, x: Tensor, thread: int, circumstances: tuple) -> Tensor:
        """The output of ``layer``; those of the others get ready."""
        layer.warn_once()
        layers, state = self.layers, layer.state
        ys = triton.gated_mixes(
            lambda: [sibling.base_layer(x).view(-1, sibling.out_features) for sibling in layers],
            x.view(-1, x.shape[-1]),
            self._packed_weights(layers),
            [sibling.lora_B for sibling in layers],
            layer.column_adapter,
            layer.gate.out_features,
            state.top_k,
            state.temperature,
            absolute=state.absolute_logits,
        )
        outputs = {
            sibling: (sibling.state_of_weights(), y.view(*x.shape[:-1], -1))
            for sibling, y in zip(layers, ys, strict=True)
        }
        _, result = outputs.pop(layer)
        if outputs:
            # Nothing outlives x: should it go before all are taken, some layer was not called.
            self._ready[thread] = _Ready(weakref.ref(x, partial(self._forget, thread)), circumstances, outputs)
        return result

    def _forget(self, thread: int, _: weakref.ref) -> None:
        self._ready.pop(thread, None)
        self.apart = True

    def _packed_weights(self, layers: list[MeteoraLinear]) -> Tensor:
        """The layers' packed weights one below the other, (n * C, in). Each layer then holds a view of them."""
        parts = [layer.packed_weights(layer.lora_A) for layer in layers]
        if len(self._parts) != len(parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                self._packed = torch.cat(parts)
                self._parts = list(self._packed.chunk(len(parts)))
                for layer, part in zip(layers, self._parts, strict=True):
                    layer.hold_packed(part)
        return self._packed


def _circumstances(x: Tensor, state: MixtureState) -> tuple:
    """What, besides the weights and which tensor x is, must not have changed when an output is taken."""
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    version = None if x.is_inference() else x._version
    return version, stream, state.top_k, state.temperature, state.absolute_logits, state.backend


def _plain(layer: MeteoraLinear, dtype: torch.dtype) -> bool:
    """Whether nothing but its sum comes of the base layer, which may then be called before its turn; of one dtype."""
    base = layer.base_layer
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)  # accelerate's are of that kind
    return type(base) is nn.Linear and not hooked and layer.lora_A.dtype == layer.lora_B.dtype == dtype
