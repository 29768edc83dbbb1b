"""LoRAHub: for every task, all adapters added up with weights found from a few of its examples (method ``lorahub``).

The sum is of factors, A = sum w_n A_n and B = sum w_n B_n; the weights lie within [-1.5, 1.5] and minimise the loss on
the examples plus 0.05 times their mean absolute value, without gradients (Huang et al. 2024, arXiv 2307.13269). PEFT
has no LoRAHub. The authors search with nevergrad, whose choice for so few evaluations is a variant of CMA-ES; here it
is CMA-ES itself, from the package ``cma``, which nevergrad uses, and which needs neither SciPy nor scikit-learn.

A task's own adapter is among those added up, and its examples say which task it is: the method is *told* the task.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import cma
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from meteora import MeteoraModel
from meteora.adapters import CONFIG_FILE, WEIGHTS_FILE, LoraWeights, adapter_directory, load_adapter, peft_tensors
from meteora.attention import without_masks
from meteora.batches import collate, encode, response_places
from meteora.files import atomic_directory, write_tensors
from meteora.recording import Recordings, can_be_recorded
from meteora.study.baselines import Method, share_weights
from meteora.study.measures import Example
from meteora.study.merging import adapter_digests
from meteora.study.predictions import fingerprint, model_fingerprints
from meteora.training_loop import place_losses

BOUND, PENALTY, SPREAD = 1.5, 0.05, 0.5  # of the weights; the last is the standard deviation of the first candidates
NOTE = "lorahub.json"


class WeightedSum:
    """One adapter in a model whose factors are weighted sums of those of N adapters.

    All modules' factors on one device lie in one tensor, so that two operations set them.
    """

    def __init__(self, base_model: torch.nn.Module, adapters: Mapping[str, str | Path]) -> None:
        loaded = [load_adapter(task, directory) for task, directory in adapters.items()]
        first = loaded[0].modules
        for adapter in loaded:
            same = adapter.modules.keys() == first.keys()
            if not same or any(w.rank != first[m].rank for m, w in adapter.modules.items()):
                raise ValueError(f"adapter {adapter.name!r} differs from {loaded[0].name!r} in rank or modules.")
        self.model = MeteoraModel.from_adapters(share_weights(base_model), {"sum": next(iter(adapters.values()))})
        self.model.eval()
        self.count = len(loaded)
        self.stacks: dict[str, tuple[Tensor, Tensor]] = {}  # module -> A (N, r, in), B (N, out, r): views of `_parts`
        self._parts: list[tuple[Tensor, Tensor]] = []  # on each device (N, values) float32, and their sum (values,)
        modules: dict[torch.device, list[str]] = {}
        for module, layer in self.model.layers.items():
            modules.setdefault(layer.lora_A.device, []).append(module)
        for device, here in modules.items():
            self._gather([adapter.modules for adapter in loaded], here, device)

    def _gather(self, adapters: Sequence[Mapping[str, LoraWeights]], modules: Sequence[str], device) -> None:
        """Lay some modules' factors side by side, the scaling folded into B; the model's become views of the sum."""
        matrices = [[matrix for m in modules for matrix in (a[m].A, a[m].B * a[m].scaling)] for a in adapters]
        values = torch.stack([torch.cat([matrix.float().flatten() for matrix in row]) for row in matrices]).to(device)
        layers = [self.model.layers[module] for module in modules]
        total = torch.zeros(values.shape[1], dtype=layers[0].lora_A.dtype, device=device)
        sizes = [matrix.numel() for matrix in matrices[0]]
        shapes = [matrix.shape for matrix in matrices[0]]
        views = [part.unflatten(1, shape) for part, shape in zip(values.split(sizes, 1), shapes, strict=True)]
        sums = [part.view(shape) for part, shape in zip(total.split(sizes), shapes, strict=True)]
        for n, (module, layer) in enumerate(zip(modules, layers, strict=True)):
            self.stacks[module] = views[2 * n], views[2 * n + 1]
            layer.lora_A.data, layer.lora_B.data = sums[2 * n], sums[2 * n + 1]
        self._parts.append((values, total))

    def factors(self, weights: Sequence[float], module: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one module for one weight per adapter."""
        A, B = self.stacks[module]
        w = torch.tensor(weights, dtype=torch.float32, device=A.device)
        return torch.tensordot(w, A, 1), torch.tensordot(w, B, 1)

    @torch.no_grad()
    def set(self, weights: Sequence[float]) -> None:
        """Put the sum with these weights (N,) into the model."""
        for values, total in self._parts:
            total.copy_(torch.tensor(weights, dtype=torch.float32, device=values.device) @ values)


