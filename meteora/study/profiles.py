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
from data_prep.prepare import SOURCES
from data_prep.tasks import get_task
from meteora.config import BACKENDS, AdapterTrainingConfig, GateTrainingConfig, TrainingConfig, check_temperature
from meteora.study.ablation_settings import AblationSettings
from meteora.study.checks import at_least, distinct, named, one_of, training_config
from meteora.study.model_settings import DecoderShape, WholeModel

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILES = REPOSITORY / "notebooks" / "profiles"

METHODS = (
    "base", "peft", "meteora_top1", "meteora_top2", "lora_f", "lora_b", "linear", "ties", "dare", "arrow", "xlora",
    "lorahub",
)  # fmt: skip
PROTOCOLS = ("numbered", "guided", "sequential")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
ROUTINGS = ("uniform", "runs")
MODES = ("forward", "backward")
LAUNCHES = ("eager", "graph")


class ProfileError(ValueError):
    """A profile that cannot be used; the message is one sentence with the file, the key and the mend."""


@dataclass(frozen=True)
class ModelSettings:
    """The base model: ``source`` as `data_prep.base_models.load_base_model` takes it; ``device`` auto, cpu or cuda.

    ``shape`` is the model's own, from which a dry run reckons sizes before anything of it is downloaded.
    """

    source: str
    dtype: str = "float32"
    device: str = "auto"
    shape: DecoderShape | None = None

    def __post_init__(self) -> None:
        named(source=self.source)
        one_of(DTYPES, dtype=self.dtype)
        one_of(DEVICES, device=self.device)

    def state(self) -> list[tuple[str, int, int]]:
        """Of a model in a folder each file's name, size and time of change; of another nothing: its name says all."""
        folder = Path(self.source).expanduser()
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


@dataclass(frozen=True)
class DataSettings:
    """At most so many examples of each task in each split; ``None``: all there are.

    Attributes:
        source: ``auto`` (BIG-bench from the package index, the other tasks from the hub), or ``authors``: the paper's
            own prepared data on the hub.
        transcripts: how many contexts that hold training examples of several tasks the gates are shown besides.
        max_characters: leaves out longer examples (prompt and response), which fit no context window.
    """

    source: str = "auto"
    train: int | None = None
    valid: int | None = None
    test: int | None = None
    transcripts: int = 0
    max_characters: int | None = None

    def __post_init__(self) -> None:
        one_of(SOURCES, source=self.source)
        at_least(1, train=self.train, valid=self.valid, test=self.test, max_characters=self.max_characters)
        at_least(0, transcripts=self.transcripts)


@dataclass(frozen=True)
class AdapterSettings:
    """Where adapters come from.

    Attributes:
        source: ``train``, or where they lie: a folder with one PEFT directory per task (for ``adapters``), or one PEFT
            directory or hub id (for ``lora_b``, ``lora_f``). With ``{task}`` in it, such as ``me/llama-{task}``, it is
            the directory or hub id of each task's adapter. Relative paths start at the repository. Trained here,
            ``lora_b`` sees the examples that all adapters together see, ``lora_f`` every training example that there is.
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

    def place(self, task: str) -> str:
        """The directory or hub id of a task's adapter, where ``source`` has ``{task}``."""
        place = self.source.replace("{task}", task)
        return str(REPOSITORY / place) if (REPOSITORY / place).is_dir() else place

    def config(self, seed: int = 0) -> AdapterTrainingConfig:
        """How they are trained; ``seed`` holds unless ``training`` has one."""
        return training_config(AdapterTrainingConfig, "training", self.training, rank=self.rank, alpha=self.alpha, seed=seed)

    def __post_init__(self) -> None:
        named(source=self.source)
        self.config()


@dataclass(frozen=True)
class LorahubSettings:
    """How LoRAHub composes an adapter: from so many training ``examples`` of a task, in so many ``evaluations``."""

    examples: int = 5
    evaluations: int = 40

    def __post_init__(self) -> None:
        at_least(1, examples=self.examples)
        at_least(2, evaluations=self.evaluations)


