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
from meteora.kernels.packing import pack

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


def state_of(*weights: Tensor | None) -> tuple[int, ...]:
    """Differs whenever one of the weights was replaced, moved or written to."""
    state = []
    for weight in weights:
        if weight is not None:
            state += (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
    return tuple(state)


@dataclass(frozen=True)
class _Ready:
    """Outputs that wait for their layers to be called with ``x``."""

    x: weakref.ref[Tensor]
    circumstances: tuple
    outputs: dict[MeteoraLinear, Tensor]
    states: dict[MeteoraLinear, tuple]  # of the weights that they were computed with

    def take(self, layer: MeteoraLinear, x: Tensor, circumstances: tuple) -> Tensor | None:
        y = self.outputs.pop(layer, None)
        if y is None or self.x() is not x or self.circumstances != circumstances:
            return None
        return y if self.states[layer] == state_of(*layer.weights()) else None


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
        state, layers = layer.state, self.layers
        # A replica that nn.DataParallel makes of a layer has the layer's siblings, and is none of them.
        if self.apart or layer not in layers or not self._nobody_watches(x, state):
            return None
        thread, circumstances = threading.get_ident(), _circumstances(x, state)
        ready = self._ready.pop(thread, None)
        if ready is None:
            fit = self._fit(layer, x) and all(map(_plain, layers))
            return self._compute(layer, layers, x, thread, circumstances) if fit else None
        y = ready.take(layer, x, circumstances)
        self.apart = y is None
        if ready.outputs and not self.apart:
            self._ready[thread] = ready
        return y

    def _nobody_watches(self, x: Tensor, state: MixtureState) -> bool:
        """Whether this is a plain pass without gradients, in which a tensor that was written to can be told."""
        return state.enabled and not (
            torch.is_grad_enabled()
            or type(x) is not Tensor
            or torch.autograd.forward_ad._current_level >= 0
            or state.watched
            or state.own is not None
            or (x.is_inference() and len(self._layers) > 1)  # it does not count what is written to it
            or torch.is_autocast_enabled(x.device.type)
        )

    def _fit(self, layer: MeteoraLinear, x: Tensor) -> bool:
        """Whether the kernels take x as it is, and as many tokens together."""
        return (
            get_gated_mix(layer.state.backend, x.device.type) is not None
            and x.is_contiguous()
            and x.numel() > 0
            and x.shape[-1] == layer.in_features  # or the base layer will say so, before a kernel has read too far
            and triton.for_siblings(x.numel() // layer.in_features, layer.column_adapter, layer.state.top_k)
        )

    def _compute(
        self, layer: MeteoraLinear, layers: list[MeteoraLinear], x: Tensor, thread: int, circumstances: tuple
    ) -> Tensor | None:
        """The output of ``layer``, and those of the others get ready; ``None`` if the kernels do not take the weights."""
        # Asked for once: each access to a module's parameter is a call, and a decoding step is as long as such calls.
        weights = [sibling.weights() for sibling in layers]
        first_A, _, first_gate, *_ = weights[0]
        for lora_A, lora_B, gate, *_ in weights:
            # An adapter may have been added to some of the layers alone.
            same = lora_A.shape == first_A.shape and gate.shape == first_gate.shape
            if not (same and lora_A.dtype == lora_B.dtype == x.dtype):
                return None
        packed = self._packed_weights(layers, weights)
        if packed is None:
            return None
        layer.warn_once()
        state = layer.state
        ys = triton.gated_mixes(
            lambda: [sibling.base_layer(x).view(-1, sibling.out_features) for sibling in layers],
            x.view(-1, x.shape[-1]),
            packed,
            [lora_B for _, lora_B, *_ in weights],
            layer.column_adapter,
            len(first_gate),
            state.top_k,
            state.temperature,
            absolute=state.absolute_logits,
            least_share=state.least_share,
        )
        outputs = {sibling: y.view(*x.shape[:-1], -1) for sibling, y in zip(layers, ys, strict=True)}
        result = outputs.pop(layer)
        if outputs:
            # Not before now, as packing moves the weights.
            states = {sibling: state_of(*own) for sibling, own in zip(layers, weights, strict=True) if sibling in outputs}
            # Nothing outlives x: should it go before all are taken, some layer was not called.
            self._ready[thread] = _Ready(weakref.ref(x, partial(self._forget, thread)), circumstances, outputs, states)
        return result

    def _forget(self, thread: int, _: weakref.ref) -> None:
        self._ready.pop(thread, None)
        self.apart = True

    def _packed_weights(self, layers: list[MeteoraLinear], weights: list[tuple]) -> Tensor | None:
        """The layers' packed weights one below the other, (n * C, in), of which each layer holds a view.

        ``None`` if they are not kept so, and would have to be made while a CUDA graph is captured.
        """
        parts = [
            layer.packed_weights(lora_A, gate, lora_A.dtype)
            for layer, (lora_A, _, gate, *_) in zip(layers, weights, strict=True)
        ]
        if len(self._parts) == len(parts) and all(a is b for a, b in zip(parts, self._parts, strict=True)):
            return self._packed
        # Some were stale, so that all were packed anew after others had been asked; or these are copies of siblings.
        return self._packed if all(part is not None for part in parts) and self.pack_all(layers[0]) else None

    def forget_moved(self) -> None:
        """Let go of what was packed, once the adapters lie elsewhere."""
        there = zip(self.layers, self._parts)
        if self._parts and not any(layer.lora_A.data_ptr() == part.data_ptr() for layer, part in there):
            self._packed, self._parts = None, []

    def pack_all(self, layer: MeteoraLinear) -> bool:
        """Pack the weights of all layers; ``False`` if ``layer`` is none of them, or they are not alike."""
        layers = self.layers
        weights = [(sibling.lora_A, sibling.gate.weight) for sibling in layers]
        kinds = {(A.shape, A.dtype, A.device, gate.shape, gate.device) for A, gate in weights}
        capturing = layer.lora_A.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or layer not in layers or len(kinds) > 1:
            return False
        with torch.inference_mode(False), torch.no_grad():
            packed = [pack(A, gate) for A, gate in weights]
            before = zip(weights, packed, self._parts)  # no parts at first
            if self._parts and all(A.data_ptr() == p.data_ptr() and new.shape == p.shape for (A, _), new, p in before):
                # The adapters lie where they were packed. So shall the gates, where graphs that read both find them.
                for (A, _), new, part in zip(weights, packed, self._parts, strict=True):
                    part[len(A) :] = new[len(A) :]
            else:
                self._packed = torch.cat(packed)
                self._parts = list(self._packed.chunk(len(weights)))
            for sibling, part in zip(layers, self._parts, strict=True):
                sibling.hold_packed(part)
        return True


def _circumstances(x: Tensor, state: MixtureState) -> tuple:
    """What, besides the weights and which tensor x is, must not have changed when an output is taken."""
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    version = None if x.is_inference() else x._version
    return (
        version, stream, state.top_k, state.temperature, state.absolute_logits, state.least_share, state.backend,
    )  # fmt: skip


def _plain(layer: MeteoraLinear) -> bool:
    """Whether nothing but its sum comes of the base layer, which may then be called before its turn."""
    base = layer.base_layer
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)  # accelerate's are of that kind
    return type(base) is nn.Linear and not hooked
