"""What can be set: how a model mixes its adapters, and how gates and adapters are trained."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real

BACKENDS = ("auto", "loop", "bmm", "dense", "triton")
OBJECTIVES = ("joint", "gate")
BALANCES = ("token", "turn")


def check_temperature(temperature: float) -> float:
    """Return ``temperature`` as a float, or raise ``ValueError``: a softmax needs a positive, finite one."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real):  # numpy's numbers are of these, too
        raise ValueError(f"temperature must be a number, not {temperature!r}.")
    if not (math.isfinite(temperature) and temperature > 1e-30):  # float32 logits would overflow
        raise ValueError(f"temperature must be positive and finite (and above 1e-30), not {temperature!r}.")
    return float(temperature)


def check_top_k(top_k: int, num_adapters: int) -> int:
    """Return ``top_k`` as an int, or raise ``ValueError`` unless it is a whole number in 1..``num_adapters``."""
    top_k = _check_count("top_k", top_k)
    if top_k > num_adapters:
        raise ValueError(f"top_k={top_k} is more than the {num_adapters} adapters there are; choose 1..{num_adapters}.")
    return top_k


def check_least_share(share: float) -> float:
    """Return ``share`` as a float, or raise ``ValueError`` unless it is at least 0 and less than 1."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share < 1:
        raise ValueError(f"least_share must be a number of at least 0 and less than 1, not {share!r}.")
    return float(share)


def check_backend(backend: str) -> str:
    """Return ``backend``, or raise ``ValueError`` naming the backends there are."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    return backend


def _check_count(name: str, value: int, minimum: int = 1) -> int:
    """Return ``value``, of whatever integer type it is, as an int."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if isinstance(value, bool) or count is None or count < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, not {value!r}.")
    return count


def _check_rate(name: str, value: float, *, low: float = 0.0, high: float = math.inf) -> float:
    """Return ``value`` as a number of Python's; an int stays one, as it is part of what a kept training is known by."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise ValueError(f"{name} must be a number of {low} to {high}, not {value!r}.")
    return value if isinstance(value, (int, float)) else float(value)


@dataclass
class MeteoraConfig:
    """How the gates choose and mix (paper, section 3).

    Args:
        top_k: adapters mixed per token and layer; ``None`` means min(2, number of adapters).
        temperature: divides the chosen logits before their softmax (paper: 1, and 15/20/30 for composite-3/5/10).
        backend: ``loop``, ``bmm``, ``dense``, ``triton``, or ``auto`` for the fastest there is on the device.
        absolute_logits: choose by the logits' absolute values, as training-free gates must (:mod:`meteora.arrow`).
        least_share: of a softmax over *all* adapters, at temperature 1, that the chosen must have together; a token whose
            gate is less sure gets no adapter in that layer (not in the paper). 0: it always gets them.
    """

    top_k: int | None = None
    temperature: float = 1.0
    backend: str = "auto"
    absolute_logits: bool = False
    least_share: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k is not None:
            self.top_k = _check_count("top_k", self.top_k)
        self.temperature = check_temperature(self.temperature)
        check_backend(self.backend)
        if not isinstance(self.absolute_logits, bool):
            raise ValueError(f"absolute_logits must be True or False, not {self.absolute_logits!r}.")
        self.least_share = check_least_share(self.least_share)