def search_weights(
    loss: Callable[[Sequence[float]], float], count: int, *, evaluations: int, seed: int
) -> tuple[list[float], float]:
    """The best of about ``evaluations`` weight vectors (count,), and its loss with the penalty; CMA-ES from zero."""
    generator = np.random.RandomState(seed)
    strategy = cma.CMAEvolutionStrategy(
        count * [0.0],
        SPREAD,
        {
            "bounds": [-BOUND, BOUND],
            # a generator of our own: with a seed, the package would set NumPy's global one
            "randn": lambda *shape: generator.standard_normal(shape),
            "seed": np.nan,
            "maxfevals": evaluations,
            "popsize": min(8, evaluations),  # five generations of the authors' 40 evaluations
            "verbose": -9,
        },
    )
    while strategy.countevals < evaluations:
        candidates = strategy.ask()
        strategy.tell(candidates, [loss(w.tolist()) + PENALTY * float(np.abs(w).mean()) for w in candidates])
    return strategy.result.xbest.tolist(), float(strategy.result.fbest)


def compose_adapters(
    base_model: torch.nn.Module,
    adapters: Mapping[str, str | Path],
    examples: Mapping[str, Sequence[Example]],
    *,
    tokenizer,
    output_dir: str | Path,
    evaluations: int = 40,
    max_length: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Path]:
    """One composed adapter a task, written as an ordinary PEFT directory; those that hold are kept.

    Args:
        base_model: the plain base model; left as it is.
        adapters: task -> PEFT adapter directory; all of one rank and the same target modules.
        examples: task -> its few training examples; the authors take five.
        evaluations: weight vectors that are tried for a task; the authors' budget is 40.
    """
    digests, base = adapter_digests(adapters), model_fingerprints(base_model)["base"]
    targets = {task: adapter_directory(output_dir, task) for task in examples}
    total: WeightedSum | None = None
    for task, rows in tqdm(examples.items(), desc="LoRAHub", unit="task", disable=not progress):
        recipe = {
            "adapters": digests, "base": base, "examples": fingerprint([dict(row) for row in rows]),
            "evaluations": evaluations, "max_length": max_length, "seed": seed,
        }  # fmt: skip
        note = targets[task] / NOTE
        made = note.is_file() and (targets[task] / WEIGHTS_FILE).is_file()
        if made and json.loads(note.read_text(encoding="utf-8"))["recipe"] == recipe:
            continue
        total = total or WeightedSum(base_model, adapters)
        weights, loss = _search(total, rows, tokenizer, evaluations, max_length, seed)
        with atomic_directory(targets[task]) as directory:
            _write(total, weights, next(iter(adapters.values())), directory)
            found = {"recipe": recipe, "loss": loss, "weights": dict(zip(adapters, weights, strict=True))}
            (directory / NOTE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return targets


def _search(
    total: WeightedSum, rows: Sequence[Example], tokenizer, evaluations: int, max_length: int, seed: int
) -> tuple[list[float], float]:
    samples = encode([{**row, "task": "sum"} for row in rows], {"sum": 0}, tokenizer, max_length)
    model, tokens = total.model, sum(sample.response_tokens for sample in samples)
    device = next(model.parameters()).device
    batch = collate(samples, tokenizer.pad_token_id, device)
    places, targets = response_places(batch.labels)
    found = torch.zeros((), device=device)

    @torch.no_grad()
    def evaluate() -> None:
        found.copy_(place_losses(model, batch.input_ids, places, targets).sum())

    recorded = can_be_recorded(model, device)

    def loss(weights: Sequence[float]) -> float:
        total.set(weights)
        if recordings is None:
            evaluate()
        else:
            recordings.run("loss", evaluate, rehearsal=evaluate)
        return found.item() / tokens

    with (
        model.route_to("sum"),
        without_masks(model, recorded),
        Recordings(device, "an evaluation of LoRAHub") if recorded else nullcontext() as recordings,
    ):
        return search_weights(loss, total.count, evaluations=evaluations, seed=seed)


def _write(total: WeightedSum, weights: Sequence[float], first: str | Path, directory: Path) -> None:
    """The sum as a PEFT directory, with the configuration of the first adapter, in float32."""
    scalings = {module: pair.scaling for module, pair in load_adapter("first", first).modules.items()}
    modules = {}
    for module, scaling in scalings.items():
        A, B = total.factors(weights, module)
        modules[module] = LoraWeights(A, B / scaling, scaling)
    write_tensors(directory / WEIGHTS_FILE, peft_tensors(modules), {"format": "pt"})
    shutil.copyfile(Path(first) / CONFIG_FILE, directory / CONFIG_FILE)


def lorahub_method(base_model: torch.nn.Module, composed: Mapping[str, str | Path]) -> Method:
    """Every task with its own composed adapter, task -> PEFT directory."""
    model = MeteoraModel.from_adapters(share_weights(base_model), dict(composed)).eval()

    @functools.cache
    def digests() -> dict[str, str]:
        return model_fingerprints(model)

    return Method("lorahub", model, model.route_to, ("base", "adapters"), told_task=True, _weights=digests)
