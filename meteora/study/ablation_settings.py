"""What notebook 06 varies: a profile's section ``ablations``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_prep.tasks import get_task
from meteora.config import BACKENDS
from meteora.study.checks import at_least, distinct, one_of


@dataclass(frozen=True)
class SpeedStudy:
    """What the whole model is timed on, one of the three varied at a time; the first of each list is what others have.

    Attributes:
        adapters: how many; copies with a little noise of those there are.
        batch, tokens: prompts at once, and tokens of each.
        backends: compared on the first of the lists; those that cannot run on the device are left out.
        repeats: measurements of each, of which the median counts.
    """

    adapters: tuple[int, ...]
    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    backends: tuple[str, ...] = ("auto", "loop", "bmm", "dense", "triton")
    repeats: int = 3

    def __post_init__(self) -> None:
        distinct(adapters=self.adapters, batch=self.batch, tokens=self.tokens, backends=self.backends)
        one_of(BACKENDS, backends=self.backends)
        at_least(1, adapters=min(self.adapters), batch=min(self.batch), tokens=min(self.tokens))
        at_least(1, repeats=self.repeats)


@dataclass(frozen=True)
class FormatStudy:
    """Composite texts that adapters, LoRA-B and gates are trained on besides single questions.

    Attributes:
        texts: of training examples; each has an answer for every task in it.
        valid_texts: likewise of validation examples, for the choice of the kept step.
        sizes, shots: tasks, and solved examples of each, in a text; drawn for every one.
        characters: longest prompt.
        training: options that replace those of the profile's ``adapters.training``; the gates see as long samples.
    """

    texts: int
    valid_texts: int = 20
    sizes: tuple[int, ...] = (2, 3, 4, 5)
    shots: tuple[int, ...] = (0, 2)
    characters: int = 8000
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(1, texts=self.texts, valid_texts=self.valid_texts, characters=self.characters)
        at_least(2, sizes=min(self.sizes, default=0))
        at_least(0, shots=min(self.shots, default=-1))


@dataclass(frozen=True)
class AblationSettings:
    """What notebook 06 varies; a study whose setting is empty or absent is left out.

    Attributes:
        samples: validation examples of each task that the variants are compared on.
        top_k, temperatures: of the trained gates.
        adapters: models with so many of the tasks' adapters; those of a smaller one are in every larger one.
        added_task: is left out of a model, whose gates are trained, and then added in several ways.
        added_steps: of the training of the added task's gate rows alone.
        modules: name -> last parts of modules' names: models with adapters, or gates, in those alone.
        weights: 0: a token's k adapters have their shares of a softmax over all adapters; more: none where these shares
            together are less, and elsewhere the usual weights.
        weights_tested: one of those above 0, on all test samples and on notebook 04's composites as well.
        told: name -> first decoder layer, and the one behind the last, where the task's own adapter is used; in the others
            the gates choose.
        silent: likewise, layers that have no adapters.
        gates: name -> options that replace those of the profile's ``gates``: trainings that are compared.
        prompts: gates trained on so many examples of each task alone.
        held_out: tasks left out of a model that then meets their prompts.
        foreign: tasks that are none of the profile's, met by the whole model.
        shots: solved examples in composite prompts of the smallest size; ``composite_items`` of them.
        composite_methods: answer the composites of notebook 04 as well.
        formats: training on composite texts.
        seeds: adapters and gates are trained with each, and measured on the test split as in Table 1.
        speed: the whole model's time and memory.
    """

    samples: int
    top_k: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = ()
    adapters: tuple[int, ...] = ()
    added_task: str | None = None
    added_steps: int = 50
    modules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    weights_tested: float | None = None
    told: dict[str, tuple[int, int]] = field(default_factory=dict)
    silent: dict[str, tuple[int, int]] = field(default_factory=dict)
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompts: tuple[int, ...] = ()
    held_out: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    composite_items: int = 20
    composite_methods: tuple[str, ...] = ()
    formats: FormatStudy | None = None
    seeds: tuple[int, ...] = ()
    speed: SpeedStudy | None = None

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, added_steps=self.added_steps, composite_items=self.composite_items)
        at_least(1, top_k=min(self.top_k, default=1), adapters=min(self.adapters, default=1))
        at_least(1, prompts=min(self.prompts, default=1))
        at_least(0, shots=min(self.shots, default=0), seeds=min(self.seeds, default=0))
        for task in self.foreign:
            get_task(task)
        for weight in self.weights:
            if not 0 <= weight < 1:
                raise ValueError(f"weights must be 0 or more and less than 1, not {weight!r}")
        if self.weights_tested is not None and (not self.weights_tested or self.weights_tested not in self.weights):
            raise ValueError(f"weights_tested must be one of weights above 0, not {self.weights_tested!r}")
        for setting in ("told", "silent"):
            for name, (first, behind) in getattr(self, setting).items():
                if not 0 <= first < behind:
                    raise ValueError(
                        f"{setting}[{name!r}] must be a first layer and the one behind the last, not {first}, {behind}"
                    )
        for value in self.temperatures:
            if value <= 0:
                raise ValueError(f"temperatures must be positive, not {value!r}")
