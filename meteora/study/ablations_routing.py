"""Studies of the trained gates, without training any: how many adapters, which temperature, which gates decide."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch

from meteora import MeteoraModel, Routing
from meteora.gating import chosen_share, route
from meteora.study.ablations import Ablations, Variant, methods_of
from meteora.study.baselines import Method, Tasks, with_temperature
from meteora.study.measures import Row
from meteora.study.profiles import ProfileError

GATED = ("meteora_top1", "meteora_top2")


def inside(method: Method, changed: Callable[[Tasks], AbstractContextManager]) -> Method:
    """The method with what ``changed`` makes of its model besides."""

    @contextmanager
    def state(tasks: Tasks) -> Iterator[None]:
        with method.active(tasks), changed(tasks):
            yield

    return replace(method, state=state)


def top_k_study(ablations: Ablations) -> Iterator[Variant]:
    """The k best adapters of each token and layer."""
    for k in ablations.settings.top_k:

        def produce(k: int = k) -> list[Row]:
            methods = methods_of(ablations.study.model, f"meteora_top{k}")
            answers = ablations.answer(methods, ablations.valid, "top_k", f"k={k}")
            return ablations.accuracy_rows(answers, adapters=len(ablations.tasks), top_k=k, temperature=1.0)

        yield Variant(f"k={k}", {}, produce)


def temperature_study(ablations: Ablations) -> Iterator[Variant]:
    """What divides the logits of the two best adapters before their softmax; the paper raises it for composites."""
    for value in ablations.settings.temperatures:

        def produce(value: float = value) -> list[Row]:
            (method,) = methods_of(ablations.study.model, "meteora_top2").values()
            methods = {"meteora_top2": with_temperature(method, value)}
            answers = ablations.answer(methods, ablations.valid, "temperature", f"T={value:g}")
            return ablations.accuracy_rows(answers, adapters=len(ablations.tasks), top_k=2, temperature=value)

        yield Variant(f"T={value:g}", {}, produce)


def deciding_study(ablations: Ablations) -> Iterator[Variant]:
    """All modules keep their adapters, but the gates of some alone decide; the others follow the last decision."""
    for name, parts in ablations.settings.modules.items():

        def produce(name: str = name, parts: Sequence[str] = parts) -> list[Row]:
            model = ablations.study.model
            require_modules(model, name, parts)
            (method,) = methods_of(model, "meteora_top2").values()
            methods = {"meteora_top2": inside(method, lambda tasks: deciding_alone(model, parts))}
            answers = ablations.answer(methods, ablations.valid, "deciding", name)
            return ablations.accuracy_rows(answers, adapters=len(ablations.tasks), top_k=2, temperature=1.0)

        yield Variant(f"gates of {name} decide", {"modules": parts}, produce)


def require_modules(model: MeteoraModel, name: str, parts: Sequence[str]) -> None:
    """Raise ``ProfileError`` where ``modules[name]`` of a profile has a part of which no adapted module is named."""
    known = dict.fromkeys(module.rpartition(".")[2] for module in model.layers)
    for part in parts:
        if part not in known:
            raise ProfileError(
                f"ablations.modules[{name!r}] has {part!r}, but the model's adapters are in {', '.join(known)}; correct it "
                "in the profile."
            )


class _LastDecision:
    """In place of a gate's choice: the choice that was made last in this forward pass."""

    def __init__(self) -> None:
        self.made: Routing | None = None

    def routing(self, batch: torch.Size, device: torch.device) -> Routing:
        return self.made


@contextmanager
def deciding_alone(model: MeteoraModel, parts: Sequence[str]) -> Iterator[None]:
    """Inside, a layer whose module's name ends in one of ``parts`` uses its gate, any other the decision before it.

    Layers ahead of the first decision of a pass use their own gates.
    """
    last, state = _LastDecision(), model.state
    deciders = {id(layer) for name, layer in model.layers.items() if name.rpartition(".")[2] in parts}

    def begin(*_) -> None:
        last.made = None

    def before(layer: torch.nn.Module, _) -> None:
        state.forced = None if id(layer) in deciders or last.made is None else last

    def decide(layer: torch.nn.Module, x: torch.Tensor, logits: torch.Tensor) -> None:
        if id(layer) in deciders:
            last.made = route(logits, state.top_k, state.temperature, state.least_share)

    hooks = [model.base_model.register_forward_pre_hook(begin)]
    hooks += [layer.register_forward_pre_hook(before) for layer in model.layers.values()]
    state.gate_observer = decide
    try:
        yield
    finally:
        state.gate_observer = state.forced = None
        for hook in hooks:
            hook.remove()


def weights_study(ablations: Ablations) -> Iterator[Variant]:
    """What a choice is worth whose gate is unsure: adapters weigh what the softmax over all gives them, or nothing."""
    for least in ablations.settings.weights:
        name = f"none below {least:g}" if least else "shares of all adapters"

        def produce(least: float = least, name: str = name) -> list[Row]:
            answers = ablations.answer(_unsure_methods(ablations, least), ablations.valid, "weights", name)
            return ablations.accuracy_rows(answers, adapters=len(ablations.tasks), temperature=1.0)

        yield Variant(name, {}, produce)
    # What was best on validation examples has to be so on others.
    if ablations.settings.weights_tested is not None:
        least = ablations.settings.weights_tested
        settings = {"test_samples": ablations.profile.data.test}
        yield Variant(f"none below {least:g}, test samples", settings, partial(_test_weights, ablations, least))


