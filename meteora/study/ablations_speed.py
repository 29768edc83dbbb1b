"""Studies of the whole model's time and memory: against the number of adapters, the batch, the prompt's length."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from meteora import MeteoraConfig, MeteoraModel
from meteora.adapters import Adapter, LoraWeights, load_adapter
from meteora.backends import get_mix
from meteora.study.ablations import Ablations, Variant, row
from meteora.study.baselines import share_weights
from meteora.study.benchmark_measure import time_and_memory
from meteora.study.benchmark_model import Case, next_logits, random_cache
from meteora.study.benchmark_rows import OUT_OF_MEMORY
from meteora.study.measures import Row
from meteora.study.timing import Call, Stopwatch

NOISE = 0.01  # standard deviation of what is added to a copy's factors, over theirs
SECONDS = 1.0  # that a measurement's repetitions take, at most


def perturbed_copies(adapters: Sequence[Adapter], count: int, *, seed: int = 0) -> list[Adapter]:
    """``count`` adapters: those there are, then copies of them with a little noise. They measure cost, not quality."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * NOISE
        return (tensor.float() + noise).to(tensor.dtype)

    found = []
    for n in range(count):
        adapter = adapters[n % len(adapters)]
        if n >= len(adapters):
            modules = {m: LoraWeights(noisy(w.A), noisy(w.B), w.scaling) for m, w in adapter.modules.items()}
            name = f"{adapter.name}, copy {n // len(adapters)}"
            adapter = dataclasses.replace(adapter, name=name, modules=modules, in_memory=True)
        found.append(adapter)
    return found


def model_of_copies(ablations: Ablations, count: int) -> MeteoraModel:
    """A model with so many adapters, and gates of random rows: choices spread over all of them."""
    loaded = [load_adapter(task, path) for task, path in ablations.study.adapters.items()]
    copies = perturbed_copies(loaded, count, seed=ablations.profile.seed)
    config = MeteoraConfig(top_k=min(2, count))
    model = MeteoraModel(share_weights(ablations.study.plain), copies, config).eval()
    generator = torch.Generator().manual_seed(ablations.profile.seed)
    for layer in model.layers.values():
        layer.gate.weight.data.copy_(torch.randn(layer.gate.weight.shape, generator=generator))
    model.state.untrained.clear()
    return model


def measure(
    model: MeteoraModel,
    active: Callable[[], AbstractContextManager],
    *,
    batch: int,
    tokens: int,
    repeats: int,
    device: torch.device,
) -> list[Row]:
    """Rows ``prefill`` (s), ``decode`` (ms for the next token of all), ``peak_bytes`` (the prefill's, above weights).

    Prompts, and the context of the next token, are random. On a GPU these are times of CUDA graphs, as notebook 05 has
    them for whole models: what Python needs to start the kernels would hide how long they take. What cannot be in a
    graph, as the CPU waits for the GPU on its way, has a unit that says so; a setting that does not fit leaves rows
    without a value.
    """
    watch, generator = Stopwatch(device, repeats, SECONDS), torch.Generator(device).manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(model.config.vocab_size, (batch, length), generator=generator, device=device)

    try:
        with torch.no_grad(), active():
            prefill, of_prefill, peak = _timed(partial(next_logits, model, draw(tokens)), watch)
            context = random_cache(model.base_model, Case("decode", batch, tokens), generator)
            step, of_step, _ = _timed(partial(next_logits, model, draw(1), context), watch)
    except torch.OutOfMemoryError:
        return [row(name, None, unit=OUT_OF_MEMORY) for name in ("prefill", "decode", "peak_bytes")]
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the graphs' own memory
    return [
        row("prefill", 1e-6 * prefill, unit=f"s{of_prefill}"),
        row("decode", 1e-3 * step, unit=f"ms per step{of_step}"),
        row("peak_bytes", peak, unit="bytes"),
    ]


def _timed(prepare: Callable[[], Call], watch: Stopwatch) -> tuple[float, str, float]:
    """The median of a call's time (us), what the unit has to say of its launch, and its peak of memory (bytes)."""
    peak, *times = time_and_memory({}, prepare, {"graph"}, watch)
    found = next(r for r in times if not math.isnan(r["value"]))
    eager = watch.device.type == "cuda" and found["launch"] == "eager"
    return found["value"], ", eager" if eager else "", peak["value"]


def scale_study(ablations: Ablations) -> Iterator[Variant]:
    """One of the number of adapters, the batch and the prompt's length is varied at a time.

    Beside the mixture stand the base model and one adapter for all tokens, without a gate.
    """
    speed = ablations.settings.speed
    if speed is None:
        return
    usual = (speed.adapters[0], speed.batch[0], speed.tokens[0])
    cells = {(n, *usual[1:]) for n in speed.adapters} | {(usual[0], b, usual[2]) for b in speed.batch}
    cells |= {(*usual[:2], t) for t in speed.tokens}
    models: dict[int, MeteoraModel] = {}
    for n, batch, tokens in sorted(cells):

        def produce(n: int = n, batch: int = batch, tokens: int = tokens) -> list[Row]:
            if n not in models:
                models.clear()  # one at a time is in memory
                models[n] = model_of_copies(ablations, n)
            model = models[n]
            added = [t for layer in model.layers.values() for t in (layer.gate.weight, layer.lora_A, layer.lora_B)]
            rows = [row("added_bytes", sum(t.nbytes for t in added), unit="bytes", adapters=n)]
            for method, (run, active) in {**_bounds(ablations), "meteora_top2": (model, nullcontext)}.items():
                found = measure(
                    run, active, batch=batch, tokens=tokens, repeats=speed.repeats, device=ablations.device
                )
                rows += [{"method": method, "adapters": n, "batch": batch, "tokens": tokens, **r} for r in found]
            return rows

        name = f"{n} adapters, {batch} x {tokens} tokens"
        yield Variant(name, [speed.repeats], produce, timed=True)


def _bounds(ablations: Ablations) -> dict[str, tuple[MeteoraModel, Callable[[], AbstractContextManager]]]:
    """The base model, and a model with one adapter that every token uses: no gate is computed in either."""
    model = model_of_copies(ablations, 1)
    (only,) = model.adapter_names
    return {"base": (model, model.disable_adapters), "single_lora": (model, lambda: model.route_to(only))}


def latency_study(ablations: Ablations) -> Iterator[Variant]:
    """What a decoded token takes for one prompt, by backend; the trained model, no copies."""
    speed = ablations.settings.speed
    if speed is None:
        return
    for backend in speed.backends:

        def produce(backend: str = backend) -> list[Row]:
            model, rows = ablations.study.model, []
            ours = {n: (model, m.active) for n, m in ablations.study.methods.items() if n.startswith("meteora")}
            for name, (run, active) in {**_bounds(ablations), **ours}.items():
                before = run.state.backend
                run.set_backend(backend)
                try:
                    found = measure(
                        run, active, batch=1, tokens=speed.tokens[0], repeats=speed.repeats, device=ablations.device
                    )
                finally:
                    run.set_backend(before)
                common = {"method": name, "adapters": len(ablations.tasks), "batch": 1, "tokens": speed.tokens[0]}
                rows += [{**common, **r} for r in found]
            return rows

        runs = _can_run(backend, ablations.device)
        yield Variant(backend, [speed.tokens[0], speed.repeats], produce if runs else None, timed=True)


def _can_run(backend: str, device: torch.device) -> bool:
    try:
        get_mix(backend, device.type)
    except RuntimeError:
        return False
    return True


STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {"latency": latency_study, "scale": scale_study}
