"""X-LoRA: PEFT's classifier over all adapters, run with a KV cache (method ``xlora``).

X-LoRA (Buehler and Buehler 2024, arXiv 2402.07148) runs the base model first; from its last hidden state a trained
classifier gives every token one weight per adapter, and a second run mixes all of them with those weights. Classifier
and settings are PEFT's, with its defaults. The mixture is computed by `meteora`'s layers, in two matrix products where
PEFT's loop over the adapters takes two for each, and both runs keep a KV cache: the base model's hidden states do not
depend on what follows, so a token's weights never change. `tests/test_xlora.py` compares with PEFT's own X-LoRA model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import XLoraConfig
from peft.tuners.xlora.classifier import XLoraClassifier
from safetensors.torch import load_file
from torch import Tensor

from meteora import MeteoraModel, Routing
from meteora.batches import Batch, Sample, by_task, encode
from meteora.config import TrainingConfig
from meteora.files import atomic_directory, write_tensors
from meteora.passes import PassInputs, response_inputs, training_passes, weighted_losses
from meteora.study.baselines import Method
from meteora.study.predictions import fingerprint, model_fingerprints
from meteora.training_loop import TrainingRun

WEIGHTS, RECIPE = "classifier.safetensors", "training.json"


class GivenRouting:
    """In place of the gates' choice: every adapter, with the weights (T, N) that are given for the tokens."""

    def __init__(self, weights: Tensor) -> None:
        indices = torch.arange(weights.shape[-1], device=weights.device).expand(weights.shape)
        self._routing = Routing(indices, weights)

    def routing(self, batch: torch.Size, device: torch.device) -> Routing:
        """The same for every layer, whose input has the shape (*batch, in)."""
        return self._routing


@dataclass
class TwoCaches:
    """The KV caches of the run that decides and of the run that answers."""

    deciding: Any
    answering: Any

    @property
    def parts(self) -> tuple[Any, Any]:
        return self.deciding, self.answering

    def batch_select_indices(self, indices: Tensor) -> None:
        self.deciding.batch_select_indices(indices)
        self.answering.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.deciding.batch_repeat_interleave(repeats)
        self.answering.batch_repeat_interleave(repeats)


