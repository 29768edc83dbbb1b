"""Level ``model`` of the benchmark: a whole decoder with many adapters, its first token and the tokens after it.

The weights are random (`random_models`), the shape is a real one's. Beside the backends stand two bounds: ``base`` is
the decoder as transformers has it, ``single_lora`` is stock PEFT with one adapter and no gate.

Rows have workload ``model``, in_features the hidden size and out_features the vocabulary. In mode ``prefill`` a call
reads ``batch`` prompts of ``tokens`` tokens, fills a key-value cache and gives the logits of each prompt's next token:
``time_us`` is the time to the first token. In mode ``decode`` a call is one step with a static cache, in which every
context has ``tokens`` tokens, the new one included. ``tokens_per_s`` counts the prompts' tokens, or the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import StaticCache

from meteora import MeteoraConfig, MeteoraLinear, MeteoraModel
from meteora.backends.dense import column_weights
from meteora.gating import Routing, gate_logits
from meteora.study.baselines import share_weights
from meteora.study.benchmark_layer import TOLERANCE
from meteora.study.benchmark_measure import require_memory_error, time_and_memory
from meteora.study.benchmark_results import BOUNDS
from meteora.study.benchmark_rows import OUT_OF_MEMORY, RowFile, make_row
from meteora.study.model_settings import WholeModel
from meteora.study.profiles import BenchmarkSettings
from meteora.study.random_models import peft_model, random_adapters, random_decoder, random_mixture
from meteora.study.timing import Stopwatch

CHECKED_TOKENS = 32  # of each layer, in each case
CLOSE = 0.01  # tokens whose k-th and next logit are nearer, in standard deviations, may choose either
END_TO_END = 5.0  # times TOLERANCE: what rounding adds up to over all layers; 3.2 was seen over 32 in bfloat16
METRICS = ("time_us", "tokens_per_s", "peak_bytes")

_CASE = ("mode", "batch", "tokens", "adapters", "rank", "top_k", "in_features", "out_features", "dtype")


@dataclass(frozen=True)
class Case:
    """One setting in which all strategies are measured."""

    mode: str
    batch: int
    tokens: int


class Decoders:
    """The decoder of a profile, bare, with PEFT and with the mixture, all three over one copy of its weights."""

    def __init__(self, whole: WholeModel, dtype: str, device: torch.device, seed: int = 0) -> None:
        context = max(max(study.tokens) for study in whole.studies)
        self.device, self.seed = device, seed
        self.base = random_decoder(whole.shape, context=context, dtype=getattr(torch, dtype), device=device, seed=seed)
        adapters = random_adapters(self.base, whole.adapters, whole.rank, seed=seed)
        self.single_lora = peft_model(share_weights(self.base), adapters[0])
        self.mixture = random_mixture(share_weights(self.base), adapters, MeteoraConfig(top_k=whole.top_k), seed=seed)

    def model(self, strategy: str) -> nn.Module:
        """The model that computes by a strategy: one of BOUNDS, or a backend's name."""
        if strategy in BOUNDS:
            return getattr(self, strategy)
        self.mixture.set_backend(strategy)
        return self.mixture


def cases(whole: WholeModel) -> dict[Case, dict[str, set[str]]]:
    """Case -> strategy -> its launches; a setting of two studies is one case. The bounds are launched in every way."""
    found: dict[Case, dict[str, set[str]]] = {}
    for study in whole.studies:
        for batch, tokens, name in product(study.batch, study.tokens, (*BOUNDS, *study.backends)):
            case = found.setdefault(Case(study.mode, batch, tokens), {})
            case.setdefault(name, set()).update(study.launches)
    return found


def measure_model(
    settings: BenchmarkSettings,
    file: RowFile,
    device: torch.device,
    *,
    seed: int,
    go_on: Callable[[], None],
    progress: bool,
) -> None:
    """Metrics METRICS of every strategy in every case that ``file`` lacks; nothing if the profile has no such model.

    What does not fit into memory is a row without a value that says so. Results are checked first, see `check`.
    """
    whole = settings.model
    if whole is None:
        return
    done = file.keys("workload", *_CASE, "backend")
    watch = Stopwatch(device, whole.repeats, whole.seconds)
    decoders = None
    for case, names in tqdm(cases(whole).items(), desc="model", unit="setting", disable=not progress):
        work = None
        for name, launches in names.items():
            setting = _setting(case, whole, settings.dtype) | {"backend": name}
            if ("model", *(setting[column] for column in _CASE), name) in done:
                continue
            go_on()
            if decoders is None:
                decoders = Decoders(whole, settings.dtype, device, seed)
            file.append(_measure(setting, name, launches, work := work or Work(case, decoders), watch))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the graphs' own memory


def _setting(case: Case, whole: WholeModel, dtype: str) -> dict[str, Any]:
    return {
        "workload": "model", "mode": case.mode, "routing": "uniform", "batch": case.batch, "tokens": case.tokens,
        "adapters": whole.adapters, "rank": whole.rank, "top_k": whole.top_k,
        "in_features": whole.shape.hidden_size, "out_features": whole.shape.vocab_size, "dtype": dtype,
    }  # fmt: skip


def _measure(
    setting: dict[str, Any], name: str, launches: set[str], work: Work, watch: Stopwatch
) -> list[dict[str, Any]]:
    try:
        with torch.no_grad():
            check(work, name)
            call = work.call(name)
            rows = time_and_memory(setting, lambda: call, launches, watch)
    except RuntimeError as error:
        require_memory_error(error)
        return [make_row(setting | {"launch": "eager"}, metric, None, unit=OUT_OF_MEMORY) for metric in METRICS]
    tokens = setting["batch"] * (setting["tokens"] if setting["mode"] == "prefill" else 1)
    for row in [row for row in rows if row["metric"] == "time_us" and not math.isnan(row["value"])]:
        speeds = [1e6 * tokens / row[quantile] for quantile in ("value", "p80", "p20")]
        rows.append(make_row({**setting, "launch": row["launch"]}, "tokens_per_s", speeds))
    return rows


