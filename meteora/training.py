"""Training of the gates (paper, section 3.3); base model and adapters stay frozen."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from meteora.attention import one_row_of
from meteora.batches import IGNORE, MIXED, Batch, Sample, by_task, encode
from meteora.checkpoint import check_free_for_checkpoint
from meteora.compiling import compiled_layers, worth_compiling
from meteora.config import GateTrainingConfig
from meteora.gating import gate_cross_entropy
from meteora.layer import MeteoraLinear
from meteora.model import MeteoraModel
from meteora.passes import GateInputs, Passes, gate_inputs, training_passes, weighted_losses
from meteora.sharding import is_sharded
from meteora.training_loop import TrainingRun

logger = logging.getLogger(__name__)

FEW_STEPS = 10  # of a training, after which gates are hardly better than chance
_PIECES = 32  # a GPU's 132 multiprocessors have 5 pieces each of a sum for 576 inputs


def train_gates(
    model: MeteoraModel,
    dataset: Iterable[Mapping],
    config: GateTrainingConfig | None = None,
    *,
    tokenizer,
    output_dir: str | Path | None = None,
) -> list[dict]:
    """Train the gates; base model and adapters stay frozen.

    ``joint`` minimises L_LM + beta * L_gate, L_LM over the responses and L_gate the mean cross-entropy of every gate at
    every token that is no padding, against its task's own adapter (``balance`` says what counts alike in that mean).
    ``gate`` minimises L_gate alone, every gate on its own detached inputs: each is then a logistic regression, whose
    gradient is written down at once, and nothing is kept for a backward pass. The gates choose freely meanwhile, as
    they will in use. Forcing the right adapter gives inputs that are easier to tell apart than those the trained model
    sees: a higher gate accuracy, and fewer right answers.

    Args:
        dataset: rows {prompt, response, task}, task being one of ``model.adapter_names``; or {turns: [such rows]} for
            several tasks in one context, where every token's right adapter is that of its own turn. Each step draws
            ``mixed_per_step`` of these.
        output_dir: where the model is saved at the end; an interrupted call with the same arguments goes on from there.
            If the training fails or is interrupted, the gates are what they were; what was trained is then kept beside or in
            ``output_dir`` alone.

    Returns:
        One row a step: ``step, loss, lm_loss, gate_loss, gate_accuracy``; ``lm_loss`` is NaN under ``gate``, which has
        no use for it. The steps of a second stage (``config.first``) are counted on.
    """
    config = config or GateTrainingConfig()
    if not isinstance(model, MeteoraModel):
        raise ValueError(f"model must be a MeteoraModel, not a {type(model).__name__}; make one with from_adapters.")
    model.require_layers()
    if not isinstance(config, GateTrainingConfig):
        raise ValueError(f"config must be a GateTrainingConfig, not a {type(config).__name__}.")
    if not model.state.enabled:
        raise ValueError("the adapters are disabled, so the gates see nothing; leave disable_adapters() first.")
    if model.state.forced is not None:
        raise ValueError("an adapter is forced, so the gates choose nothing; leave route_to() first.")
    if model.state.trace is not None:
        raise ValueError("a trace would hold every step of the training; leave trace() first.")
    if model.dtype == torch.float16 and any(stage.objective == "joint" for stage in config.stages()):
        logger.warning("in float16 gradients through the model underflow; load the base model in bfloat16 or float32.")
    if output_dir is not None:
        check_free_for_checkpoint(output_dir)
    stages = samples_of_stages(model, dataset, config, tokenizer)  # bad rows are told before anything is trained
    runs: list[TrainingRun] = []
    history: list[dict] = []
    with _as_before_if_it_fails(model):
        _forget_prototypes(model)
        for number, (stage, groups) in enumerate(stages):
            mixed = stage.mixed_per_step
            runs.append(TrainingRun(model, groups, stage, tokenizer, output_dir, mixed_per_step=mixed, stage=number))
            steps = sum(run.steps for run in runs)
            if stage is config and steps < FEW_STEPS and runs[-1].accelerator.is_main_process:
                logger.warning("%d steps are few for gates; set max_steps, to 100, say, or epochs.", steps)
            found = _GateTrainer(model, stage, runs[-1]).train(keep=stage is not config)
            done = len(history)
            history += [{**row, "step": done + row["step"]} for row in found]
    for layer in model.layers.values():
        layer.forget_packed()  # a compiled model does not look whether the gates are others
    model.state.untrained -= {model.adapter_names[task] for _, groups in stages for task in _tasks_of(groups)}
    accelerator = runs[-1].accelerator
    if output_dir is not None and accelerator.is_main_process:
        model.save_pretrained(output_dir)
        for run in runs:
            run.forget_checkpoint()
    accelerator.wait_for_everyone()  # so that every process finds what the main one wrote
    return history


def samples_of_stages(
    model: MeteoraModel, dataset: Iterable[Mapping], config: GateTrainingConfig, tokenizer
) -> list[tuple[GateTrainingConfig, dict[int, list[Sample]]]]:
    """Every stage of a training with its samples, by task; stages of one ``max_length`` share theirs."""
    rows, numbers = list(dataset), {name: n for n, name in enumerate(model.adapter_names)}
    encoded = functools.cache(lambda length: by_task(encode(rows, numbers, tokenizer, length)))
    return [(stage, encoded(stage.max_length)) for stage in config.stages()]


def _tasks_of(groups: Mapping[int, Sequence[Sample]]) -> set[int]:
    """Every task that some token of the samples belongs to."""
    mixed = (set(sample.tasks) for sample in groups.get(MIXED, ()))
    return set(groups).difference({MIXED}).union(*mixed)


@contextmanager
def _as_before_if_it_fails(model: MeteoraModel) -> Iterator[None]:
    """If the block fails, the gates are what they were: the same call then goes on from its kept state."""
    state, layers = model.state, model.layers.values()
    before = state.absolute_logits, set(state.untrained)
    gates = [layer.gate.weight.detach().clone() for layer in layers]
    try:
        yield
    except BaseException:
        state.absolute_logits, state.untrained = before
        with torch.no_grad():
            for layer, gate in zip(layers, gates, strict=True):
                layer.gate.weight.copy_(gate)
                layer.forget_packed()
        raise


@torch.no_grad()
def _forget_prototypes(model: MeteoraModel) -> None:
    """Rows whose sign means nothing (:mod:`meteora.arrow`) are no beginning for a linear gate; it starts at zero."""
    if model.state.absolute_logits:
        model.state.absolute_logits = False
        model.state.untrained = set(model.adapter_names)
        for layer in model.layers.values():
            layer.gate.weight.zero_()


class _GateTrainer:
    """All gates of a model, each with its own gradient in objective ``gate``, through the model in ``joint``."""

    def __init__(self, model: MeteoraModel, config: GateTrainingConfig, run: TrainingRun) -> None:
        self.model, self.config, self.run = model, config, run
        self.gates = [layer.gate.weight for layer in model.layers.values()]
        self.totals = torch.zeros(3, device=run.device)  # of a step: both losses and the gates' accuracy
        self.passes = Passes(run, None, self._pass)

    def train(self, *, keep: bool) -> list[dict]:
        config, model, run = self.config, self.model, self.run
        optimizer = torch.optim.AdamW(self.gates, lr=config.learning_rate, weight_decay=config.weight_decay)
        recomputed = config.objective == "joint" and config.gradient_checkpointing
        # What is recomputed calls its observer in another state, which a graph of either kind would not see.
        compiled = worth_compiling(model, run.device) and not recomputed
        with (
            _trainable(self.gates),
            model.activation_checkpointing(recomputed),
            training_passes(model, run, "train_gates", self._pass, wanted=not recomputed) as self.passes,
            compiled_layers(model, compiled and not self.passes.recorded),
        ):
            return run.loop(optimizer, self.gates, self._step, name=f"gates, {config.objective}", keep=keep)

    def _step(self, batches: Iterable[Batch], drawn: Sequence[Sample]) -> dict:
        config, run = self.config, self.run
        count = sum(sample.turns if config.balance == "turn" else len(sample.ids) for sample in drawn)
        share = 1 / max(1, sum(sample.response_tokens for sample in drawn))  # pieces of text alone may have none
        self.totals.zero_()

        def inputs_of(batch: Batch, places: int | None) -> GateInputs:
            weights = self._token_weights(batch, count)
            if config.objective == "gate":  # which predicts nothing
                batch, places = replace(batch, labels=torch.full_like(batch.labels, IGNORE)), 0
            return gate_inputs(batch, weights, share, places)

        self.passes.run(drawn, batches, inputs_of)
        lm_loss, gate_loss, accuracy = run.sum_over_processes(self.gates, self.totals).tolist()
        nn.utils.clip_grad_norm_(self.gates, config.max_grad_norm)
        if config.objective == "gate":
            return {"loss": gate_loss, "lm_loss": math.nan, "gate_loss": gate_loss, "gate_accuracy": accuracy}
        loss = lm_loss + config.beta * gate_loss
        return {"loss": loss, "lm_loss": lm_loss, "gate_loss": gate_loss, "gate_accuracy": accuracy}

    def _token_weights(self, batch: Batch, count: int) -> Tensor:
        """(B, S): how much a token counts in the step's mean over all gates; 0 at pads, 1 in all over its batches."""
        real = batch.attention_mask.float()
        if self.config.balance == "turn":
            real /= batch.turn_lengths()
        return real * (batch.weight / count / len(self.gates))

    def _pass(self, inputs: GateInputs) -> None:
        """Add this batch's part of the step's losses, of the gates' accuracy, and of their gradients."""
        if self.config.objective == "gate":
            self.totals += _forward_local(self.model, inputs)
        else:
            self.totals += _forward_joint(self.model, inputs, self.config.beta)


