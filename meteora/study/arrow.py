"""Arrow, by PEFT's own implementation: routing per token and layer that needs no training (method ``arrow``).

Every adapter's prototype in a layer is the first right singular vector of B A, the direction of the input that it
answers most. A token goes to the adapters whose prototypes are most parallel to it, of either sign (Ostapenko et al.
2024, arXiv 2405.11157).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from peft import ArrowConfig, create_arrow_model

from meteora.study.baselines import Method, share_weights
from meteora.study.merging import adapter_digests
from meteora.study.predictions import fingerprint, model_fingerprints


def arrow_method(base_model: torch.nn.Module, adapters: Mapping[str, str | Path], *, seed: int = 0) -> Method:
    """PEFT's Arrow model with PEFT's default settings, or all adapters where there are fewer than its top-k.

    Args:
        base_model: the plain base model; left as it is.
        adapters: task -> PEFT adapter directory; all of one rank and the same target modules, as PEFT asks.
        seed: of the power iteration's start.
    """
    config = ArrowConfig(rng_seed=seed)
    config.top_k = min(config.top_k, len(adapters))
    settings = fingerprint(asdict(config))
    model = create_arrow_model(share_weights(base_model), [str(path) for path in adapters.values()], config).eval()

    @functools.cache
    def digests() -> dict[str, str]:
        base = model_fingerprints(base_model)["base"]
        return {"base": base, "adapters": fingerprint(adapter_digests(adapters)), "settings": settings}

    # PEFT's layer holds every adapter's output for every token, twice and in float32
    return Method(
        "arrow", model, lambda tasks: nullcontext(), ("base", "adapters", "settings"),
        tokens_per_batch=2**20 // max(16, len(adapters)), _weights=digests,
    )  # fmt: skip
