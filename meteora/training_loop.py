"""The loop under every training: balanced steps, one schedule, a progress bar, several processes, and a way back in."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from meteora.attention import one_row_of
from meteora.batches import IGNORE, Batch, Sample, Texts, balanced_steps, by_length, collate, response_places
from meteora.config import TrainingConfig
from meteora.layer import MeteoraLinear
from meteora.model import MeteoraModel
from meteora.sharding import is_sharded, shard_base_model, wants_sharding

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 60.0

Step = Callable[[Iterable[Batch], Sequence[Sample]], dict]


class TrainingRun:
    """One training of some parameters of ``model``, on one or several processes (``accelerate launch``).

    The model is moved to accelerate's device, or sharded under an FSDP configuration, unless it was spread over devices
    already. Each process takes its share of every step's samples, and the gradients are summed: the loss curve does not
    depend on the number of processes.

    Args:
        groups: task -> its samples.
        held_out: likewise, what the run is evaluated on.
        mixed_per_step: samples of several tasks in a step, see `batches.balanced_steps`.
        output_dir: an interrupted run with the same arguments goes on from the state it left beside that directory.
        stage: the number of this run among those that write to ``output_dir`` together.
    """

    def __init__(
        self,
        model: MeteoraModel,
        groups: Mapping[int, Sequence[Sample]],
        config: TrainingConfig,
        tokenizer,
        output_dir: str | Path | None,
        *,
        held_out: Mapping[int, Sequence[Sample]] | None = None,
        mixed_per_step: int | None = None,
        stage: int = 0,
    ) -> None:
        self.accelerator = Accelerator()
        self.device = self.accelerator.device
        self.config = config
        self.groups = groups
        self.mixed_per_step = mixed_per_step
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        most = max(len(samples) for samples in groups.values())
        self.steps = config.steps(most)
        parts = (*groups.values(), *(held_out or {}).values())
        self.longest = max(len(sample.ids) for samples in parts for sample in samples)
        self._checkpoint = None
        if output_dir is not None:
            output_dir = Path(output_dir).expanduser().absolute()  # "." has no name that a file beside it could be called by
            output_dir.parent.mkdir(parents=True, exist_ok=True)
            beside = output_dir.with_name(f".{output_dir.name}.unfinished{stage or ''}.pt")
            # A directory that is there may be all that may be written to.
            self._checkpoint = output_dir / beside.name if output_dir.is_dir() and not beside.is_file() else beside
        self._identity = _identity(config, [groups, held_out or {}], model)
        self._sharded = wants_sharding(self.accelerator)
        if self._sharded:
            if not is_sharded(model.base_model):  # by an earlier stage
                shard_base_model(model, self.accelerator)
        elif not getattr(model.base_model, "hf_device_map", None):
            model.to(self.device)

    def loop(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        step: Step,
        *,
        name: str,
        after_step: Callable[[int], list[dict]] = lambda step: [],
        extra: dict[str, Tensor] | None = None,
        keep: bool = False,
    ) -> list[dict]:
        """Call ``step(batches, samples)``, which adds to the gradients and returns a row of the history, once a step.

        The gradients of ``parameters`` are tensors that stay where they are, as recorded passes need it; they are zero
        when a step begins.

        ``after_step`` may add rows; ``extra`` are further tensors, changed in place, that a resumed run needs. With
        ``keep`` the end is kept as well, for a stage that comes after.
        """
        config = self.config
        warmup = min(math.ceil(config.warmup * self.steps), self.steps - 1)  # whose first step has a rate of 0
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, self.steps)
        history: list[dict] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        first = self._resume(optimizer, scheduler, parameters, extra or {}, history)
        last_save = time.monotonic()
        drawn = balanced_steps(self.groups, config.samples_per_step, self.steps, config.seed, self.mixed_per_step)
        bar = tqdm(drawn, total=self.steps, desc=name, disable=not self.accelerator.is_main_process)
        for number, samples in enumerate(bar, start=1):
            if number <= first:
                continue
            row = step(self._batches(samples), samples)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=False)
            history.append({"step": number, **row})
            history.extend(after_step(number))
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            if time.monotonic() - last_save > SECONDS_BETWEEN_CHECKPOINTS:
                self._save(number, optimizer, scheduler, parameters, extra or {}, history)
                last_save = time.monotonic()
        if keep and first < self.steps:
            self._save(self.steps, optimizer, scheduler, parameters, extra or {}, history)
        return history

    def sum_over_processes(self, parameters: Sequence[nn.Parameter], totals: Tensor) -> Tensor:
        """Sum the gradients of ``parameters`` (in place) and ``totals`` (returned) over all processes."""
        if self.accelerator.num_processes == 1:
            return totals
        for parameter in parameters:
            parameter.grad.copy_(self.accelerator.reduce(parameter.grad, reduction="sum"))
        return self.accelerator.reduce(totals, reduction="sum")

    def forget_checkpoint(self) -> None:
        """Remove the state of the unfinished run; call it once the result is written."""
        if self._checkpoint is not None:
            self._checkpoint.unlink(missing_ok=True)

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        """This process's batches of a step: its share of the samples, every n-th of them by length."""
        ordered = sorted(samples, key=lambda sample: len(sample.ids))
        count = self.accelerator.num_processes
        shares = [by_length(ordered[process::count], self.config.tokens_per_batch) for process in range(count)]
        mine = shares[self.accelerator.process_index]
        for group in mine:
            yield collate(group, self.pad_id, self.device)
        if self._sharded:  # then all processes must run the model equally often
            for _ in range(max(map(len, shares)) - len(mine)):
                yield collate(ordered[:1], self.pad_id, self.device, weight=0.0)

    def _save(self, step: int, optimizer, scheduler, parameters, extra: dict[str, Tensor], history: list[dict]) -> None:
        if self._checkpoint is None or not self.accelerator.is_main_process:
            return
        state = {
            "identity": self._identity,
            "step": step,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "parameters": [parameter.detach() for parameter in parameters],
            "extra": extra,
            "history": json.dumps(history),
        }
        new = self._checkpoint.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, self._checkpoint)

    @torch.no_grad()
    def _resume(self, optimizer, scheduler, parameters, extra: dict[str, Tensor], history: list[dict]) -> int:
        if self._checkpoint is None or not self._checkpoint.is_file():
            return 0
        # Onto the CPU: accelerate's name of a CPU among several processes is none that torch knows here.
        state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        shapes = [[tensor.shape for tensor in tensors] for tensors in (state["parameters"], parameters)]
        if state["identity"] != self._identity or shapes[0] != shapes[1]:
            if self.accelerator.is_main_process:
                logger.warning("%s is of another beginning, data or settings, so this run starts anew.", self._checkpoint)
            return 0
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
        for key, tensor in extra.items():
            tensor.copy_(state["extra"][key])
        history.extend(json.loads(state["history"]))
        if self.accelerator.is_main_process:
            logger.info("went on after step %d of an interrupted run (%s)", state["step"], self._checkpoint)
        return state["step"]


