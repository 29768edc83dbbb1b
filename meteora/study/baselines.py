"""The methods that are compared, and how each is run: one table from a method's name to a model in a certain state.

MeteoRA, the base model and PEFT with the right adapter (`peft`, the oracle) are states of one `MeteoraModel` that
holds the tasks' adapters. Baselines with one adapter for everything (one LoRA trained on all tasks, merged LoRAs) are
states of a second one that holds those, since forced routing to an adapter *is* stock PEFT with that adapter. Methods
that run in a way of their own are made in files of their own: `arrow.py`, `xlora.py`, `lorahub.py`. All wrap the same
base weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from meteora import MeteoraModel
from meteora.study.predictions import model_fingerprints

Tasks = str | Sequence[str]

TRAINED_SINGLE = ("lora_f", "lora_b")  # one adapter trained on several tasks: all data, balanced data


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: as in the metrics files.
        model: the model it runs on, to be called as a Hugging Face causal LM is.
        state: given a task (or one task per sample), a context in which the model is this method.
        depends_on: what decides its answers, keys of the digests that ``_weights`` gives (see `predictions.PARTS`).
        told_task: whether it has to be told the task: it cannot run on a prompt that mixes tasks.
        gated: whether the gates' temperature matters to it. To a single adapter it does not: its weight is 1.
        tokens_per_batch: most tokens at once, for a method whose memory grows faster with them than the model's own.
    """

    name: str
    model: torch.nn.Module
    state: Callable[[Tasks], AbstractContextManager]
    depends_on: tuple[str, ...]
    told_task: bool = False
    gated: bool = False
    tokens_per_batch: int | None = None
    _weights: Callable[[], Mapping[str, str]] = field(default=dict, repr=False)

    def active(self, tasks: Tasks = ()) -> AbstractContextManager:
        """`with method.active("winowhy"):` — the model answers as this method does for that task."""
        return self.state(tasks)

    def identity(self) -> dict[str, object]:
        """What decides its answers besides the prompts, for fingerprints: its name and the digests of its weights."""
        weights = self._weights()
        return {"method": self.name, "weights": {part: weights[part] for part in self.depends_on}}


class ModelDigests:
    """The digests of a model's weights, computed when first asked for and shared by the methods that run on it."""

    def __init__(self, model: MeteoraModel) -> None:
        self._model = model

    @cached_property
    def digests(self) -> dict[str, str]:
        return model_fingerprints(self._model)


def build_methods(
    names: Iterable[str],
    model: MeteoraModel,
    single: MeteoraModel | None = None,
    *,
    others: Mapping[str, Method] | None = None,
    temperature: float = 1.0,
) -> dict[str, Method]:
    """The methods `names`, in that order.

    Args:
        names: of `base`, `peft`, `meteora_topK` for any K, any adapter that `single` holds (`lora_b`, `linear`, ...),
            and `others`.
        model: holds the tasks' adapters, under the tasks' names, and the gates.
        single: holds the adapters that are each used for every task.
        others: methods that are made already.
        temperature: of the gates; see `with_temperature` for another.
    """
    for wrapped in (model, single):
        if wrapped is not None:
            wrapped.eval()
    weights, single_weights = ModelDigests(model), ModelDigests(single) if single is not None else None
    others = others or {}
    singles = list(single.adapter_names) if single is not None else []
    methods: dict[str, Method] = {}
    for name in names:
        if name == "base":
            methods[name] = Method(
                name, model, lambda tasks: model.disable_adapters(), ("base",), _weights=lambda: weights.digests
            )
        elif name == "peft":
            methods[name] = Method(
                name, model, _route_by_task(model), ("base", "adapters"), True, _weights=lambda: weights.digests
            )
        elif _top_k(name):
            methods[name] = Method(
                name,
                model,
                _gates(model, _top_k(name), temperature),
                ("base", "adapters", "gates"),
                gated=_top_k(name) > 1,
                _weights=lambda: weights.digests,
            )
        elif name in singles:
            methods[name] = Method(
                name, single, _route_to(single, name), ("base", "adapters"), _weights=lambda: single_weights.digests
            )
        elif name in others:
            methods[name] = others[name]
        else:
            known = ["base", "peft", "meteora_top1", "meteora_top2", *singles, *others]
            raise ValueError(f"Unknown method {name!r}; there are {', '.join(known)}.")
    return methods


def with_temperature(method: Method, temperature: float) -> Method:
    """The same method with the gates' softmax at `temperature`; one without gates is returned as it is."""
    if not method.gated:
        return method
    return replace(method, state=_gates(method.model, _top_k(method.name), temperature))


def _top_k(name: str) -> int | None:
    """The k of `meteora_topK`, `None` for another method."""
    found = re.fullmatch(r"meteora_top([1-9]\d*)", name)
    return int(found[1]) if found else None


def _route_by_task(model: MeteoraModel) -> Callable[[Tasks], AbstractContextManager]:
    return lambda tasks: model.route_to(tasks if isinstance(tasks, str) else list(tasks))


def _route_to(model: MeteoraModel, name: str) -> Callable[[Tasks], AbstractContextManager]:
    return lambda tasks: model.route_to(name)


def _gates(model: MeteoraModel, top_k: int, temperature: float) -> Callable[[Tasks], AbstractContextManager]:
    @contextmanager
    def state(tasks: Tasks):
        before = model.top_k, model.state.temperature
        model.set_top_k(top_k)
        model.set_temperature(temperature)
        try:
            yield model
        finally:
            model.set_top_k(before[0])
            model.set_temperature(before[1])

    return state


def share_weights(base_model: torch.nn.Module) -> torch.nn.Module:
    """A second model of the same modules over the *same* weights, so that it can be wrapped differently.

    Costs no memory but the module objects. Neither of the two may be trained in place.
    """
    tensors = [*base_model.parameters(), *base_model.buffers()]
    return copy.deepcopy(base_model, {id(tensor): tensor for tensor in tensors})
