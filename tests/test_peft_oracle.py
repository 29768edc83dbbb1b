"""PEFT as an outside oracle: whatever it computes with the same files, ours must compute too."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.xlora.layer import XLoraLinearLayer
from transformers import get_cosine_schedule_with_warmup

import meteora
from meteora import MeteoraModel
from meteora.adapter_training import _fresh_adapters
from meteora.adapters import load_adapter
from meteora.batches import balanced_steps, by_task, collate, encode

BACKENDS = ["loop", "bmm", "dense"]


def peft_model(base, adapters):
    """All of ``adapters`` in one PeftModel; PEFT's names may not hold dots, so they are numbered."""
    base = copy.deepcopy(base)
    for n, directory in enumerate(adapters.values()):
        if n == 0:
            model = peft.PeftModel.from_pretrained(base, directory, adapter_name="a0")
        else:
            model.load_adapter(directory, adapter_name=f"a{n}")
    return model.eval()


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@pytest.fixture
def ours_and_theirs(core, tiny_llama, mixed_adapters):
    theirs = peft_model(tiny_llama, mixed_adapters)
    ours = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), mixed_adapters).eval()
    return core.randomize_gates(ours), theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_routing_is_set_adapter(core, ours_and_theirs, backend):
    ours, theirs = ours_and_theirs
    ours.set_backend(backend)
    outputs = []
    for n, name in enumerate(ours.adapter_names):
        theirs.set_adapter(f"a{n}")
        with ours.route_to(name):
            outputs.append(logits(ours, core.tokens()))
        torch.testing.assert_close(outputs[-1], logits(theirs, core.tokens()))
    assert all((outputs[0] - other).abs().max() > 1e-3 for other in outputs[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_is_a_mixed_batch(core, ours_and_theirs, backend):
    ours, theirs = ours_and_theirs
    ours.set_backend(backend)
    chosen = [3, 0, 2, 1, 0]
    with ours.route_to([ours.adapter_names[n] for n in chosen]):
        result = logits(ours, core.tokens(5))
    torch.testing.assert_close(result, logits(theirs, core.tokens(5), adapter_names=[f"a{n}" for n in chosen]))


def test_disabled_adapters_are_the_base_model_bitwise(core, tiny_llama, ours_and_theirs):
    ours, theirs = ours_and_theirs
    with ours.disable_adapters():
        result = logits(ours, core.tokens())
    assert torch.equal(result, logits(tiny_llama, core.tokens()))
    with theirs.disable_adapter():
        assert torch.equal(result, logits(theirs, core.tokens()))
    assert not torch.equal(result, logits(ours, core.tokens()))


def test_forced_generation_is_pefts(core, ours_and_theirs):
    ours, theirs = ours_and_theirs
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for n, name in enumerate(ours.adapter_names):
        theirs.set_adapter(f"a{n}")
        with ours.route_to(name):
            assert torch.equal(ours.generate(core.tokens(), **settings), theirs.generate(core.tokens(), **settings))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_is_xloras_with_our_weights_as_scalings(core, ours_and_theirs, top_k, backend):
    """X-LoRA scales every adapter of a layer for every token; our routing, written out, is one such choice."""
    ours, theirs = ours_and_theirs
    ours.set_top_k(top_k)
    ours.set_backend(backend)
    ours.set_temperature(2.0)
    names = [f"a{n}" for n in range(len(ours.adapter_names))]
    theirs.base_model.set_adapter(names)
    config = peft.XLoraConfig(adapters=dict.fromkeys(names, ""))
    for module in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
    ):
        layer, target = ours.layers[module], theirs.base_model.model.get_submodule(module)
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(3))
        scores, indices = (x @ layer.gate.weight.T).topk(top_k)
        scalings = torch.zeros(2, 5, 1, len(names))  # (batch, tokens, layers, adapters)
        scalings[:, :, 0].scatter_(-1, indices, torch.softmax(scores / 2.0, -1))
        xlora = XLoraLinearLayer(SimpleNamespace(disabled=False), target, target.forward, 0, config)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), xlora.forward(x, scalings=scalings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_trained_here_gives_stock_peft_the_same_outputs(core, tiny_llama, tmp_path, dtype):
    config = meteora.AdapterTrainingConfig(max_steps=2, learning_rate=0.05, rank=3, alpha=5, dtype=dtype)
    datasets = {task: [row for row in core.rows() if row["task"] == task] for task in ("one", "two")}
    meteora.train_adapters(tiny_llama, datasets, config, tokenizer=core.Tokenizer(), output_dir=tmp_path)
    ours = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), tmp_path)
    assert ours.adapter_names == ["one", "two"]
    for name in ours.adapter_names:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tmp_path / name)).eval()
        result = logits(theirs, core.tokens())
        with ours.route_to(name):
            torch.testing.assert_close(logits(ours, core.tokens()), result)
        assert (result - logits(tiny_llama, core.tokens())).abs().max() > 1e-2


def test_peft_trains_the_same_adapter_from_the_same_start(core, tiny_llama, tmp_path):
    """Stock PEFT, torch's AdamW and clipping, fed the same samples in the same order, arrive where ours arrives."""
    datasets = {task: [row for row in core.rows() if row["task"] == task] for task in ("one", "two")}
    config = meteora.AdapterTrainingConfig(
        max_steps=4, samples_per_step=3, learning_rate=0.02, weight_decay=2.0, warmup=0.5, rank=3, alpha=12,
        max_grad_norm=0.05, dtype="float32", tokens_per_batch=40,
    )  # fmt: skip
    history = meteora.train_adapters(
        tiny_llama, datasets, config, tokenizer=core.Tokenizer(), output_dir=tmp_path / "ours"
    )
    names = {"one": 0, "two": 1}
    groups = by_task(encode([r for rows in datasets.values() for r in rows], names, core.Tokenizer(), 1024))
    for task, number in names.items():
        model = peft.get_peft_model(
            copy.deepcopy(tiny_llama), peft.LoraConfig(r=3, lora_alpha=12, target_modules=core.all_linear)
        )
        start = _fresh_adapters(tiny_llama, list(names), config)[number]
        for module, weights in start.modules.items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A["default"].weight.data.copy_(weights.A)
            assert not layer.lora_B["default"].weight.any()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=2.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, 2, 4)
        losses = []
        for drawn in balanced_steps(groups, 3, 4, config.seed):
            batch = collate([sample for sample in drawn if sample.task == number], 2, torch.device("cpu"))
            loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            loss.backward()
            assert torch.nn.utils.clip_grad_norm_(trained, 0.05) > 0.05
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert [row["loss"] for row in history if row["task"] == task] == pytest.approx(losses, rel=1e-4)
        written = load_adapter(task, tmp_path / "ours" / task)
        for module, weights in written.modules.items():
            layer = model.base_model.model.get_submodule(module)
            # By norm: where a gradient is nearly zero, AdamW turns its rounding error into a whole step.
            for mine, part in ((weights.A, layer.lora_A), (weights.B, layer.lora_B)):
                stock = part["default"].weight.data
                assert (mine - stock).norm() < 0.01 * stock.norm(), module
