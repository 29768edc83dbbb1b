"""Training of adapters, for tasks where there is none off the shelf."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from meteora.adapters import WEIGHTS_FILE, Adapter, LoraWeights, adapter_directory, peft_tensors
from meteora.batches import Batch, Sample, by_task, encode, micro_batches
from meteora.checkpoint import public_name
from meteora.compiling import compiled_layers, worth_compiling
from meteora.config import AdapterTrainingConfig, MeteoraConfig
from meteora.files import atomic_directory
from meteora.model import MeteoraModel
from meteora.training_loop import TrainingRun, response_losses


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
    """
    config = config or AdapterTrainingConfig()
    if not datasets:
        raise ValueError("no datasets given; train_adapters needs at least one.")
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
    """N adapters side by side in one model: layer l holds A (N * r, in) and B (out, N * r), both float32."""

    def __init__(self, model: MeteoraModel, config, groups, held_out, tokenizer, output_dir) -> None:
        self.model, self.config, self.held_out = model, config, held_out
        self.run = TrainingRun(model, groups, config, tokenizer, output_dir, held_out=held_out)
        self.names = model.adapter_names
        self.scaling = config.alpha / config.rank
        for layer in model.layers.values():
            layer.lora_A = nn.Parameter(layer.lora_A.float())
            layer.lora_B = nn.Parameter(layer.lora_B.float())
        self.A = [layer.lora_A for layer in model.layers.values()]
        self.B = [layer.lora_B for layer in model.layers.values()]
        self.best_loss = torch.full((len(self.names),), math.inf, device=self.run.device)
        self.best_step = torch.zeros(len(self.names), dtype=torch.int64, device=self.run.device)
        self.best_A = [A.detach().clone() for A in self.A]
        self.best_B = [B.detach().clone() for B in self.B]

    def train(self) -> list[dict]:
        config = self.config
        # lora_B holds the scaling, so the step that AdamW takes in B alone is that times larger here.
        groups = [
            {"params": self.A, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {
                "params": self.B,
                "lr": config.learning_rate * self.scaling,
                "weight_decay": config.weight_decay / self.scaling,
            },
        ]
        extra = {"best_loss": self.best_loss, "best_step": self.best_step}
        extra |= {f"best_A.{n}": tensor for n, tensor in enumerate(self.best_A)}
        extra |= {f"best_B.{n}": tensor for n, tensor in enumerate(self.best_B)}
        with compiled_layers(self.model, worth_compiling(self.model, self.run.device)):
            rows = self.run.loop(
                torch.optim.AdamW(groups),
                self.A + self.B,
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
        responses = Counter()
        for sample in drawn:
            responses[sample.task] += sample.response_tokens
        losses = torch.zeros(len(self.names), device=self.run.device)
        for batch in batches:
            losses += self._losses(batch, responses, backward=True)
        losses = self.run.sum_over_processes(self.A + self.B, losses)
        self._clip()
        return {"loss": losses.mean().item(), "losses": losses.tolist()}

    def _losses(self, batch: Batch, responses: Mapping[int, int], *, backward: bool = False) -> Tensor:
        """This batch's part (N,) of every adapter's mean loss over ``responses`` tokens."""
        tasks = torch.tensor(batch.tasks, device=self.run.device)
        tokens = torch.tensor([float(responses[task]) for task in batch.tasks], device=self.run.device)
        self.model.state.own = torch.nn.functional.one_hot(tasks, len(self.names)).float()
        try:
            parts = response_losses(self.model, batch) * (batch.weight / tokens)
        finally:
            self.model.state.own = None
        if backward:
            parts.sum().backward()
        return torch.zeros(len(self.names), device=self.run.device).index_add(0, tasks, parts.detach())

    @torch.no_grad()
    def _clip(self) -> None:
        """Clip every adapter's gradient by that adapter's own norm over all layers."""
        squares = 0
        for A, B in zip(self.A, self.B, strict=True):
            # The gradient of PEFT's B is that of ours times the scaling.
            squares = squares + self._per_adapter(A.grad).square().sum((1, 2))
            squares = squares + self._per_adapter(B.grad.t() * self.scaling).square().sum((1, 2))
        factor = (self.config.max_grad_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # (N,)
        columns = factor.repeat_interleave(self.config.rank)  # (N * r,)
        for A, B in zip(self.A, self.B, strict=True):
            A.grad *= columns.unsqueeze(1)
            B.grad *= columns

    def _per_adapter(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(self.names), self.config.rank, -1)

    @torch.no_grad()
    def _after_step(self, step: int) -> list[dict]:
        if not self.held_out or (step % self.config.evaluate_every and step != self.run.steps):
            return []
        samples = [sample for group in self.held_out.values() for sample in group]
        responses = Counter()
        for sample in samples:
            responses[sample.task] += sample.response_tokens
        losses = torch.zeros(len(self.names), device=self.run.device)
        for batch in micro_batches(samples, self.config.tokens_per_batch, self.run.pad_id, self.run.device):
            losses += self._losses(batch, responses)
        rows = []
        for task in self.held_out:
            rows.append({"step": step, "task": self.names[task], "split": "valid", "loss": losses[task].item()})
            if losses[task] < self.best_loss[task]:
                self.best_loss[task], self.best_step[task] = losses[task], step
                for best, now in zip(self.best_A, self.A, strict=True):
                    best[self._columns(task)] = now[self._columns(task)]
                for best, now in zip(self.best_B, self.B, strict=True):
                    best[:, self._columns(task)] = now[:, self._columns(task)]
        return rows

    def _columns(self, task: int) -> slice:
        return slice(task * self.config.rank, (task + 1) * self.config.rank)

    def trained_adapters(self) -> dict[str, dict[str, LoraWeights]]:
        """Name -> module -> weights: the best by validation loss, the last where there was no validation."""
        result = {}
        for task, name in enumerate(self.names):
            A, B = (self.best_A, self.best_B) if task in self.held_out else (self.A, self.B)
            result[name] = {
                module: LoraWeights(
                    A[n][self._columns(task)].detach(),
                    B[n][:, self._columns(task)].detach() / self.scaling,
                    self.scaling,
                )
                for n, module in enumerate(self.model.layers)
            }
        return result

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
    rows = [{**row, "task": name} for name, dataset in datasets.items() for row in dataset]
    if not rows:
        return {}
    groups = by_task(encode(rows, {name: n for n, name in enumerate(names)}, tokenizer, max_length))
    for name in datasets:
        if names.index(name) not in groups:
            raise ValueError(f"the dataset of {name!r} is empty; give at least one row.")
    return groups


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
    with atomic_directory(directory) as new:
        lora.save_pretrained(str(new))
        tensors = peft_tensors(weights, getattr(torch, config.dtype))
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
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
