"""The passes of a training's steps: over batches as they come, or, on a GPU, recorded over batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from meteora.batches import Batch, Sample, response_places
from meteora.fixed_batches import fixed_batches
from meteora.recording import Recordings, can_be_recorded, without_masks
from meteora.training_loop import TrainingRun, place_losses


@dataclass(frozen=True)
class PassInputs:
    """What one pass over a batch of B rows and S tokens reads: its response tokens to predict stand behind P places.

    Attributes:
        input_ids: (B, S).
        places: (P,), indices into the B * S tokens; behind each the token of ``targets`` (P,) is to be predicted.
        shares: (P,) or (N, P) float32, how much a place counts in the loss, or in each adapter's.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor
    shares: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, S, P)."""
        return *self.input_ids.shape, len(self.places)

    def to(self, device: torch.device) -> PassInputs:
        """A copy on ``device``."""
        return replace(self, **{field.name: getattr(self, field.name).to(device, copy=True) for field in fields(self)})

    def fill(self, inputs: PassInputs) -> None:
        """Take over what has the same shape and is on the CPU. Nobody waits for a GPU's copies."""
        for field in fields(self):
            mine, other = getattr(self, field.name), getattr(inputs, field.name)
            mine.copy_(other.pin_memory() if mine.is_cuda else other, non_blocking=True)

    def without_effect(self) -> PassInputs:
        """The same work, of which nothing counts."""
        return replace(self, shares=torch.zeros_like(self.shares))


@dataclass(frozen=True)
class AdapterInputs(PassInputs):
    """Of N adapters in training: ``shares`` (N, P), ``own`` (B, N) float32, 1 at a row's adapter, else 0."""

    own: Tensor


@dataclass(frozen=True)
class GateInputs(PassInputs):
    """Of gates in training: ``shares`` (P,), ``tasks`` (B, S), ``weights`` (B, S) float32 of each token's choice."""

    tasks: Tensor
    weights: Tensor

    def without_effect(self) -> GateInputs:
        return replace(super().without_effect(), weights=torch.zeros_like(self.weights))


def weighted_losses(model: nn.Module, inputs: PassInputs) -> Tensor:
    """The loss () or each adapter's (N,): the cross-entropies at all places, as much of them as counts."""
    return inputs.shares @ place_losses(model, inputs.input_ids, inputs.places, inputs.targets)


def response_inputs(batch: Batch, share: float, places: int | None = None) -> PassInputs:
    """Every response token counts ``share``.

    Args:
        places: P, of which those that are not needed count for nothing; ``None``: as many as are needed.
    """
    needed, targets = response_places(batch.labels)
    unused = 0 if places is None else places - len(needed)
    # Places all over the batch: a GPU adds up the gradients of one and the same place one after the other.
    others = torch.arange(unused, device=needed.device) % batch.labels.numel()
    shares = torch.full(needed.shape, share * batch.weight, device=needed.device)
    pad = torch.nn.functional.pad
    return PassInputs(batch.input_ids, torch.cat([needed, others]), pad(targets, (0, unused)), pad(shares, (0, unused)))


def adapter_inputs(
    batch: Batch, responses: Mapping[int, int], adapters: int, places: int | None = None
) -> AdapterInputs:
    """A token counts as one of its adapter's ``responses``: the losses of all batches add up to the mean."""
    inputs = response_inputs(batch, 1.0, places)
    device, rows = batch.input_ids.device, range(len(batch.tasks))  # there may be more, without a sample
    own = torch.zeros(len(batch.input_ids), adapters, device=device)
    own[rows, batch.tasks] = 1
    count = torch.tensor([responses.get(n, 1) for n in range(adapters)], device=device)
    shares = (own / count)[inputs.places // batch.input_ids.shape[1]].t() * inputs.shares
    return AdapterInputs(batch.input_ids, inputs.places, inputs.targets, shares, own)


def gate_inputs(batch: Batch, weights: Tensor, share: float, places: int | None = None) -> GateInputs:
    """Every response token counts ``share``, every choice as ``weights`` (B, S) say."""
    inputs = response_inputs(batch, share, places)
    return GateInputs(
        batch.input_ids, inputs.places, inputs.targets, inputs.shares, tasks=batch.token_tasks, weights=weights
    )


class Passes:
    """Passes over the samples of a step.

    Args:
        recordings: of passes over batches of few shapes, each on the same memory whenever its shape comes; ``None``:
            the passes are over the batches that the step is given.
        one_pass: of some inputs, and of what else ``run`` is given, which has few values. It adds to gradients and sums
            that stay where they are.
    """

    def __init__(self, run: TrainingRun, recordings: Recordings | None, one_pass: Callable[..., None]) -> None:
        self._run, self._recordings, self._pass = run, recordings, one_pass
        self._inputs: dict[tuple, PassInputs] = {}  # by shape

    @property
    def recorded(self) -> bool:
        """Whether passes are recorded, unless that turns out to be impossible.

        Compiling their layers as well is not worth it: what the kernels save in a few hundred steps is about the time
        that compiling takes.
        """
        return self._recordings is not None

    def run(
        self,
        samples: Sequence[Sample],
        batches: Iterable[Batch],
        inputs_of: Callable[[Batch, int | None], PassInputs],
        *options: Hashable,
    ) -> None:
        """``batches`` are of the ``samples``, as far as this process has them."""
        if self._recordings is None:
            for batch in batches:
                self._pass(inputs_of(batch, None), *options)
            return
        config = self._run.config
        for batch, places in fixed_batches(samples, config.tokens_per_batch, config.max_length, self._run.pad_id):
            self._run_recorded(inputs_of(batch, places), options)

    def _run_recorded(self, inputs: PassInputs, options: tuple[Hashable, ...]) -> None:
        mine = self._inputs.get(inputs.shape)
        if mine is None:
            mine = self._inputs[inputs.shape] = inputs.to(self._run.device)
        else:
            mine.fill(inputs)
        self._recordings.run(
            (*inputs.shape, *options),
            lambda: self._pass(mine, *options),
            rehearsal=lambda: self._pass(mine.without_effect(), *options),
        )


@contextmanager
def training_passes(
    model: nn.Module, run: TrainingRun, name: str, one_pass: Callable[..., None], *, wanted: bool = True
) -> Iterator[Passes]:
    """Passes of a training, recorded if that is ``wanted`` and may be possible.

    Args:
        name: of the training, for the log.
    """
    recorded = wanted and run.accelerator.num_processes == 1 and can_be_recorded(model, run.device)
    recordings = Recordings(run.device, f"a pass of {name}") if recorded else nullcontext()
    with without_masks(model, recorded), recordings as made:
        yield Passes(run, made, one_pass)