class Work:
    """What is computed in one case, the same for all strategies: random tokens, and in ``decode`` a random context."""

    def __init__(self, case: Case, decoders: Decoders) -> None:
        self.case, self.decoders = case, decoders
        device, config = decoders.device, decoders.base.config
        generator = torch.Generator(device).manual_seed(decoders.seed)
        shape = (case.batch, case.tokens if case.mode == "prefill" else 1)
        self.ids = torch.randint(config.vocab_size, shape, generator=generator, device=device)
        self.cache = None
        if case.mode == "decode":
            with torch.no_grad():
                self.cache = random_cache(decoders.base, case, generator)

    def call(self, name: str) -> Callable[[], Tensor]:
        """A call that gives a strategy's logits (batch, 1, vocabulary), as often as it is called."""
        return next_logits(self.decoders.model(name), self.ids, self.cache)

    @cached_property
    def logits_of_peft(self) -> Tensor:
        """What PEFT gives with the first adapter, in float32."""
        return self.call("single_lora")().float()

    @cached_property
    def logits_of_base(self) -> Tensor:
        return self.call("base")().float()


def next_logits(model: nn.Module, ids: Tensor, cache: StaticCache | None = None) -> Callable[[], Tensor]:
    """A call that gives the logits (batch, 1, vocabulary) behind prompts, or behind one token and what `cache` holds.

    Args:
        ids: (batch, tokens); with a cache (batch, 1), the token that each call puts into the cache's last place.
    """
    if cache is None:
        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    lengths = [layer.cumulative_length for layer in cache.layers]

    def step() -> Tensor:
        # Back to the place of the new token, in two launches for all layers.
        torch._foreach_zero_(lengths)
        torch._foreach_add_(lengths, cache.layers[0].max_cache_len - 1)
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    return step


def random_cache(base: nn.Module, case: Case, generator: torch.Generator) -> StaticCache:
    """A static cache of ``tokens`` places, all but the last taken."""
    config = base.config
    cache = StaticCache(config=config, max_cache_len=case.tokens)
    shape = (case.batch, config.num_key_value_heads, case.tokens - 1, config.head_dim)
    for n in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, generator=generator, device=generator.device, dtype=base.dtype) for _ in range(2)
        )
        cache.update(keys, values, n)
    return cache


# What is computed must be right --------------------------------------------------------------------------------------


def check(work: Work, name: str) -> None:
    """Raise ``AssertionError`` unless a backend computes what it must, up to rounding.

    In every layer the mixture is compared with the paper's equation in float32, for some of the layer's real inputs;
    and the whole model, told to use the first adapter alone, with stock PEFT.
    """
    if name in BOUNDS:
        return
    dtype = work.decoders.base.dtype
    model: MeteoraModel = work.decoders.model(name)
    call = work.call(name)
    errors: dict[str, float] = {}

    def compare(layer: MeteoraLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        errors[layer.name] = _update_error(layer, inputs[0], output)

    hooks = [layer.register_forward_hook(compare) for layer in model.layers.values()]
    try:
        logits = call()
    finally:
        for hook in hooks:
            hook.remove()
    worst = max(errors, key=errors.get)
    if len(errors) < len(model.layers) or not errors[worst] <= TOLERANCE[dtype]:
        raise AssertionError(f"{name} is wrong in {worst!r}: its update is off by {errors[worst]:.1e}, in {work.case}.")
    if not logits.isfinite().all():
        raise AssertionError(f"{name} gives logits that are not finite, in {work.case}.")
    with model.route_to(model.adapter_names[0]):
        found = call().float()
    error = ((found - work.logits_of_peft).norm() / work.logits_of_peft.norm()).item()
    effect = ((work.logits_of_base - work.logits_of_peft).norm() / work.logits_of_peft.norm()).item()
    if not (error <= END_TO_END * TOLERANCE[dtype] and error < effect / 5):
        raise AssertionError(
            f"{name}, told to use one adapter, differs from PEFT by {error:.1e} where the adapter itself makes "
            f"{effect:.1e}, in {work.case}."
        )


def _update_error(layer: MeteoraLinear, x: Tensor, output: Tensor) -> float:
    """Relative error of what was added to the frozen layer's output, x (..., in) -> output (..., out)."""
    x, output = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
    rows = torch.linspace(0, len(x) - 1, min(CHECKED_TOKENS, len(x)), device=x.device).long()
    x, k = x[rows], layer.state.top_k
    logits = gate_logits(x, layer.gate.weight)  # (t, N)
    values, indices = logits.topk(min(k + 1, logits.shape[1]))
    clear = torch.ones_like(rows, dtype=torch.bool)
    if values.shape[1] > k:
        clear = values[:, k - 1] - values[:, k] > CLOSE * logits.std()
    weights = torch.softmax(values[:, :k] / layer.state.temperature, dim=-1)
    s = (x.float() @ layer.lora_A.float().t()) * column_weights(Routing(indices[:, :k], weights), layer.column_adapter)
    expected = s @ layer.lora_B.float().t()
    found = output[rows].float() - layer.base_layer(x).float()
    return ((found - expected)[clear].norm() / expected[clear].norm().clamp(min=1e-30)).item()