@dataclass
class TrainingConfig:
    """What training gates and training adapters have in common.

    Args:
        epochs: passes over the data, unless ``max_steps`` says otherwise.
        max_steps: optimiser steps; overrides ``epochs``.
        samples_per_step: samples of *each* task in one optimiser step, so that every step is balanced.
        tokens_per_batch: the padded tokens that one forward pass may hold; a step is cut into as many micro-batches as
            that needs. Changes memory and speed, not the result.
        max_length: tokens; longer samples lose the *beginning* of their prompt, and only then the end of the response.
        learning_rate: peak, reached after ``warmup`` (a share of the steps), then a cosine to zero.
        max_grad_norm: clips the gradient's norm (each adapter's own when adapters are trained).
        seed: of the shuffling and of the fresh weights.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    samples_per_step: int = 4
    tokens_per_batch: int = 2048
    max_length: int = 1024
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.epochs = _check_rate("epochs", self.epochs, high=1e6)
        if self.max_steps is not None:
            self.max_steps = _check_count("max_steps", self.max_steps)
        self.samples_per_step = _check_count("samples_per_step", self.samples_per_step)
        self.tokens_per_batch = _check_count("tokens_per_batch", self.tokens_per_batch)
        self.max_length = _check_count("max_length", self.max_length, minimum=2)
        self.seed = _check_count("seed", self.seed, minimum=0)
        self.max_grad_norm = _check_rate("max_grad_norm", self.max_grad_norm)
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm=0 would train nothing; give float('inf') for gradients as they are.")
        for name in ("learning_rate", "weight_decay"):
            setattr(self, name, _check_rate(name, getattr(self, name), high=1e6))
        self.warmup = _check_rate("warmup", self.warmup, high=1.0)

    def steps(self, most: int) -> int:
        """Optimiser steps, where the task with the most samples has ``most``."""
        return self.max_steps or max(1, math.ceil(self.epochs * most / self.samples_per_step))


@dataclass
class GateTrainingConfig(TrainingConfig):
    """How the gates are trained; base model and adapters stay frozen.

    Args:
        objective: ``joint`` minimises L_LM + beta * L_gate through the whole model (the paper's); ``gate`` minimises
            every gate's own cross-entropy on detached inputs: no backward pass through the base model, and memory of
            a forward pass.
        beta: weight of the gate cross-entropy in ``joint``. The authors' code ends at 50.
        balance: what counts alike in the gate cross-entropy: every ``token`` (the paper's, in which tasks with long
            prompts prevail), or every ``turn``: a prompt and its response (`batches.Sample.turns`).
        mixed_per_step: rows of several tasks in one step; ``None``: as many as of each task.
        gradient_checkpointing: recompute activations in ``joint``'s backward pass; has no effect on ``gate``.
        first: a training that comes before this one, which goes on with its gates. ``gate`` and then some steps of
            ``joint`` take a fraction of the time of ``joint`` alone.
    """

    objective: str = "joint"
    beta: float = 1.0
    balance: str = "token"
    mixed_per_step: int | None = None
    gradient_checkpointing: bool = False
    first: GateTrainingConfig | None = None

    def stages(self) -> list[GateTrainingConfig]:
        """The trainings one after another, of which this is the last."""
        return [*(self.first.stages() if self.first is not None else ()), self]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.first, GateTrainingConfig | None):
            raise ValueError(f"first must be another GateTrainingConfig or None, not {self.first!r}.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; choose one of {', '.join(OBJECTIVES)}.")
        if self.balance not in BALANCES:
            raise ValueError(f"unknown balance {self.balance!r}; choose one of {', '.join(BALANCES)}.")
        if self.mixed_per_step is not None:
            self.mixed_per_step = _check_count("mixed_per_step", self.mixed_per_step)
        self.beta = _check_rate("beta", self.beta, high=1e6)


@dataclass
class AdapterTrainingConfig(TrainingConfig):
    """How adapters are trained, all tasks' in one pass over one frozen base model.

    Args:
        rank, alpha: of every adapter; its update is scaled by alpha / rank.
        target_modules: the last part of the names of the linear layers to adapt (the paper: all seven of a block).
        evaluate_every: steps between two evaluations of the validation loss, when validation data is given; every
            adapter then keeps its own best weights.
        dtype: of the written adapter files.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    evaluate_every: int = 50
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank = _check_count("rank", self.rank)
        self.evaluate_every = _check_count("evaluate_every", self.evaluate_every)
        self.alpha = _check_rate("alpha", self.alpha, low=1e-6, high=1e6)
        if not self.target_modules or isinstance(self.target_modules, str):
            raise ValueError("target_modules must list at least one linear layer, such as ('q_proj', 'v_proj').")
        self.target_modules = tuple(self.target_modules)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype!r}.")
