"""Profiles: one YAML file that sets everything a run of the study can vary, checked before anything starts.

``load_profile("laptop")`` reads ``notebooks/profiles/laptop.yaml``; a path to a file of your own works as well.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UnknownTaskError
from data_prep.tasks import get_task
from meteora.config import BACKENDS, AdapterTrainingConfig, GateTrainingConfig

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILES = REPOSITORY / "notebooks" / "profiles"

METHODS = ("base", "peft", "meteora_top1", "meteora_top2", "lora_f", "lora_b", "linear", "ties")
PROTOCOLS = ("numbered", "guided", "sequential")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


class ProfileError(ValueError):
    """A profile that cannot be used; the message is one sentence with the file, the key and the mend."""


def _at_least(minimum: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, not {value!r}")


def _one_of(known: typing.Iterable, **values: Any) -> None:
    known = tuple(known)
    for name, value in values.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item not in known:
                raise ValueError(f"{name} has no choice {item!r}; known are {', '.join(map(str, known))}")


def _distinct(**values: tuple) -> None:
    for name, value in values.items():
        if not value:
            raise ValueError(f"{name} must name at least one")
        if len(set(value)) < len(value):
            raise ValueError(f"{name} names one twice: {', '.join(map(str, value))}")


def _training(cls: type, key: str, options: dict[str, Any], **common: Any) -> Any:
    """``cls(**common, **options)``, with an unknown option named instead of a TypeError."""
    known = [f.name for f in dataclasses.fields(cls) if f.name not in common or f.name == "seed"]
    for option in options:
        if option not in known:
            raise ValueError(f"{key} has no option {option!r}; known are {', '.join(known)}")
    return cls(**{**common, **options})


@dataclass(frozen=True)
class ModelSettings:
    """The base model: ``source`` as `data_prep.base_models.load_base_model` takes it; ``device`` auto, cpu or cuda."""

    source: str
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        _one_of(DTYPES, dtype=self.dtype)
        _one_of(DEVICES, device=self.device)


@dataclass(frozen=True)
class DataSettings:
    """At most so many examples of each task in each split; ``None``: all there are.

    Attributes:
        transcripts: how many contexts that hold training examples of several tasks the gates are shown besides.
    """

    train: int | None = None
    valid: int | None = None
    test: int | None = None
    transcripts: int = 0

    def __post_init__(self) -> None:
        _at_least(1, train=self.train, valid=self.valid, test=self.test)
        _at_least(0, transcripts=self.transcripts)


@dataclass(frozen=True)
class AdapterSettings:
    """Where adapters come from.

    Attributes:
        source: ``train``, or where they lie: a folder with one PEFT directory per task (for ``adapters``), or one PEFT
            directory (for ``lora_b``, ``lora_f``). Relative paths start at the repository.
        rank, alpha: of adapters that are trained.
        training: further fields of `meteora.AdapterTrainingConfig`.
    """

    source: str
    rank: int = 8
    alpha: float = 16.0
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The folder ``source`` names, or ``None`` if the adapters are to be trained."""
        return None if self.source == "train" else REPOSITORY / Path(self.source).expanduser()

    def config(self, seed: int = 0) -> AdapterTrainingConfig:
        """How they are trained; ``seed`` holds unless ``training`` has one."""
        return _training(AdapterTrainingConfig, "training", self.training, rank=self.rank, alpha=self.alpha, seed=seed)

    def __post_init__(self) -> None:
        self.config()