@dataclass(frozen=True)
class EvaluationSettings:
    """Independent evaluation: ``test_samples`` of each task, at most ``max_new_tokens`` tokens an answer.

    Attributes:
        batch_size: answers at once. Where more of them fit than a task has samples, tasks are answered together.
        tokens_per_batch: most tokens of a batch's prompts, pads included; any number if it is not given.
    """

    methods: tuple[str, ...]
    test_samples: int
    batch_size: int
    max_new_tokens: int
    tokens_per_batch: int | None = None

    def __post_init__(self) -> None:
        distinct(methods=self.methods)
        one_of(METHODS, methods=self.methods)
        at_least(1, test_samples=self.test_samples, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        at_least(1, tokens_per_batch=self.tokens_per_batch)


@dataclass(frozen=True)
class CompositeSettings:
    """Composite evaluation: several tasks' problems in one prompt.

    Attributes:
        sizes: number of tasks -> those tasks, in the prompt's order.
        items: composites of each size.
        sequential_items: of those, in ``sequential``, which takes less time for each; ``None``: as many.
        methods: of which ``peft`` takes part in ``sequential`` alone, where it can be told the task of each problem.
        temperature: number of tasks -> what divides the gates' chosen logits; 1 where none is given.
        zero_shot: of the protocols, those that are run without solved examples as well.
        batch_size: composites that are answered together.
        traced: so many composites of each size are looked at token by token, for the gates' choice at the junctions.
    """

    sizes: dict[int, tuple[str, ...]]
    items: int
    protocols: tuple[str, ...]
    methods: tuple[str, ...]
    temperature: dict[int, float]
    max_new_tokens_per_answer: int
    shots: int = 2
    zero_shot: tuple[str, ...] = ()
    batch_size: int = 8
    traced: int = 4
    sequential_items: int | None = None

    def count(self, protocol: str) -> int:
        """Composites of each size in a protocol."""
        return self.sequential_items or self.items if protocol == "sequential" else self.items

    def __post_init__(self) -> None:
        at_least(1, items=self.items, max_new_tokens_per_answer=self.max_new_tokens_per_answer)
        if self.sequential_items is not None:
            at_least(1, sequential_items=self.sequential_items)
        at_least(1, batch_size=self.batch_size, traced=self.traced)
        at_least(0, shots=self.shots)
        distinct(sizes=tuple(self.sizes), protocols=self.protocols, methods=self.methods)
        one_of(PROTOCOLS, protocols=self.protocols)
        one_of((p for p in self.protocols if p != "sequential"), zero_shot=self.zero_shot)
        one_of(METHODS, methods=self.methods)
        one_of(self.sizes, temperature=tuple(self.temperature))
        for size, tasks in self.sizes.items():
            distinct(**{f"sizes.{size}": tasks})
            if len(tasks) != size:
                raise ValueError(f"sizes.{size} names {len(tasks)} tasks instead of {size}")
        for size, value in self.temperature.items():
            try:
                check_temperature(value)
            except ValueError:
                raise ValueError(f"temperature.{size} must be positive and finite, not {value!r}") from None


@dataclass(frozen=True)
class LayerStudy:
    """What one linear layer's mixture is measured in: every combination of the lists.

    Attributes:
        sizes: (in, out) of the layer.
        tokens, adapters, ranks, top_k: of a call; where there are fewer adapters than ``top_k``, all of them.
        routings: ``uniform``: every token chooses for itself; ``runs``: neighbours agree, as within a task's prompt.
        modes: ``forward``, ``backward``.
        launches: ``eager``, ``graph``; what no CUDA graph can hold is timed eagerly, as everything is on a CPU.
    """

    sizes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...] = (8,)
    top_k: tuple[int, ...] = (2,)
    routings: tuple[str, ...] = ("uniform",)
    modes: tuple[str, ...] = MODES
    launches: tuple[str, ...] = ("eager",)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            distinct(**{f.name: getattr(self, f.name)})
        one_of(ROUTINGS, routings=self.routings)
        one_of(MODES, modes=self.modes)
        one_of(LAUNCHES, launches=self.launches)
        at_least(1, sizes=min(map(min, self.sizes)), tokens=min(self.tokens), adapters=min(self.adapters))
        at_least(1, ranks=min(self.ranks), top_k=min(self.top_k))


@dataclass(frozen=True)
class PromptStudy:
    """The paper's Figure 5: the strategies over the first ``prompts`` test prompts of each task.

    Attributes:
        sizes: (in, out) of the layers that the prompts' tokens run through.
        repeats: passes over the prompts.
    """

    sizes: tuple[tuple[int, int], ...]
    prompts: int
    rank: int = 8
    top_k: int = 2
    routings: tuple[str, ...] = ROUTINGS
    repeats: int = 3

    def __post_init__(self) -> None:
        distinct(sizes=self.sizes, routings=self.routings)
        one_of(ROUTINGS, routings=self.routings)
        at_least(1, sizes=min(map(min, self.sizes)), prompts=self.prompts, rank=self.rank, top_k=self.top_k)
        at_least(1, repeats=self.repeats)


@dataclass(frozen=True)
class BenchmarkSettings:
    """What the backends are timed on.

    Attributes:
        layers: one linear layer, in settings of your choice.
        tasks: the tasks' real prompts.
        model: a whole decoder with random weights.
        repeats: how often a call is timed, at most.
        seconds: how long a call is repeated for at most, three times in any case.
    """

    backends: tuple[str, ...]
    layers: tuple[LayerStudy, ...]
    tasks: PromptStudy
    model: WholeModel | None = None
    dtype: str = "float32"
    repeats: int = 5
    seconds: float = 1.0

    def __post_init__(self) -> None:
        distinct(backends=self.backends, layers=self.layers)
        one_of(BACKENDS, backends=self.backends)
        one_of(DTYPES, dtype=self.dtype)
        at_least(1, repeats=self.repeats)
        at_least(0, seconds=self.seconds)


