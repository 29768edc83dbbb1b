"""Training of the gates (paper, section 3.3); base model and adapters stay frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from meteora.batches import Batch, Sample, by_task, encode
from meteora.checkpoint import check_free_for_checkpoint
from meteora.compiling import compiled_layers, worth_compiling
from meteora.config import GateTrainingConfig
from meteora.gating import gate_cross_entropy
from meteora.layer import MeteoraLinear
from meteora.model import MeteoraModel
from meteora.sharding import is_sharded
from meteora.training_loop import TrainingRun, response_losses


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

    Returns:
        One row a step: ``step, loss, lm_loss, gate_loss, gate_accuracy``; ``lm_loss`` is NaN under ``gate``, which has
        no use for it.
    """
    config = config or GateTrainingConfig()
    if output_dir is not None:
        check_free_for_checkpoint(output_dir)
    samples = encode(dataset, {n: i for i, n in enumerate(model.adapter_names)}, tokenizer, config.max_length)
    _forget_prototypes(model)
    run = TrainingRun(
        model, by_task(samples), config, tokenizer, output_dir, mixed_per_step=config.mixed_per_step
    )
    gates = [layer.gate.weight for layer in model.layers.values()]
    optimizer = torch.optim.AdamW(gates, lr=config.learning_rate, weight_decay=config.weight_decay)
    forward = _forward_local if config.objective == "gate" else _forward_joint

    def step(batches: Iterable[Batch], drawn: Sequence[Sample]) -> dict:
        tokens = sum(len(sample.ids) for sample in drawn)
        responses = sum(sample.response_tokens for sample in drawn)
        totals = torch.zeros(3, device=run.device)
        for batch in batches:
            weights = _token_weights(batch, config, tokens, len(drawn)) / len(gates)
            totals += forward(model, batch, config, weights, responses)
        lm_loss, gate_loss, accuracy = run.sum_over_processes(gates, totals).tolist()
        nn.utils.clip_grad_norm_(gates, config.max_grad_norm)
        if config.objective == "gate":
            return {"loss": gate_loss, "lm_loss": math.nan, "gate_loss": gate_loss, "gate_accuracy": accuracy}
        loss = lm_loss + config.beta * gate_loss
        return {"loss": loss, "lm_loss": lm_loss, "gate_loss": gate_loss, "gate_accuracy": accuracy}

    recomputed = config.objective == "joint" and config.gradient_checkpointing
    # What is recomputed calls its observer in another state, which is another graph.
    compiled = worth_compiling(model, run.device) and not recomputed
    with _trainable(gates), _checkpointing(model, recomputed), compiled_layers(model, compiled):
        history = run.loop(optimizer, gates, step, name="gates")
    model.state.warning = None
    if output_dir is not None and run.accelerator.is_main_process:
        model.save_pretrained(output_dir)
        run.forget_checkpoint()
    run.accelerator.wait_for_everyone()  # so that every process finds what the main one wrote
    return history


@torch.no_grad()
def _forget_prototypes(model: MeteoraModel) -> None:
    """Rows whose sign means nothing (:mod:`meteora.arrow`) are no beginning for a linear gate; it starts at zero."""
    if model.state.absolute_logits:
        model.state.absolute_logits = False
        for layer in model.layers.values():
            layer.gate.weight.zero_()


def _token_weights(batch: Batch, config: GateTrainingConfig, tokens: int, samples: int) -> Tensor:
    """(B, S): how much each token counts in the step's mean; 0 at pads, 1 in all over the step's batches."""
    real = batch.attention_mask.float()
    if config.balance == "sample":
        return real / real.sum(1, keepdim=True) * (batch.weight / samples)
    return real * (batch.weight / tokens)


class _GateLoss:
    """Called by every layer with its inputs and logits: sums the gates' cross-entropy over one batch.

    With ``local``, its gradient is added to every gate at once, on detached inputs.
    """

    def __init__(self, batch: Batch, weights: Tensor, *, local: bool) -> None:
        self.weights = weights.flatten()
        self.labels = batch.token_tasks.flatten()
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
            gradient = (error * weights.unsqueeze(-1)).t() @ x.float()
            layer.gate.weight.grad += gradient


def _forward_local(
    model: MeteoraModel, batch: Batch, config: GateTrainingConfig, weights: Tensor, responses: int
) -> Tensor:
    for layer in model.layers.values():
        if layer.gate.weight.grad is None:
            layer.gate.weight.grad = torch.zeros_like(layer.gate.weight)
    loss = _GateLoss(batch, weights, local=True)
    with torch.no_grad(), _observed(model, loss):
        # Without a mask of its own, as in response_losses.
        _backbone(model)(input_ids=batch.input_ids, use_cache=False)
    return torch.stack([torch.zeros_like(loss.loss), loss.loss, loss.correct])


def _forward_joint(
    model: MeteoraModel, batch: Batch, config: GateTrainingConfig, weights: Tensor, responses: int
) -> Tensor:
    loss = _GateLoss(batch, weights, local=False)
    with _observed(model, loss):
        lm_loss = response_losses(model, batch).sum() * (batch.weight / responses)
        loss.closed = True
        (lm_loss + config.beta * loss.loss).backward()
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


@contextmanager
def _checkpointing(model: MeteoraModel, wanted: bool) -> Iterator[None]:
    """Recompute every decoder layer in the backward pass.

    transformers' own switch works in training mode only, in which many models drop out.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    if wanted and not layers:
        raise ValueError(
            f"{type(model.base_model).__name__} has no layers to checkpoint; set gradient_checkpointing=False."
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