@dataclass(frozen=True)
class EvaluationSettings:
    """Independent evaluation: ``test_samples`` of each task, at most ``max_new_tokens`` tokens an answer."""

    methods: tuple[str, ...]
    test_samples: int
    batch_size: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        _distinct(methods=self.methods)
        _one_of(METHODS, methods=self.methods)
        _at_least(1, test_samples=self.test_samples, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class CompositeSettings:
    """Composite evaluation: several tasks' problems in one prompt.

    Attributes:
        sizes: number of tasks -> those tasks, in the prompt's order.
        items: composites of each size.
        methods: of which ``peft`` takes part in ``sequential`` alone, where it can be told the task of each problem.
        temperature: number of tasks -> what divides the gates' chosen logits; 1 where none is given.
        batch_size: composites that are answered together.
    """

    sizes: dict[int, tuple[str, ...]]
    items: int
    protocols: tuple[str, ...]
    methods: tuple[str, ...]
    temperature: dict[int, float]
    max_new_tokens_per_answer: int
    shots: int = 2
    batch_size: int = 8

    def __post_init__(self) -> None:
        _at_least(1, items=self.items, max_new_tokens_per_answer=self.max_new_tokens_per_answer)
        _at_least(1, batch_size=self.batch_size)
        _at_least(0, shots=self.shots)
        _distinct(sizes=tuple(self.sizes), protocols=self.protocols, methods=self.methods)
        _one_of(PROTOCOLS, protocols=self.protocols)
        _one_of(METHODS, methods=self.methods)
        _one_of(self.sizes, temperature=tuple(self.temperature))
        for size, tasks in self.sizes.items():
            _distinct(**{f"sizes.{size}": tasks})
            if len(tasks) != size:
                raise ValueError(f"sizes.{size} names {len(tasks)} tasks instead of {size}")
        for size, value in self.temperature.items():
            if value <= 0:
                raise ValueError(f"temperature.{size} must be positive, not {value!r}")


@dataclass(frozen=True)
class BenchmarkSettings:
    """What the backends are timed on: every combination of the lists, for linear layers (in, out) of ``layers``."""

    backends: tuple[str, ...]
    tokens: tuple[int, ...]
    adapters: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    rank: int = 8
    top_k: int = 2
    dtype: str = "float32"
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("backends", "tokens", "adapters", "layers"):
            _distinct(**{name: getattr(self, name)})
        _one_of(BACKENDS, backends=self.backends)
        _one_of(DTYPES, dtype=self.dtype)
        _at_least(1, tokens=min(self.tokens), adapters=min(self.adapters), layers=min(map(min, self.layers)))
        _at_least(1, rank=self.rank, top_k=self.top_k, repeats=self.repeats)


@dataclass(frozen=True)
class Needs:
    """What a run takes, downloads aside: on what it was measured or reckoned is said in the profile's comments."""

    device: str
    memory_gb: float
    disk_gb: float
    minutes: float
    gpu_memory_gb: float = 0


@dataclass(frozen=True)
class Profile:
    """One run of the study.

    Attributes:
        root: where artifacts/ and results/ go (default: the repository).
        cache: where downloads are kept (default: ~/.cache/meteora).
    """

    name: str
    description: str
    model: ModelSettings
    tasks: tuple[str, ...]
    data: DataSettings
    adapters: AdapterSettings
    gates: dict[str, Any]
    evaluation: EvaluationSettings
    composite: CompositeSettings
    benchmark: BenchmarkSettings
    needs: Needs
    lora_b: AdapterSettings | None = None
    lora_f: AdapterSettings | None = None
    seed: int = 0
    threads: int | None = None
    root: str | None = None
    cache: str | None = None

    def gate_config(self) -> GateTrainingConfig:
        """How the gates are trained: the fields of ``gates``, with the profile's seed unless they have one."""
        return _training(GateTrainingConfig, "gates", self.gates, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Every value, as plain dicts and tuples."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\ ") or self.name.startswith("."):
            raise ValueError(f"name must be a plain word, as it names folders, not {self.name!r}")
        _at_least(0, seed=self.seed)
        _at_least(1, threads=self.threads)
        _distinct(tasks=self.tasks)
        for task in self.tasks:
            get_task(task)
        self.gate_config()
        for tasks in self.composite.sizes.values():
            _one_of(self.tasks, **{"composite.sizes": tasks})
        for method in ("lora_b", "lora_f"):
            if getattr(self, method) is None and method in self.evaluation.methods + self.composite.methods:
                raise ValueError(f"the methods have {method}, so the profile needs a section {method}")


def profile_names() -> list[str]:
    """The profiles that come with the repository."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile of that name, or in that YAML file.

    Raises:
        ProfileError: if there is none, or a key or value in it is wrong.
    """
    text = str(name_or_path)
    path = Path(text).expanduser() if text.endswith((".yaml", ".yml")) else PROFILES / f"{text}.yaml"
    if not path.is_file():
        raise ProfileError(
            f"there is no profile {text!r}; choose one of {', '.join(profile_names())}, or give a path to a .yaml file."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _build(Profile, values, "")
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (ValueError, UnknownTaskError) as error:
        raise ProfileError(f"{path.name}: {str(error).rstrip('.')}.") from error


def _build(cls: type, values: Any, key: str) -> Any:
    """An instance of dataclass ``cls`` from a mapping that was read from YAML; ``key`` is its dotted name there."""
    if not isinstance(values, dict):
        raise ValueError(f"{key or 'a profile'} must be a mapping of names to values, not {values!r}")
    fields, prefix = {f.name: f for f in dataclasses.fields(cls)}, f"{key}." if key else ""
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown key {prefix}{name}; known are {', '.join(fields)}")
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"key {prefix}{name} is missing")
    hints = typing.get_type_hints(cls)
    arguments = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the type a field is annotated with; lists become tuples, whole numbers pass for floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(arguments[0], value, key)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key} must be a list, not {value!r}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{key} must have {len(kinds)} entries, not {len(value)}")
        return tuple(_convert(kind, item, key) for kind, item in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be a mapping of names to values, not {value!r}")
        return {_convert(arguments[0], k, key): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else hint):
        kind = {int: "a whole number", float: "a number", str: "a text"}[hint]
        raise ValueError(f"{key} must be {kind}, not {value!r}")
    return hint(value)
