"""The language-model head at the responses alone: losses and gradients of all logits, whatever is done with them."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from meteora import MeteoraModel
from meteora.batches import IGNORE, collate, encode
from meteora.training_loop import response_losses

CPU = torch.device("cpu")
SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODERS = {
    "llama": LlamaConfig(**SIZE),
    "tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "soft cap": Gemma2Config(**SIZE, head_dim=8, sliding_window=4, final_logit_softcapping=0.1),
    "scale": CohereConfig(**SIZE, logit_scale=0.3),
    "division": GraniteConfig(**SIZE, logits_scaling=3.0),
}


@pytest.fixture
def batch(core):
    return collate(encode(core.rows(count=3), {"one": 0, "two": 1}, core.Tokenizer(), 100), 2, CPU)


def model_of(core, config, folder, modules=("q_proj", "down_proj")):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    adapters = {"one": core.make_adapter(folder, base, target_modules=list(modules))}
    model = MeteoraModel.from_adapters(base, adapters)
    for layer in model.layers.values():
        layer.lora_A.requires_grad_(True)
    return model


def full(model, batch):
    """All logits, and the padding masked."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )
    return losses.sum(1)


def gradients(model, losses):
    model.zero_grad()
    (losses * torch.arange(1, 1 + len(losses))).sum().backward()
    return {name: layer.lora_A.grad for name, layer in model.layers.items()}


def check(model, batch):
    expected, found = full(model, batch), response_losses(model, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("name", DECODERS)
def test_the_head_sees_the_responses_alone(core, batch, tmp_path, name):
    model = model_of(core, DECODERS[name], tmp_path)
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    response_losses(model, batch)
    hook.remove()
    assert seen == [(1, int((batch.labels != IGNORE).sum()), 64)]
    check(model, batch)


def test_an_adapted_head_sees_every_token(core, batch, tmp_path):
    check(model_of(core, DECODERS["llama"], tmp_path, ("q_proj", "lm_head")), batch)


def test_a_head_that_is_not_called_as_a_module(core, batch, tmp_path):
    model = model_of(core, DECODERS["llama"], tmp_path)
    model.base_model.get_output_embeddings = lambda: nn.Linear(1, 1)
    check(model, batch)
    model.base_model.get_output_embeddings = lambda: None
    check(model, batch)
