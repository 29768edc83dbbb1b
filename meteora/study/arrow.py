"""Arrow, with PEFT's own prototypes and settings: routing per token and layer that needs no training (method ``arrow``).

Every adapter's prototype in a layer is the first right singular vector of B A, the direction of the input that it
answers most. A token goes to the adapters whose prototypes are most parallel to it, of either sign (Ostapenko et al.
2024, arXiv 2405.11157). PEFT finds the vectors by power iteration, and so they are here. The mixture is computed by
`meteora`'s layers: PEFT's hold every adapter's output for every token, and cannot be part of a CUDA graph.
`tests/test_arrow_method.py` compares with PEFT's own Arrow model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from meteora import MeteoraConfig, MeteoraModel
from meteora.study.baselines import Method, share_weights
from meteora.study.merging import adapter_digests
from meteora.study.predictions import fingerprint, model_fingerprints


def arrow_method(base_model: torch.nn.Module, adapters: Mapping[str, str | Path], *, seed: int = 0) -> Method:
    """Arrow with PEFT's default settings, or all adapters where there are fewer than its top-k.

    Args:
        base_model: the plain base model; left as it is.
        adapters: task -> PEFT adapter directory.
        seed: of the power iteration's start.
    """
    config = ArrowConfig(rng_seed=seed)
    config.top_k = min(config.top_k, len(adapters))
    config.task_adapter_names = list(adapters)
    ours = MeteoraConfig(top_k=config.top_k, temperature=config.router_temperature, absolute_logits=True)
    model = MeteoraModel.from_adapters(share_weights(base_model), dict(adapters), ours).eval()
    with torch.no_grad():
        for layer in model.layers.values():
            arrow = ArrowLoraLinearLayer(layer.in_features, config)
            for n, row in enumerate(layer.gate.weight):
                own = layer.column_adapter == n
                # B holds the scaling, which does not turn the vector. PEFT keeps prototypes in the adapters' type.
                found = arrow.top_right_singular_vec_from_BA(layer.lora_A[own], layer.lora_B[:, own])
                row.copy_(found.to(layer.lora_A.dtype))
    model.state.untrained.clear()  # these gates need no training

    @functools.cache
    def digests() -> dict[str, str]:
        base = model_fingerprints(base_model)["base"]
        settings = fingerprint(asdict(config))
        return {"base": base, "adapters": fingerprint(adapter_digests(adapters)), "settings": settings}

    return Method(
        "arrow", model, lambda tasks: nullcontext(), ("base", "adapters", "settings"), _weights=digests
    )  # fmt: skip
