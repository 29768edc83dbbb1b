"""Which adapters the gates choose: per layer and task (`routing.csv`), and per token of one text (Figure 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from meteora import MeteoraModel
from meteora.batches import token_ids
from meteora.study.decoding import model_device
from meteora.study.measures import Row


def split_module(name: str) -> tuple[int, str]:
    """`model.layers.3.self_attn.q_proj` -> (3, `q_proj`): the first number in a module's name, and its last part."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number.group(1)) if number else 0, name.rpartition(".")[2]


def routing_rows(
    model: MeteoraModel,
    tokenizer,
    prompts: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Row]:
    """Rows of `routing.csv`: `layer,module,task,adapter,share`.

    `share` is an adapter's routing weight, averaged over all tokens of the task's prompts (pads left out); over the
    adapters it sums to 1. The model routes as it is set, with its top-k and temperature.
    """
    names = model.adapter_names
    rows: list[Row] = []
    with tqdm(total=sum(map(len, prompts.values())), unit="prompt", desc="routing", disable=not progress) as bar:
        for task, texts in prompts.items():
            sums: dict[str, torch.Tensor] = {}  # module -> (N,)
            encoded = sorted(token_ids(tokenizer, texts), key=len)
            for start in range(0, len(encoded), batch_size):
                batch = encoded[start : start + batch_size]
                for module, mass in _batch_mass(model, batch, tokenizer.pad_token_id).items():
                    sums[module] = sums.get(module, 0) + mass
                bar.update(len(batch))
            tokens = sum(map(len, encoded))
            for module, mass in sums.items():
                layer, short = split_module(module)
                shares = (mass / tokens).tolist()
                rows += [
                    {"layer": layer, "module": short, "task": task, "adapter": adapter, "share": share}
                    for adapter, share in zip(names, shares, strict=True)
                ]
    return rows


def _batch_mass(model: MeteoraModel, batch: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Sum over the real tokens of each module's adapter mass: name -> (N,)."""
    longest = max(map(len, batch))
    device = model_device(model)
    # right-padded: causal attention keeps the pads from everything before them
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in batch], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=device)
    with torch.no_grad(), model.trace() as trace:
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    indices, weights = trace.indices, trace.weights
    masses = torch.zeros(len(indices), len(model.adapter_names), device=device)
    for mass, (name, chosen) in zip(masses, indices.items(), strict=True):
        real = mask.unsqueeze(-1).expand_as(chosen).reshape(-1)
        mass.scatter_add_(0, chosen.reshape(-1), (weights[name].reshape(-1) * real).float())
    return dict(zip(indices, masses.cpu(), strict=True))


class TokenRouting(NamedTuple):
    """Routing of one text, averaged over all adapted modules.

    Attributes:
        mass: (tokens, N); every row sums to 1.
        dominant: the index of each token's largest entry.
        weight: that entry.
    """

    mass: torch.Tensor
    dominant: list[int]
    weight: list[float]


def token_routing(model: MeteoraModel, tokens: Sequence[int]) -> TokenRouting:
    """The adapters of every token of one text, averaged over layers and modules, as the model is set.

    One forward pass over the whole text routes exactly as generating it did: attention is causal and gates see one
    token.
    """
    ids = torch.tensor([list(tokens)], device=model_device(model))
    with torch.no_grad(), model.trace() as trace:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    indices, weights = trace.indices, trace.weights
    mass = torch.zeros(len(tokens), len(model.adapter_names), device=ids.device)
    for name, chosen in indices.items():
        mass.scatter_add_(1, chosen[0], weights[name][0])
    mass = (mass / len(indices)).cpu()
    best = mass.max(dim=1)
    return TokenRouting(mass, best.indices.tolist(), best.values.tolist())