class _GateLoss:
    """Called by every layer with its inputs and logits: sums the gates' cross-entropy over one batch.

    With ``local``, its gradient is added to every gate at once, on detached inputs.
    """

    def __init__(self, inputs: GateInputs, *, local: bool) -> None:
        self.weights = weights = inputs.weights.flatten()
        self.labels = inputs.tasks.flatten()
        self.local = local
        # Needs a gradient from the start, as after some layers, so that the first layer is compiled like the others.
        self.loss = torch.zeros((), device=weights.device, requires_grad=not local)
        self.correct = torch.zeros((), device=weights.device)
        self.closed = False

    def __call__(self, layer: MeteoraLinear, x: Tensor, logits: Tensor) -> None:
        device = logits.device  # the layers of one model may lie on several
        labels, weights = self.labels.to(device), self.weights.to(device)
        loss, correct = gate_cross_entropy(logits, labels, weights)
        if self.closed:
            return  # gradient checkpointing runs the layers again, and must find the same operations
        self.loss = self.loss + loss.to(self.loss.device)
        self.correct += correct.to(self.loss.device)
        if self.local:
            error = torch.softmax(logits, dim=-1)  # d loss / d logits = softmax - one-hot
            error[torch.arange(len(error), device=device), labels] -= 1
            layer.gate.weight.grad += _product_over_tokens(error * weights.unsqueeze(-1), x.float())


