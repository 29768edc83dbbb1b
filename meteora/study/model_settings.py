"""What a whole decoder with random weights is timed on: a profile's section ``benchmark.model``."""

from __future__ import annotations

from dataclasses import dataclass, fields

from meteora.config import BACKENDS
from meteora.study.checks import at_least, distinct, one_of

MODES = ("prefill", "decode")
LAUNCHES = ("eager", "graph")


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a Llama's configuration, by the names that they have there."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def __post_init__(self) -> None:
        for f in fields(self):
            at_least(1, **{f.name: getattr(self, f.name)})
        for name, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, name) % getattr(self, part):
                raise ValueError(f"{name} must be a multiple of {part}, not {getattr(self, name)}")


@dataclass(frozen=True)
class ModelStudy:
    """Every combination of the lists, each for the bounds and for ``backends``.

    Attributes:
        mode: ``prefill``: prompts at once, up to each one's first new token; ``decode``: one more token each.
        batch: prompts.
        tokens: of each: the prompt's, or in ``decode`` the context's with the new token.
        launches: ``eager``, ``graph``; what no CUDA graph can hold is timed eagerly, as everything is on a CPU.
    """

    mode: str
    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    backends: tuple[str, ...]
    launches: tuple[str, ...] = ("eager",)

    def __post_init__(self) -> None:
        one_of(MODES, mode=self.mode)
        distinct(batch=self.batch, tokens=self.tokens, backends=self.backends, launches=self.launches)
        one_of(BACKENDS, backends=self.backends)
        one_of(LAUNCHES, launches=self.launches)
        at_least(1, batch=min(self.batch))
        at_least(2, tokens=min(self.tokens))


@dataclass(frozen=True)
class TrainingSpeed:
    """What the training of the gates is timed on: samples of one length, as many of each adapter's task in a step.

    Attributes:
        prompt_tokens, response_tokens: of each sample.
        samples_per_step, tokens_per_batch: as in `meteora.GateTrainingConfig`.
        steps: that are timed, after one that is not.
    """

    prompt_tokens: int
    response_tokens: int
    samples_per_step: int = 1
    tokens_per_batch: int = 8192
    steps: int = 4

    def __post_init__(self) -> None:
        for f in fields(self):
            at_least(1, **{f.name: getattr(self, f.name)})


@dataclass(frozen=True)
class WholeModel:
    """A decoder of that shape with random weights and random adapters; its ``training`` is no part of the benchmark.

    Attributes:
        adapters, rank, top_k: of every linear layer of a decoder block, all seven.
        repeats, seconds: how often a call is timed, at most, and for how long, three times in any case.
    """

    shape: DecoderShape
    studies: tuple[ModelStudy, ...]
    training: TrainingSpeed | None = None
    adapters: int = 28
    rank: int = 8
    top_k: int = 2
    repeats: int = 10
    seconds: float = 1.0

    def __post_init__(self) -> None:
        distinct(studies=self.studies)
        at_least(1, adapters=self.adapters, rank=self.rank, top_k=self.top_k, repeats=self.repeats)
        at_least(0, seconds=self.seconds)
        if self.top_k > self.adapters:
            raise ValueError(f"top_k must be at most {self.adapters}, the number of adapters, not {self.top_k}")
