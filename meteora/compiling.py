"""Decoder layers compiled by torch.compile for a training: the steps between the matrix products become a few kernels.

All layers of a model share one graph, whatever the shapes of a batch, so that compiling takes as long as for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from meteora.backends import triton
from meteora.model import MeteoraModel
from meteora.sharding import is_sharded

# Each model, pass with or without gradients, and batch of one sample is a graph of its own. The default of 8 would be
# met by a few trainings in one process, and what comes after it is not compiled.
_GRAPHS = 32


def worth_compiling(model: MeteoraModel, device: torch.device) -> bool:
    """On a CPU little is gained. For a GPU nothing can be compiled without Triton, and no whole layer of a model that
    is sharded, spread over devices or quantised: such layers call what has no place in a graph.
    """
    base = model.base_model
    plain = not (is_sharded(base) or getattr(base, "hf_device_map", None) or getattr(base, "is_quantized", False))
    return plain and device.type == "cuda" and triton.INSTALLED


@contextmanager
def compiled_layers(model: nn.Module, wanted: bool, backend: str = "inductor") -> Iterator[None]:
    """Inside, every decoder layer of ``model`` runs compiled, if ``wanted``.

    What cannot be compiled (no C compiler, an old GPU) runs as it is, and PyTorch logs why.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not wanted or not layers:
        yield
        return
    # Otherwise the first layer's input needs no gradient, and that layer would be a graph of its own.
    hook = model.get_input_embeddings().register_forward_hook(_require_gradient)
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    try:
        with torch._dynamo.config.patch(suppress_errors=True, recompile_limit=_GRAPHS):
            yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._compiled_call_impl = own
        hook.remove()


def _require_gradient(_: nn.Module, inputs: tuple, embedded: Tensor) -> None:
    if torch.is_grad_enabled():
        embedded.requires_grad_(True)