def response_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Summed cross-entropy (B,) float32 of every sample's response tokens."""
    losses = place_losses(model, batch.input_ids, *response_places(batch.labels))
    places = batch.labels[:, 1:] != IGNORE
    return losses.new_zeros(places.shape).masked_scatter(places, losses).sum(dim=1)


def place_losses(
    model: nn.Module, input_ids: Tensor, places: Tensor, targets: Tensor, texts: Texts | None = None
) -> Tensor:
    """Cross-entropy (P,) float32 of the tokens ``targets`` (P,) behind P ``places`` of the tokens ``input_ids`` (B, S).

    The model is given no attention mask: behind a causal mask no token sees the padding on its right, and attention
    without a mask of its own is faster. What comes out at the padding is not looked at.

    Args:
        texts: of the one row, for a model under `without_masks`; ``None``: every row is one text.
    """
    with _head_at(model, places) as picked, one_row_of(texts, input_ids) as positions:
        logits = model(input_ids=input_ids, use_cache=False, **positions).logits
    logits = logits[0] if picked else logits.flatten(0, 1).index_select(0, places.to(logits.device))
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def _head_at(model: nn.Module, places: Tensor) -> Iterator[list]:
    """Inside, the language-model head gets (1, P, hidden) for (B, S, hidden): P places of the B * S alone.

    All logits would be the largest tensor of a pass, and prompts have no use for theirs. What a model does with its
    logits (scaling, a soft cap) it does with those that are left. The yielded list stays empty where the head is
    called in no such way, or is adapted, for then its gate wants every token.
    """
    picked: list = []

    def pick(_: nn.Module, inputs: tuple) -> tuple:
        picked.append(True)
        hidden, *others = inputs
        return hidden.flatten(0, 1).index_select(0, places.to(hidden.device)).unsqueeze(0), *others

    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or isinstance(head, MeteoraLinear):
        yield picked
        return
    hook = head.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        hook.remove()


def _identity(config: TrainingConfig, data: Sequence[Mapping[int, Sequence[Sample]]], model: MeteoraModel) -> str:
    """A hash of everything that decides the course of a run."""
    settings = [type(config).__name__, asdict(config), model.top_k, model.state.temperature]
    settings += [model.state.least_share] if model.state.least_share else []
    digest = hashlib.sha256(json.dumps(settings).encode())
    for groups in data:
        for task, samples in groups.items():
            digest.update(array("q", [task, *(len(sample.ids) for sample in samples)]).tobytes())
            for sample in samples:
                digest.update(array("q", sample.ids).tobytes())
                digest.update(array("q", sample.tasks).tobytes())
                digest.update(bytes(sample.is_response))
    for name, parameter in model.base_model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if "lora_" not in name:
            digest.update(_some_values(parameter))
    for layer in model.layers.values():
        digest.update(layer.gate.weight.detach().float().cpu().numpy().tobytes())
    digest.update(json.dumps([[a.name, a.sha256, a.config_sha256] for a in model.adapters]).encode())
    return digest.hexdigest()


def _some_values(weight: Tensor) -> bytes:
    """A few values that tell one base model from another; none where they do not simply lie in memory.

    That is where accelerate offloads them, FSDP shards them, or a quantised layer packs them in a type of its own.
    """
    weight = weight.detach()
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type == "meta":
        return b""
    step = max(1, weight.numel() // 8)
    return weight.flatten()[::step].float().cpu().numpy().tobytes()