def _product_over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a (T, m), b (T, n) -> a^T b (m, n), in pieces side by side: one long sum for few results fills no GPU."""
    if torch.compiler.is_compiling():  # a number of tokens that is divided would tie the graph to it
        return a.t() @ b
    size = len(a) // _PIECES
    pieces = [tensor[: size * _PIECES].unflatten(0, (_PIECES, size)) for tensor in (a, b)]
    rest = a[size * _PIECES :].t() @ b[size * _PIECES :]
    return torch.bmm(pieces[0].transpose(1, 2), pieces[1]).sum(0) + rest


def _forward_local(model: MeteoraModel, inputs: GateInputs) -> Tensor:
    loss = _GateLoss(inputs, local=True)
    with torch.no_grad(), _observed(model, loss), one_row_of(inputs.texts, inputs.input_ids) as positions:
        # Without a mask of its own, as in training_loop.place_losses.
        _backbone(model)(input_ids=inputs.input_ids, use_cache=False, **positions)
    return torch.stack([torch.zeros_like(loss.loss), loss.loss, loss.correct])


def _forward_joint(model: MeteoraModel, inputs: GateInputs, beta: float) -> Tensor:
    loss = _GateLoss(inputs, local=False)
    with _observed(model, loss):
        lm_loss = weighted_losses(model, inputs)
        loss.closed = True
        (lm_loss + beta * loss.loss).backward()
    return torch.stack([lm_loss.detach(), loss.loss.detach(), loss.correct])


def _backbone(model: MeteoraModel) -> nn.Module:
    """The decoder without its language-model head, where no adapted layer is lost by leaving that out.

    A sharded model is called as a whole, since it gathers the weights outside its layers when it is called.
    """
    backbone = model.base_model.base_model
    inside = set(backbone.modules())
    complete = all(layer in inside for layer in model.layers.values())
    return backbone if complete and not is_sharded(model.base_model) else model.base_model


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, was_trainable in zip(parameters, before, strict=True):
            parameter.requires_grad_(was_trainable)
            parameter.grad = None


@contextmanager
def _observed(model: MeteoraModel, observer: _GateLoss) -> Iterator[None]:
    model.state.gate_observer = observer
    try:
        yield
    finally:
        model.state.gate_observer = None
