"""Base models that lie elsewhere or in another form: offloaded, quantised; and adapters by the dozen."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from meteora import AdapterError, AdapterTrainingConfig, GateTrainingConfig, MeteoraModel, train_adapters, train_gates

OFFLOADED = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def gates_trained_on(model, core, objective, output_dir):
    config = GateTrainingConfig(objective=objective, max_steps=3, samples_per_step=2, learning_rate=0.01)
    return train_gates(model, core.rows(), config, tokenizer=core.Tokenizer(), output_dir=output_dir)


@pytest.fixture
def saved(tiny_llama, mixed_adapters, tmp_path):
    """The directory of a base model, and two adapters for it."""
    tiny_llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base", {"one": mixed_adapters["one"], "two": mixed_adapters["three"]}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, OFFLOADED, "auto"], ids=["cpu", "offloaded", "auto"])
def test_a_device_map_changes_nothing(core, tiny_llama, saved, tmp_path, device_map):
    path, adapters = saved
    plain = core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), adapters))
    base = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=tmp_path / "offload")
    spread = core.randomize_gates(MeteoraModel.from_adapters(base, adapters))
    if device_map is OFFLOADED:
        assert base.model.layers[1].mlp.up_proj.base_layer.weight.device.type == "meta"
    ids = core.tokens().to(base.device)
    torch.testing.assert_close(logits(spread, ids).cpu(), logits(plain, core.tokens()))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spread.generate(ids, **settings).cpu(), plain.generate(core.tokens(), **settings))
    with spread.disable_adapters():
        torch.testing.assert_close(logits(spread, ids).cpu(), logits(tiny_llama, core.tokens()))
    for objective in ("gate", "joint"):
        history = gates_trained_on(spread, core, objective, tmp_path / objective)
        for ours, theirs in zip(history, gates_trained_on(plain, core, objective, None), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    again = MeteoraModel.from_pretrained(spread.unload(), tmp_path / "joint")
    torch.testing.assert_close(logits(again, ids).cpu(), logits(plain, core.tokens()))


def test_adapters_are_trained_on_an_offloaded_base(core, saved, tmp_path):
    path, _ = saved
    config = AdapterTrainingConfig(max_steps=2, learning_rate=0.05, rank=2, dtype="float32")
    rows, histories = {"one": core.rows(("one",))}, []
    for folder, device_map in (("plain", None), ("spread", OFFLOADED)):
        base = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=tmp_path / "offload")
        histories.append(
            train_adapters(base, rows, config, tokenizer=core.Tokenizer(), output_dir=tmp_path / "out" / folder)
        )
    for a, b in zip(*histories, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_base_model_without_weights_is_refused(tiny_llama, mixed_adapters):
    with pytest.raises(AdapterError, match="has no weights .*meta device"):
        MeteoraModel.from_adapters(tiny_llama.to("meta"), mixed_adapters)


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_config(**options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**options)


QUANTISED = {
    "torchao-int8": (torchao_int8, ("gate", "joint")),
    "bitsandbytes-8bit": (lambda: bitsandbytes_config(load_in_8bit=True), ("gate", "joint")),
    # On a CPU its 4-bit product has no backward pass.
    "bitsandbytes-4bit": (lambda: bitsandbytes_config(load_in_4bit=True), ("gate",)),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base(core, tiny_llama, tmp_path, kind):
    make, objectives = QUANTISED[kind]
    quantisation = make()
    config = copy.deepcopy(tiny_llama.config)
    config.hidden_size, config.head_dim = 64, 16  # bitsandbytes packs 32 rows at a time
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(config).eval()
    exact.save_pretrained(tmp_path / "base")
    adapters = {
        "one": core.make_adapter(tmp_path / "1", exact),
        "two": core.make_adapter(tmp_path / "2", exact, seed=1, target_modules=["q_proj", "down_proj"]),
    }

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
        )

    theirs = peft.PeftModel.from_pretrained(load(), adapters["one"]).eval()
    model = MeteoraModel.from_adapters(load(), adapters)
    assert model.layers["model.layers.0.mlp.up_proj"].lora_A.dtype == torch.float32
    with model.route_to("one"):
        result = logits(model, core.tokens())
    torch.testing.assert_close(result, logits(theirs, core.tokens()))
    assert not torch.equal(result, logits(MeteoraModel.from_adapters(exact, adapters), core.tokens()))
    assert model.generate(core.tokens(), max_new_tokens=3, eos_token_id=None).shape == (3, 10)
    for objective in objectives:
        model = MeteoraModel.from_adapters(load(), adapters)
        history = gates_trained_on(model, core, objective, tmp_path / objective)
        assert history[-1]["gate_loss"] < history[0]["gate_loss"]
        again = MeteoraModel.from_pretrained(load(), tmp_path / objective)
        assert torch.equal(logits(again, core.tokens()), logits(model, core.tokens()))


MEASURE = """
import json, resource, sys, torch
from transformers import LlamaForCausalLM
from meteora import MeteoraModel
base, adapters = LlamaForCausalLM.from_pretrained(sys.argv[1]), json.loads(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = MeteoraModel.from_adapters(base, adapters)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = sum(t.nbytes for layer in model.layers.values() for t in (layer.lora_A, layer.lora_B))
print(json.dumps([(after - before) * 1024, held]))
"""


def test_loading_takes_one_extra_copy_of_the_adapters(core, tiny_llama, tmp_path):
    """The peak of a process of its own: the weights as read, and the weights in the layers."""
    tiny_llama.save_pretrained(tmp_path / "base")
    directory = core.make_adapter(tmp_path / "a", tiny_llama, r=4096)
    adapters = dict.fromkeys(map(str, range(6)), str(directory))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "base"), json.dumps(adapters)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, held = json.loads(done.stdout.splitlines()[-1])
    assert held > 100e6 and peak < 2.3 * held
