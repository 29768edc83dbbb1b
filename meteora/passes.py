"""The passes of a training's steps: over batches as they come, or, on a GPU, recorded over rows of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from meteora.attention import algorithms_as_before, takes_texts_in_a_row, without_masks
from meteora.batches import Batch, Sample, Texts, response_places
from meteora.packed_batches import packed_batches
from meteora.recording import Recordings, can_be_recorded
from meteora.training_loop import TrainingRun, place_losses


@dataclass(frozen=True)
class PassInputs:
    """What one pass over a batch of B rows and S tokens reads: its response tokens to predict stand behind P places.

    Attributes:
        input_ids: (B, S).
        places: (P,), indices into the B * S tokens; behind each the token of ``targets`` (P,) is to be predicted.
        shares: (P,) or (N, P) float32, how much a place counts in the loss, or in each adapter's.
        bounds: (M + 1,), of the M ``texts`` that share the one row; ``None`` where every row is a text.
        longest: see `batches.Texts`; the same in all passes of a training.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor
    shares: Tensor
    bounds: Tensor | None
    longest: int

    @property
    def texts(self) -> Texts | None:
        return None if self.bounds is None else Texts(self.bounds, self.longest)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, S, P), and M if there is one."""
        shape = *self.input_ids.shape, len(self.places)
        return shape if self.bounds is None else (*shape, len(self.bounds) - 1)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> PassInputs:
        """A copy on ``device``."""
        return replace(self, **{name: tensor.to(device, copy=True) for name, tensor in self._tensors().items()})

    def fill(self, inputs: PassInputs) -> None:
        """Take over what has the same shape and is on the CPU. Nobody waits for a GPU's copies."""
        others = inputs._tensors()
        for name, mine in self._tensors().items():
            mine.copy_(others[name].pin_memory() if mine.is_cuda else others[name], non_blocking=True)

    def without_effect(self) -> PassInputs:
        """The same work, of which nothing counts."""
        return replace(self, shares=torch.zeros_like(self.shares))


@dataclass(frozen=True)
class AdapterInputs(PassInputs):
    """Of N adapters in training: ``shares`` (N, P), and the adapter ``own`` (B, S) of every token, -1 for none."""

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
    losses = place_losses(model, inputs.input_ids, inputs.places, inputs.targets, inputs.texts)
    # No product of matrices: autocast would round it, and where a loss is NaN, all adapters' would be.
    return torch.where(inputs.shares != 0, inputs.shares * losses, 0.0).sum(-1)


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
    bounds, longest = batch.texts or (None, 0)
    places = torch.cat([needed, others])
    return PassInputs(batch.input_ids, places, pad(targets, (0, unused)), pad(shares, (0, unused)), bounds, longest)


def adapter_inputs(
    batch: Batch, responses: Mapping[int, int], adapters: int, places: int | None = None
) -> AdapterInputs:
    """A token counts as one of its adapter's ``responses``: the losses of all batches add up to the mean."""
    inputs = response_inputs(batch, 1.0, places)
    own = batch.token_tasks.masked_fill(batch.attention_mask == 0, -1)
    numbers = torch.arange(adapters, device=own.device).unsqueeze(1)
    count = torch.tensor([responses.get(n, 1) for n in range(adapters)], device=own.device).unsqueeze(1)
    shares = (own.flatten()[inputs.places] == numbers) / count * inputs.shares
    return AdapterInputs(**vars(replace(inputs, shares=shares)), own=own)


def gate_inputs(batch: Batch, weights: Tensor, share: float, places: int | None = None) -> GateInputs:
    """Every response token counts ``share``, every choice as ``weights`` (B, S) say."""
    inputs = response_inputs(batch, share, places)
    return GateInputs(**vars(inputs), tasks=batch.token_tasks, weights=weights)


class Passes:
    """Passes over the samples of a step.

    Args:
        recordings: of passes over rows of few shapes, each on the same memory whenever its shape comes; ``None``: the
            passes are over the batches that the step is given.
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
        run = self._run
        for batch, places in packed_batches(samples, run.config.tokens_per_batch, run.longest, run.pad_id):
            self._run_recorded(inputs_of(batch, places), options)

    def _run_recorded(self, inputs: PassInputs, options: tuple[Hashable, ...]) -> None:
        mine = self._inputs.get(inputs.shape)
        if mine is None:
            mine = self._inputs[inputs.shape] = inputs.to(self._run.device)
        else:
            mine.fill(inputs)
        self._recordings.run(
            (*inputs.shape, *options),
            lambda: self._whole_pass(mine, options),
            rehearsal=lambda: self._whole_pass(mine.without_effect(), options),
        )

    def _whole_pass(self, inputs: PassInputs, options: tuple[Hashable, ...]) -> None:
        with algorithms_as_before():
            self._pass(inputs, *options)


@contextmanager
def training_passes(
    model: nn.Module, run: TrainingRun, name: str, one_pass: Callable[..., None], *, wanted: bool = True
) -> Iterator[Passes]:
    """Passes of a training, recorded if that is ``wanted`` and may be possible.

    Args:
        name: of the training, for the log.
    """
    alone = run.accelerator.num_processes == 1
    recorded = wanted and alone and can_be_recorded(model, run.device) and takes_texts_in_a_row(model, run.device)
    recordings = Recordings(run.device, f"a pass of {name}") if recorded else nullcontext()
    with without_masks(model, recorded), recordings as made:
        yield Passes(run, made, one_pass)