def _test_weights(ablations: Ablations, least: float) -> list[Row]:
    """On all test samples, those of Table 1 among them, the methods as they are, and changed (`none_where_unsure`)."""
    examples = ablations.examples("test")
    usual = ablations.answer(methods_of(ablations.study.model, "peft", *GATED), examples, "weights", "test")
    changed = ablations.answer(_unsure_methods(ablations, least), examples, "weights", f"test {least:g}")
    common = {"split": "test", "beside": usual, "adapters": len(ablations.tasks), "temperature": 1.0}
    rows = ablations.accuracy_rows(usual, **common)
    for name, by_task in changed.items():
        rows += ablations.accuracy_rows({none_where_unsure(name): by_task}, against=name, **common)
    return rows


def none_where_unsure(name: str) -> str:
    """The name of a method, changed by `unsure`, where the unchanged one stands beside it."""
    return f"{name}, none where unsure"


def _unsure_methods(ablations: Ablations, least: float) -> dict[str, Method]:
    model = ablations.study.model
    methods = methods_of(model, *GATED)
    return {name: inside(method, lambda tasks: unsure(model, least)) for name, method in methods.items()}


@contextmanager
def unsure(model: MeteoraModel, least: float = 0.0) -> Iterator[None]:
    """Inside, a token's k adapters weigh together the share that a softmax over all adapters gives them.

    With ``least``, they weigh what they ever do where that share is at least so much, and nothing elsewhere.
    """

    def weigh(logits: torch.Tensor, top_k: int, temperature: float, _: float) -> Routing:
        usual = route(logits, top_k, temperature)
        return Routing(usual.indices, usual.weights * chosen_share(logits, usual.indices))

    state = model.state
    before = state.least_share, state.router
    if least:
        state.least_share = least
    else:
        state.router = weigh
    try:
        yield
    finally:
        state.least_share, state.router = before


def told_study(ablations: Ablations) -> Iterator[Variant]:
    """The task's own adapter in some decoder layers, the gates' choice in the others: where a wrong choice costs answers."""
    yield from _in_layers(ablations, "told", ablations.settings.told, GATED, told_in, told=True)


def silent_study(ablations: Ablations) -> Iterator[Variant]:
    """No adapter in some decoder layers: what adapters are worth there to whoever knows the task, and to who must guess."""
    yield from _in_layers(ablations, "silent", ablations.settings.silent, ("peft", *GATED), silent_in)


def _in_layers(
    ablations: Ablations,
    study: str,
    ranges: Mapping[str, tuple[int, int]],
    names: Sequence[str],
    changed: Callable[[MeteoraModel, Tasks, range], AbstractContextManager],
    *,
    told: bool = False,
) -> Iterator[Variant]:
    """A variant for every range of decoder layers, in which ``changed`` makes the methods differ.

    Args:
        told: whether that tells the methods the task.
    """
    for name, (first, behind) in ranges.items():

        def produce(name: str = name, layers: range = range(first, behind)) -> list[Row]:
            model = ablations.study.model
            last = max(map(decoder_layer, model.layers))
            if layers.stop - 1 > last:
                raise ProfileError(
                    f"ablations.{study}[{name!r}] ends behind layer {layers.stop - 1}, but the model's last is {last}; "
                    "correct it in the profile."
                )
            methods = {
                one: replace(inside(method, lambda tasks: changed(model, tasks, layers)), told_task=told or method.told_task)
                for one, method in methods_of(model, *names).items()
            }
            answers = ablations.answer(methods, ablations.valid, study, name)
            return ablations.accuracy_rows(answers, adapters=len(ablations.tasks), temperature=1.0)

        yield Variant(f"{study} in {name}", {"layers": [first, behind]}, produce)


def decoder_layer(name: str) -> int:
    """The number of the decoder layer that a module belongs to, from its dotted name."""
    return int(re.search(r"\d+", name)[0])


@contextmanager
def told_in(model: MeteoraModel, tasks: Tasks, layers: Container[int]) -> Iterator[None]:
    """Inside, modules of decoder layers with these numbers use the tasks' own adapters, as in ``route_to``."""
    state, hooks = model.state, []
    with model.route_to(tasks):
        told = state.forced

        def choose(*_) -> None:
            state.forced = None

        def follow(*_) -> None:
            state.forced = told

        for name, layer in model.layers.items():
            if decoder_layer(name) not in layers:
                hooks += [layer.register_forward_pre_hook(choose), layer.register_forward_hook(follow)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def silent_in(model: MeteoraModel, tasks: Tasks, layers: Container[int]) -> Iterator[None]:
    """Inside, modules of decoder layers with these numbers are the base model's, whatever the ``tasks``."""
    state, hooks = model.state, []
    before = state.enabled

    def set_to(enabled: bool) -> Callable[..., None]:
        return lambda *_: setattr(state, "enabled", enabled)

    for name, layer in model.layers.items():
        if decoder_layer(name) in layers:
            hooks += [layer.register_forward_pre_hook(set_to(False)), layer.register_forward_hook(set_to(before))]
    try:
        yield
    finally:
        state.enabled = before  # a layer that failed has not set it back
        for hook in hooks:
            hook.remove()


STUDIES: dict[str, Callable[[Ablations], Iterator[Variant]]] = {
    "top_k": top_k_study,
    "temperature": temperature_study,
    "deciding": deciding_study,
    "weights": weights_study,
    "told": told_study,
    "silent": silent_study,
}