@dataclass(frozen=True)
class Needs:
    """What a run takes, downloads aside: on what it was measured or reckoned is said in the profile's comments."""

    device: str
    memory_gb: float
    disk_gb: float
    minutes: float
    gpu_memory_gb: float = 0

    def __post_init__(self) -> None:
        at_least(
            0, memory_gb=self.memory_gb, disk_gb=self.disk_gb, minutes=self.minutes, gpu_memory_gb=self.gpu_memory_gb
        )


@dataclass(frozen=True)
class Profile:
    """One run of the study.

    Attributes:
        xlora: how X-LoRA's classifier is trained, where that differs from how the gates are.
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
    xlora: dict[str, Any] = field(default_factory=dict)
    lorahub: LorahubSettings = LorahubSettings()
    ablations: AblationSettings | None = None
    seed: int = 0
    threads: int | None = None
    root: str | None = None
    cache: str | None = None

    def gate_config(self, **changes: Any) -> GateTrainingConfig:
        """How the gates are trained: the fields of ``gates``, with the profile's seed unless they have one.

        What ``gates.first`` does not say is as in ``gates``.
        """
        options = {**self.gates, **changes}
        first = options.pop("first", None)
        if first is not None:
            if not isinstance(first, dict):
                raise ProfileError(f"gates.first must be settings of a training, or null, not {first!r}.")
            options["first"] = training_config(GateTrainingConfig, "gates.first", {**options, **first}, seed=self.seed)
        return training_config(GateTrainingConfig, "gates", options, seed=self.seed)

    def xlora_config(self) -> TrainingConfig:
        """How X-LoRA's classifier is trained: as the gates, at a learning rate of its own, and with ``xlora``."""
        gates = self.gate_config()
        common = {f.name: getattr(gates, f.name) for f in dataclasses.fields(TrainingConfig)}
        return training_config(TrainingConfig, "xlora", {**common, "learning_rate": 1e-3, **self.xlora})

    def to_dict(self) -> dict[str, Any]:
        """Every value, as plain dicts and tuples."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\ ") or self.name.startswith("."):
            raise ValueError(f"name must be a plain word, as it names folders, not {self.name!r}")
        at_least(0, seed=self.seed)
        at_least(1, threads=self.threads)
        distinct(tasks=self.tasks)
        for task in self.tasks:
            get_task(task)
        self.gate_config()
        self.xlora_config()
        for tasks in self.composite.sizes.values():
            one_of(self.tasks, **{"composite.sizes": tasks})
        self._check_samples()
        self._check_ablations()
        for method in ("lora_b", "lora_f"):
            if getattr(self, method) is None and method in self.evaluation.methods + self.composite.methods:
                raise ValueError(f"the methods have {method}, so the profile needs a section {method}")


    def _check_samples(self) -> None:
        """More than the splits have at most are not to be had."""
        composite = self.composite
        tested = {f"composites of protocol {protocol}": composite.count(protocol) for protocol in composite.protocols}
        for split, wanted in (
            ("test", {"evaluation.test_samples": self.evaluation.test_samples, **tested}),
            ("train", {"composite.shots": composite.shots}),
        ):
            there = getattr(self.data, split)
            for name, count in wanted.items():
                if None not in (there, count) and count > there:
                    raise ValueError(f"{name} are {count}, but data.{split} is {there}; make it as many")

    def _check_ablations(self) -> None:
        settings = self.ablations
        if settings is None:
            return
        for options in settings.gates.values():
            self.gate_config(**options)
        one_of(METHODS, **{"ablations.composite_methods": settings.composite_methods})
        some = tuple(task for task in (settings.added_task,) if task)
        one_of(self.tasks, **{"ablations.added_task": some, "ablations.held_out": settings.held_out})
        if len(settings.held_out) > len(self.tasks) - 2:
            raise ValueError("ablations.held_out must leave two tasks at least")
        for name, values in (("adapters", settings.adapters), ("top_k", settings.top_k)):
            if max(values, default=0) > len(self.tasks):
                raise ValueError(f"ablations.{name} must be at most {len(self.tasks)}, the number of tasks")
        if settings.formats is not None:
            dataclasses.replace(self.adapters, training={**self.adapters.training, **settings.formats.training})
            in_composites = {task for tasks in self.composite.sizes.values() for task in tasks}
            if max(settings.formats.sizes) > len(in_composites):
                raise ValueError(f"ablations.formats.sizes must be at most {len(in_composites)}, the composites' tasks")
        if set(settings.foreign) & set(self.tasks):
            raise ValueError("ablations.foreign must name tasks that are none of the profile's")


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
