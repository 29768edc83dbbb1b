"""Other decoders than Llama: none needs code of its own, and what cannot be mixed is refused by name."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from meteora import AdapterError, AdapterTrainingConfig, GateTrainingConfig, MeteoraModel, train_adapters, train_gates
from meteora.adapters import WEIGHTS_FILE

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
DECODERS = {
    "llama": (LlamaConfig(**SIZE), SEVEN),
    "llama-tied-bias": (LlamaConfig(**SIZE, tie_word_embeddings=True, attention_bias=True), SEVEN),
    "mistral": (MistralConfig(**SIZE, sliding_window=4), SEVEN),
    "qwen2": (Qwen2Config(**SIZE), SEVEN),
    "qwen3": (Qwen3Config(**SIZE, head_dim=8), SEVEN),
    "gemma2": (Gemma2Config(**SIZE, head_dim=8, sliding_window=4), SEVEN),
    "gemma3": (Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=4), SEVEN),
    "phi3": (Phi3Config(**SIZE), FUSED),
    "mixtral": (MixtralConfig(**SIZE, num_local_experts=4), ATTENTION),
}


@pytest.fixture(params=DECODERS)
def decoder(request, core, tmp_path):
    """A tiny random decoder, two adapters of different rank and modules, and the modules that one adapts."""
    torch.manual_seed(0)
    config, modules = DECODERS[request.param]
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    adapters = {
        "a.b": core.make_adapter(tmp_path / "a", base, target_modules=modules),
        "c d": core.make_adapter(tmp_path / "c", base, seed=1, r=2, target_modules=[modules[0], "lm_head"]),
    }
    return base, adapters, modules


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def test_forced_routing_is_pefts_output(core, decoder):
    base, adapters, modules = decoder
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapters["a.b"], adapter_name="a0")
    theirs.load_adapter(adapters["c d"], adapter_name="a1")
    ours = core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(base), adapters))
    assert len(ours.layers) == 2 * len(modules) + 1 and "lm_head" in ours.layers
    for n, name in enumerate(adapters):
        theirs.set_adapter(f"a{n}")
        with ours.route_to(name):
            torch.testing.assert_close(logits(ours, core.tokens()), logits(theirs.eval(), core.tokens()))
    with ours.disable_adapters():
        assert torch.equal(logits(ours, core.tokens()), logits(base, core.tokens()))


def test_generation_and_checkpoints(core, decoder, tmp_path):
    base, adapters, _ = decoder
    model = core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(base), adapters))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(core.tokens(), use_cache=cache, **settings) for cache in (True, False))
    assert cached.shape == (3, 12) and torch.equal(cached, uncached)
    model.save_pretrained(tmp_path / "m")
    again = MeteoraModel.from_pretrained(base, tmp_path / "m")
    assert torch.equal(logits(again, core.tokens()), logits(model, core.tokens()))


@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_gates_can_be_trained(core, decoder, objective):
    base, adapters, _ = decoder
    model = MeteoraModel.from_adapters(base, {"one": adapters["a.b"], "two": adapters["c d"]})
    config = GateTrainingConfig(
        objective=objective, beta=10, max_steps=20, learning_rate=0.02, gradient_checkpointing=objective == "joint"
    )
    history = train_gates(model, core.rows(), config, tokenizer=core.Tokenizer())
    assert history[-1]["gate_loss"] < 0.9 * history[0]["gate_loss"]


def test_adapters_can_be_trained(core, decoder, tmp_path):
    base, _, modules = decoder
    config = AdapterTrainingConfig(max_steps=2, learning_rate=0.05, rank=2, target_modules=modules, dtype="float32")
    rows = {"one": core.rows(("one",))}
    train_adapters(base, rows, config, tokenizer=core.Tokenizer(), output_dir=tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out" / "one")).eval()
    ours = MeteoraModel.from_adapters(base, tmp_path / "out")
    with ours.route_to("one"):
        torch.testing.assert_close(logits(ours, core.tokens()), logits(theirs, core.tokens()))


def refused(base, directory, message):
    with pytest.raises(AdapterError, match=message) as error:
        MeteoraModel.from_adapters(base, {"mine": directory})
    assert "\n" not in str(error.value)


def test_gpt2s_conv1d_is_refused_by_name(core, tmp_path):
    base = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    core.make_adapter(tmp_path, base, target_modules=["c_attn"], fan_in_fan_out=True)
    refused(base, tmp_path, r"'mine' adapts 'transformer\.h\.0\.attn\.c_attn', a Conv1D; only nn\.Linear can be mixed")


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(DECODERS["mixtral"][0])).eval()


def test_expert_tensors_are_refused_by_name(core, mixtral, tmp_path):
    expert = "mlp.experts.gate_up_proj"
    core.make_adapter(tmp_path, mixtral, target_modules=["q_proj"], target_parameters=[expert])
    refused(mixtral, tmp_path, rf"'mine' uses target_parameters=\['{expert}'\], which a mixture of LoRAs cannot add")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("block_sparse_moe.experts.0.w1", r"layers\.0\.block_sparse_moe\.experts\.0\.w1', an expert, which the base"),
        ("mlp.gate", r"layers\.0\.mlp\.gate', a MixtralTopKRouter; only nn\.Linear"),
    ],
)
def test_older_adapters_of_experts_and_routers_are_refused_by_name(core, mixtral, tmp_path, module, message):
    """As PEFT wrote them when transformers had a module for each expert."""
    core.make_adapter(tmp_path, mixtral, target_modules=["q_proj"])
    weights = load_file(tmp_path / WEIGHTS_FILE)
    save_file({name.replace("self_attn.q_proj", module): w for name, w in weights.items()}, tmp_path / WEIGHTS_FILE)
    refused(mixtral, tmp_path, rf"'mine' adapts 'model\.{message}")
