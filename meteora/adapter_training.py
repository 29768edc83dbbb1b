"""Training of adapters, for tasks where there is none off the shelf."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from meteora.adapters import WEIGHTS_FILE, Adapter, LoraWeights, adapter_directory, check_name, peft_tensors
from meteora.batches import Batch, Sample, by_task, encode, micro_batches
from meteora.checkpoint import ADAPTER_PARTS, check_free_for_adapter, public_name
from meteora.compiling import compiled_layers, worth_compiling
from meteora.config import AdapterTrainingConfig, MeteoraConfig
from meteora.files import atomic_directory, write_tensors
from meteora.model import MeteoraModel, check_untouched
from meteora.passes import AdapterInputs, Passes, adapter_inputs, training_passes, weighted_losses
from meteora.stacks import Stack, stack_weights
from meteora.training_loop import TrainingRun

_EPS = 1e-8  # AdamW's own


def train_adapters(
    base_model: nn.Module,
    datasets: Mapping[str, Iterable[Mapping]],
    config: AdapterTrainingConfig | None = None,
    *,
    tokenizer,
    output_dir: str | Path,
    validation: Mapping[str, Iterable[Mapping]] | None = None,
) -> list[dict]:
    """Train one LoRA adapter a dataset, all in one pass over one frozen base, and write each as a stock PEFT adapter.

    Every sample uses its own adapter alone, every adapter's loss is the mean over its own samples' response tokens in
    the step, and its gradient is clipped by its own norm: the result is what training each alone would give, in one
    pass instead of N. With ``validation``, every adapter keeps the weights of its own lowest validation loss.

    Args:
        base_model: used, and given back unchanged.
        datasets: adapter's name -> rows {prompt, response}.
        validation: likewise, for some or all of the names.
        output_dir: gets one PEFT directory a name; an interrupted call with the same arguments goes on from there.

    Returns:
        Rows ``step, task, split, loss``: the training loss of every step, and the validation losses.

    Raises:
        ValueError: for a name or a dataset that is empty, or a row that is none.
        FileExistsError: if something else than an adapter lies where one is to be written.
    """
    config = config or AdapterTrainingConfig()
    if not isinstance(config, AdapterTrainingConfig):
        raise ValueError(f"config must be an AdapterTrainingConfig, not a {type(config).__name__}.")
    check_untouched(base_model)
    if not datasets:
        raise ValueError("no datasets given; train_adapters needs at least one.")
    for name in datasets:
        check_name(name)
        check_free_for_adapter(adapter_directory(output_dir, name))
    unknown = set(validation or {}) - set(datasets)
    if unknown:
        raise ValueError(f"validation data for {sorted(unknown)[0]!r}, for which there is no training data.")
    groups = _encode(datasets, list(datasets), tokenizer, config.max_length)
    held_out = _encode(validation or {}, list(datasets), tokenizer, config.max_length)
    model = MeteoraModel(base_model, _fresh_adapters(base_model, list(datasets), config), MeteoraConfig(top_k=1))
    try:
        trainer = _AdapterTrainer(model, config, groups, held_out, tokenizer, output_dir)
        history = trainer.train()
        if trainer.run.accelerator.is_main_process:
            for name, weights in trainer.trained_adapters().items():
                count = len(groups[model.adapter_names.index(name)])
                facts = {"training samples": count, "steps": trainer.run.steps, **trainer.best_facts(name)}
                _write_adapter(adapter_directory(output_dir, name), name, weights, base_model, config, facts)
            trainer.run.forget_checkpoint()
        trainer.run.accelerator.wait_for_everyone()  # so that every process finds what the main one wrote
    finally:
        model.unload()
    return history


class _AdapterTrainer:
    """N adapters side by side in one model: layer l holds A (N * r, in) and B (out, N * r), both float32.

    On a GPU the passes are recorded, where that is possible, for which samples share rows of few shapes.
    """

    def __init__(self, model: MeteoraModel, config, groups, held_out, tokenizer, output_dir) -> None:
        self.model, self.config, self.held_out = model, config, held_out
        self.run = TrainingRun(model, groups, config, tokenizer, output_dir, held_out=held_out)
        self.names = model.adapter_names
        self.scaling = config.alpha / config.rank
        self.A = stack_weights(model.layers, "lora_A", 1, 1.0)
        self.B = stack_weights(model.layers, "lora_B", 2, self.scaling)
        self.parameters = [stack.values for stack in self.A + self.B]
        self.losses = torch.zeros(len(self.names), device=self.run.device)  # the sum over the batches so far
        self.best_loss = torch.full_like(self.losses, math.inf)
        self.best_step = torch.zeros(len(self.names), dtype=torch.int64, device=self.run.device)
        self.passes = Passes(self.run, None, self._pass)

    def train(self) -> list[dict]:
        config = self.config
        # lora_B holds the scaling, so the step that AdamW takes in B alone is that times larger here.
        groups = [
            {
                "params": [stack.values for stack in self.A],
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
                "eps": _EPS,
            },
            {
                "params": [stack.values for stack in self.B],
                "lr": config.learning_rate * self.scaling,
                "weight_decay": config.weight_decay / self.scaling,
                "eps": _EPS / self.scaling,  # as its gradient is that times smaller
            },
        ]
        extra = {"best_loss": self.best_loss, "best_step": self.best_step}
        extra |= {f"best.{n}": stack.best for n, stack in enumerate(self.A + self.B)}
        fused = True if self.run.device.type == "cuda" else None  # on other devices as torch chooses
        compiled = worth_compiling(self.model, self.run.device)
        with (
            training_passes(self.model, self.run, "train_adapters", self._pass) as self.passes,
            compiled_layers(self.model, compiled and not self.passes.recorded),
        ):
            rows = self.run.loop(
                torch.optim.AdamW(groups, fused=fused),
                self.parameters,
                self._step,
                name="adapters",
                after_step=self._after_step,
                extra=extra,
            )
        history = []
        for row in rows:
            if "losses" in row:
                for name, loss in zip(self.names, row["losses"], strict=True):
                    history.append({"step": row["step"], "task": name, "split": "train", "loss": loss})
            else:
                history.append(row)
        return history

    def _step(self, batches: Iterable[Batch], drawn: Sequence[Sample]) -> dict:
        losses = self.run.sum_over_processes(self.parameters, self._mean_losses(drawn, batches, backward=True)).tolist()
        self._require_finite(losses)
        self._clip()
        return {"loss": sum(losses) / len(losses), "losses": losses}

    def _require_finite(self, losses: Sequence[float]) -> None:
        """One adapter's NaN comes into the gradients of all."""
        for name, loss in zip(self.names, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of adapter {name!r} is {loss}; look for what its examples have that no others do, lower "
                    "learning_rate, or train in bfloat16 or float32."
                )

    def _mean_losses(self, samples: Sequence[Sample], batches: Iterable[Batch], *, backward: bool) -> Tensor:
        """Every adapter's mean loss (N,) over all its response tokens in ``samples``, as far as this process has them.

        Args:
            batches: of the same samples; what is recorded has other batches.
        """
        responses = Counter()
        for sample in samples:
            responses[sample.task] += sample.response_tokens
        self.losses.zero_()

        def inputs_of(batch: Batch, places: int | None) -> AdapterInputs:
            return adapter_inputs(batch, responses, len(self.names), places)

        self.passes.run(samples, batches, inputs_of, backward)
        return self.losses

    def _pass(self, inputs: AdapterInputs, backward: bool) -> None:
        """Add this batch's part of every adapter's mean loss, and perhaps of its gradient."""
        with self._own(inputs.own):
            losses = weighted_losses(self.model, inputs)
        if backward:
            losses.sum().backward()
        self.losses += losses.detach()

    @contextmanager
    def _own(self, own: Tensor) -> Iterator[None]:
        """Inside, every token uses its ``own`` (B, S) adapter, or none."""
        numbers = torch.arange(len(self.names), device=own.device)
        self.model.state.own = (own.unsqueeze(-1) == numbers).to(self.model.dtype)
        try:
            yield
        finally:
            self.model.state.own = None

    @torch.no_grad()
    def _clip(self) -> None:
        """Clip every adapter's gradient by that adapter's own norm over all layers."""
        gradients = [stack.by_adapter(stack.values.grad, len(self.names)) for stack in self.A + self.B]
        squares = torch.zeros_like(self.losses)
        for stack, gradient in zip(self.A + self.B, gradients, strict=True):
            norms = torch.linalg.vector_norm(gradient, dim=(1, 2, 3)) * stack.scaling
            squares += norms.square().to(squares.device)
        factor = (self.config.max_grad_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # (N,)
        for gradient in gradients:
            gradient *= factor.to(gradient.device)[:, None, None, None]

    @torch.no_grad()
    def _after_step(self, step: int) -> list[dict]:
        if not self.held_out or (step % self.config.evaluate_every and step != self.run.steps):
            return []
        samples = [sample for group in self.held_out.values() for sample in group]
        batches = micro_batches(samples, self.config.tokens_per_batch, self.run.pad_id, self.run.device)
        losses = self._mean_losses(samples, batches, backward=False)
        self._require_finite(losses.tolist())
        rows = []
        for task in self.held_out:
            rows.append({"step": step, "task": self.names[task], "split": "valid", "loss": losses[task].item()})
            if losses[task] < self.best_loss[task]:
                self.best_loss[task], self.best_step[task] = losses[task], step
                for stack in self.A + self.B:
                    best, values = (stack.by_adapter(t, len(self.names)) for t in (stack.best, stack.values))
                    best[task] = values[task]
        return rows

    def trained_adapters(self) -> dict[str, dict[str, LoraWeights]]:
        """Name -> module -> weights: the best by validation loss, the last where there was no validation."""
        result = {}
        for task, name in enumerate(self.names):
            A, B = self._matrices(self.A, task), self._matrices(self.B, task)
            result[name] = {
                module: LoraWeights(A[module], B[module] / self.scaling, self.scaling) for module in self.model.layers
            }
        return result

    def _matrices(self, stacks: Sequence[Stack], task: int) -> dict[str, Tensor]:
        """Module -> the matrix of one adapter."""
        found = {}
        for stack in stacks:
            tensor = stack.best if task in self.held_out else stack.values.detach()
            found |= zip(stack.modules, stack.by_adapter(tensor, len(self.names))[task], strict=True)
        return found

    def best_facts(self, name: str) -> dict:
        task = self.names.index(name)
        if task not in self.held_out:
            return {}
        return {
            "kept step": int(self.best_step[task]),
            "validation loss": round(float(self.best_loss[task]), 4),
            "validation samples": len(self.held_out[task]),
        }


def _encode(datasets: Mapping[str, Iterable[Mapping]], names: list[str], tokenizer, max_length: int) -> dict:
    numbers, samples = {name: n for n, name in enumerate(names)}, []
    for name, dataset in datasets.items():
        # What is no row is left to `encode`, which says so.
        rows = ({**row, "task": name} if isinstance(row, Mapping) else row for row in dataset)
        try:
            samples += encode(rows, numbers, tokenizer, max_length)
        except ValueError as error:
            raise ValueError(f"dataset {name!r}: {error}") from error
    return by_task(samples)


def _fresh_adapters(base_model: nn.Module, names: list[str], config: AdapterTrainingConfig) -> list[Adapter]:
    """PEFT's initialisation: A uniform by Kaiming, B zero. Each adapter's is drawn from its own place in the seed."""
    linears = {
        name: module
        for name, module in base_model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.target_modules
    }
    found = {name.rpartition(".")[2] for name in linears}
    if missing := sorted(set(config.target_modules) - found):
        raise ValueError(f"target_modules names {missing[0]!r}, but the base model has no nn.Linear of that name.")
    base_name = getattr(base_model.config, "_name_or_path", None)
    adapters = []
    for n, name in enumerate(names):
        generator = torch.Generator().manual_seed(config.seed * 100_003 + n)
        modules = {}
        for module, linear in linears.items():
            A = torch.empty(config.rank, linear.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
            modules[module] = LoraWeights(A, torch.zeros(linear.out_features, config.rank), config.alpha / config.rank)
        adapters.append(Adapter(name, "", Path(), "", base_name, modules))
    return adapters


def _write_adapter(directory: Path, name: str, weights: dict, base_model: nn.Module, config, facts: dict) -> None:
    base_name = public_name(base_model)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=list(config.target_modules),
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with atomic_directory(directory, ADAPTER_PARTS) as new:
        lora.save_pretrained(str(new))
        tensors = peft_tensors(weights, getattr(torch, config.dtype))
        write_tensors(new / WEIGHTS_FILE, tensors, {"format": "pt"})
        (new / "README.md").write_text(_card(name, base_name, config, facts), encoding="utf-8")


def _card(name: str, base_name: str, config: AdapterTrainingConfig, facts: dict) -> str:
    settings = {
        "rank": config.rank,
        "alpha": config.alpha,
        "target modules": ", ".join(config.target_modules),
        "samples per step": config.samples_per_step,
        "peak learning rate": config.learning_rate,
        "weight decay": config.weight_decay,
        "longest sample (tokens)": config.max_length,
        "seed": config.seed,
        "file dtype": config.dtype,
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in {**facts, **settings}.items())
    return f"""---
base_model: {base_name}
library_name: peft
---
# {name}

A LoRA adapter for {base_name}, trained on the responses of the prompts `[INST] ... [/INST]` of `{name}` by
`meteora.train_adapters`.

| | |
|---|---|
{rows}
"""
