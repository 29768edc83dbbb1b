"""The methods that are compared, and how each is run: one table from a method's name to a model in a certain state.

MeteoRA, the base model and PEFT with the right adapter (`peft`, the oracle) are states of one `MeteoraModel` that
holds the tasks' adapters. Baselines with one adapter for everything (one LoRA trained on all tasks, merged LoRAs) are
states of a second one that holds those, since forced routing to an adapter *is* stock PEFT with that adapter. Both
wrap the same base weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from meteora import MeteoraModel
from meteora.files import atomic_directory
from meteora.study.predictions import fingerprint, model_fingerprints

Tasks = str | Sequence[str]


@dataclass(frozen=True)
class Merging:
    """How PEFT's `add_weighted_adapter` is called: its `combination_type`, and what it needs.

    `weight` is every adapter's own; `None` means one over their number. `density` is the share of entries that survive.
    """

    combination_type: str
    weight: float | None = None
    density: float | None = None


# linear: the average of the adapters' factors. ties: the setting its paper recommends without validation data
# (Yadav et al. 2023, arXiv 2306.01708: keep the top 20%, scale 1), with PEFT's default majority sign ("total").
MERGINGS = {
    "linear": Merging("linear"),
    "ties": Merging("ties", weight=1.0, density=0.2),
}
METEORA = {"meteora_top1": 1, "meteora_top2": 2}  # name -> top-k
TRAINED_SINGLE = ("lora_f", "lora_b")  # one adapter trained on several tasks: all data, balanced data


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: as in the metrics files.
        model: the model it runs on.
        state: given a task (or one task per sample), a context in which the model is this method.
        depends_on: the weights that decide its answers, of `predictions.PARTS`.
        told_task: whether it has to be told the task: it cannot run on a prompt that mixes tasks.
        gated: whether the gates' temperature matters to it.
    """

    name: str
    model: MeteoraModel
    state: Callable[[Tasks], AbstractContextManager]
    depends_on: tuple[str, ...]
    told_task: bool = False
    gated: bool = False
    _weights: Callable[[], Mapping[str, str]] = field(default=dict, repr=False)

    def active(self, tasks: Tasks = ()) -> AbstractContextManager:
        """`with method.active("winowhy"):` — the model answers as this method does for that task."""
        return self.state(tasks)

    def identity(self) -> dict[str, object]:
        """What decides its answers besides the prompts, for fingerprints: its name and the digests of its weights."""
        weights = self._weights()
        return {"method": self.name, "weights": {part: weights[part] for part in self.depends_on}}


class _Weights:
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
    temperature: float = 1.0,
) -> dict[str, Method]:
    """The methods `names`, in that order.

    Args:
        names: of `base`, `peft`, `meteora_topK`, and any adapter that `single` holds (`lora_b`, `linear`, `ties`, ...).
        model: holds the tasks' adapters, under the tasks' names, and the gates.
        single: holds the adapters that are each used for every task.
        temperature: of the gates; see `with_temperature` for another.
    """
    for wrapped in (model, single):
        if wrapped is not None:
            wrapped.eval()
    weights, single_weights = _Weights(model), _Weights(single) if single is not None else None
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
        elif name in METEORA:
            methods[name] = Method(
                name,
                model,
                _gates(model, METEORA[name], temperature),
                ("base", "adapters", "gates"),
                gated=True,
                _weights=lambda: weights.digests,
            )
        elif name in singles:
            methods[name] = Method(
                name, single, _route_to(single, name), ("base", "adapters"), _weights=lambda: single_weights.digests
            )
        else:
            known = ["base", "peft", *METEORA, *singles]
            raise ValueError(f"Unknown method {name!r}; there are {', '.join(known)}.")
    return methods


def with_temperature(method: Method, temperature: float) -> Method:
    """The same method with the gates' softmax at `temperature`; one without gates is returned as it is."""
    if not method.gated:
        return method
    state = _gates(method.model, METEORA[method.name], temperature)
    return Method(method.name, method.model, state, method.depends_on, gated=True, _weights=method._weights)


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


def merge_adapters(
    base_model: torch.nn.Module,
    adapters: Mapping[str, str | Path],
    name: str,
    output_dir: str | Path,
    *,
    merging: Merging | None = None,
) -> Path:
    """Merge LoRA adapters into one with PEFT's own `add_weighted_adapter`, written as an ordinary PEFT directory.

    Args:
        base_model: the plain base model; left as it is.
        adapters: task -> PEFT adapter directory; all of one rank and the same target modules, as PEFT asks.
        name: of `MERGINGS` unless `merging` is given; also the name of the directory written.
        output_dir: where `name` is written; a directory there made from the same files and settings is kept.

    Returns:
        The adapter directory `output_dir/name`.
    """
    from peft import PeftModel

    if merging is None and name not in MERGINGS:
        raise ValueError(f"Unknown merging {name!r}; there are {', '.join(MERGINGS)}.")
    merging = merging or MERGINGS[name]
    if not adapters:
        raise ValueError(f"There are no adapters to merge into {name!r}.")
    directories = [Path(directory) for directory in adapters.values()]
    recipe = {
        "combination_type": merging.combination_type,
        "weights": [merging.weight if merging.weight is not None else 1 / len(adapters)] * len(adapters),
        "density": merging.density,
        "adapters": {task: _content_digest(directory) for task, directory in zip(adapters, directories)},
    }
    target = Path(output_dir) / name
    note = target / "merge.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) == recipe:
        return target

    numbered = [f"adapter{i}" for i in range(len(adapters))]  # PEFT's names may not contain dots, tasks' names may
    merged = PeftModel.from_pretrained(share_weights(base_model), directories[0], adapter_name=numbered[0])
    for number, directory in zip(numbered[1:], directories[1:]):
        merged.load_adapter(directory, adapter_name=number)
    options = {} if merging.density is None else {"density": merging.density}
    merged.add_weighted_adapter(
        numbered, recipe["weights"], name, combination_type=merging.combination_type, **options
    )
    with tempfile.TemporaryDirectory() as scratch, atomic_directory(target) as directory:
        # embeddings are never adapted here; left to itself, PEFT asks the model hub whether they were
        merged.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        # PEFT puts every adapter but one named "default" into a folder of its own name
        shutil.copytree(Path(scratch) / name, directory, dirs_exist_ok=True)
        (directory / note.name).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return target


def _content_digest(directory: Path) -> str:
    """Digest of an adapter directory's configuration and weights."""
    files = sorted(p for p in directory.glob("adapter_*") if p.is_file())
    if not files:
        raise FileNotFoundError(f"{directory} holds no PEFT adapter (no adapter_config.json).")
    return fingerprint({file.name: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files})