class XLora(torch.nn.Module):
    """A `MeteoraModel`'s adapters under an X-LoRA classifier instead of the gates; called as a causal LM is.

    Args:
        model: holds the adapters; its own state is left as it is.
        seed: of the classifier's fresh weights.
    """

    def __init__(self, model: MeteoraModel, *, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        count = len(model.adapter_names)
        config = XLoraConfig(hidden_size=model.config.hidden_size, adapters={str(n): "" for n in range(count)})
        device = next(model.parameters()).device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # One set of weights serves all layers (PEFT's default), so the classifier is told of a single layer.
            classifier = XLoraClassifier(model, config, count, 1, torch.device("cpu"))
        self.classifier = classifier.to(device).float()  # it is trained, which bfloat16 would not survive
        self.config = model.config

    def get_output_embeddings(self) -> torch.nn.Module:
        """The language-model head."""
        return self.model.get_output_embeddings()

    def weights(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, hidden) -> the adapters' weights (B * S, N); every row sums to 1."""
        scalings = self.classifier(SimpleNamespace(hidden_states=[hidden.float()]), input_ids=hidden[..., 0])
        return scalings.reshape(-1, scalings.shape[-1])

    def forward(self, past_key_values: TwoCaches | None = None, logits_to_keep: int = 0, **inputs) -> Any:
        """Both runs over the same inputs; the output is that of the second, its cache that of both."""
        caches = past_key_values or TwoCaches(None, None)
        backbone = self.model.base_model.base_model  # without the head: no logits are wanted of the first run
        with torch.no_grad(), self.model.disable_adapters():
            decided = backbone(past_key_values=caches.deciding, **inputs)
        with _routed(self.model, GivenRouting(self.weights(decided.last_hidden_state))):
            output = self.model(past_key_values=caches.answering, logits_to_keep=logits_to_keep, **inputs)
        if inputs.get("use_cache"):
            output.past_key_values = TwoCaches(decided.past_key_values, output.past_key_values)
        return output


@contextmanager
def _routed(model: MeteoraModel, routing: GivenRouting) -> Iterator[None]:
    """All adapters are used for every token here, so that ``dense`` is the backend to use."""
    before = model.state.forced, model.state.backend
    model.state.forced, model.state.backend = routing, "dense"
    try:
        yield
    finally:
        model.state.forced, model.state.backend = before


def train_xlora(
    xlora: XLora, dataset: Iterable[Mapping], config: TrainingConfig, *, tokenizer, output_dir: str | Path
) -> list[dict]:
    """Train the classifier by the language-modelling loss on the responses, as X-LoRA's authors do.

    Samples are drawn as `meteora.train_gates` draws them. What an earlier call with the same arguments left in
    ``output_dir`` is taken from there, and an interrupted one goes on.

    Args:
        dataset: rows {prompt, response, task} or {turns: [...]}, as `train_gates` takes them.

    Returns:
        Rows ``step, loss``.
    """
    model, output_dir = xlora.model, Path(output_dir)
    samples = encode(dataset, {n: i for i, n in enumerate(model.adapter_names)}, tokenizer, config.max_length)
    weights = model_fingerprints(model)
    recipe = {
        "config": asdict(config),
        "weights": {part: weights[part] for part in ("base", "adapters")},
        "start": fingerprint([parameter.tolist() for parameter in xlora.classifier.parameters()]),
        "data": fingerprint([[sample.ids, sample.is_response] for sample in samples]),
    }
    if (output_dir / RECIPE).is_file() and (output_dir / WEIGHTS).is_file():
        left = json.loads((output_dir / RECIPE).read_text(encoding="utf-8"))
        if left["recipe"] == recipe:
            xlora.classifier.load_state_dict(load_file(output_dir / WEIGHTS))
            return left["history"]
    run = TrainingRun(model, by_task(samples), config, tokenizer, output_dir)
    parameters = list(xlora.classifier.to(run.device).parameters())
    total = torch.zeros(1, device=run.device)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def one_pass(inputs: PassInputs) -> None:
        loss = weighted_losses(xlora, inputs)
        loss.backward()
        total.add_(loss.detach())

    def step(batches: Iterable[Batch], drawn: Sequence[Sample]) -> dict:
        share = 1 / sum(sample.response_tokens for sample in drawn)
        total.zero_()
        passes.run(drawn, batches, lambda batch, places: response_inputs(batch, share, places))
        (loss,) = run.sum_over_processes(parameters, total).tolist()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        return {"loss": loss}

    with training_passes(xlora, run, "train_xlora", one_pass) as passes:
        history = run.loop(optimizer, parameters, step, name="X-LoRA")
    with atomic_directory(output_dir) as directory:
        write_tensors(directory / WEIGHTS, {name: t.contiguous() for name, t in xlora.classifier.state_dict().items()})
        (directory / RECIPE).write_text(json.dumps({"recipe": recipe, "history": history}) + "\n", encoding="utf-8")
    run.forget_checkpoint()
    return history


def xlora_method(
    model: MeteoraModel,
    dataset: Iterable[Mapping],
    config: TrainingConfig,
    *,
    tokenizer,
    output_dir: str | Path,
) -> Method:
    """X-LoRA over the adapters of ``model``, its classifier trained on ``dataset`` unless ``output_dir`` holds it."""
    xlora = XLora(model, seed=config.seed)
    train_xlora(xlora, dataset, config, tokenizer=tokenizer, output_dir=output_dir)
    xlora.classifier.requires_grad_(False)
    xlora.eval()

    @functools.cache
    def digests() -> dict[str, str]:
        weights = model_fingerprints(model)
        classifier = fingerprint([parameter.tolist() for parameter in xlora.classifier.parameters()])
        return {"base": weights["base"], "adapters": weights["adapters"], "classifier": classifier}

    return Method(
        "xlora", xlora, lambda tasks: nullcontext(), ("base", "adapters", "classifier"), _weights=digests
    )  # fmt: skip
