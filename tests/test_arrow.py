"""Gates without training: prototypes by a plain SVD, and the whole model by PEFT's own Arrow."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from meteora import GateTrainingConfig, MeteoraConfig, MeteoraLinear, MeteoraModel, train_gates
from meteora.adapters import WEIGHTS_FILE, LoraWeights
from meteora.arrow import prototypes
from meteora.layer import MixtureState


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prototypes_are_the_svds(dtype):
    torch.manual_seed(0)
    ranks = {0: 3, 1: 1, 3: 3, 4: 9}  # adapter 2 has no weights here; 9 is more than the 7 features
    adapters = {n: LoraWeights(torch.randn(r, 7), torch.randn(12, r), 0.1 + n) for n, r in ranks.items()}
    layer = MeteoraLinear(nn.Linear(7, 12), 5, adapters, MixtureState(top_k=2), dtype=dtype)
    found = prototypes(layer)
    assert found.shape == (5, 7) and found.dtype == torch.float32 and not found[2].any()
    for n, w in adapters.items():
        v = torch.linalg.svd(w.B.to(dtype).double() @ w.A.to(dtype).double()).Vh[0]
        assert (found[n].double() @ v).abs() == pytest.approx(1, abs=1e-5 if dtype == torch.float32 else 1e-3)
        assert found[n].norm() == pytest.approx(1, abs=1e-5)


def test_an_update_of_zero_has_no_prototype():
    """As PEFT initialises an adapter, and as a task may leave it in some layers."""
    ones = LoraWeights(torch.ones(2, 5), torch.ones(4, 2), 1.0)
    adapters = {0: LoraWeights(torch.randn(2, 5), torch.zeros(4, 2), 1.0), 1: ones}
    layer = MeteoraLinear(nn.Linear(5, 4), 2, adapters, MixtureState(top_k=1), dtype=torch.float32)
    found = prototypes(layer)
    assert not found[0].any() and torch.isfinite(found).all()
    torch.testing.assert_close(found[1].abs(), torch.full((5,), 5**-0.5))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_model_is_pefts_arrow(core, tiny_llama, tmp_path, top_k):
    folders = []
    for n in range(3):
        folders.append(str(core.make_adapter(tmp_path / str(n), tiny_llama, seed=n)))
        weights = load_file(f"{folders[-1]}/{WEIGHTS_FILE}")
        for name in weights:
            if "lora_B" in name:
                weights[name][:, 0] *= 6  # PEFT iterates, and needs a gap behind the first singular value
        save_file(weights, f"{folders[-1]}/{WEIGHTS_FILE}")
    arrow = peft.ArrowConfig(top_k=top_k, router_temperature=2.0)
    theirs = peft.create_arrow_model(copy.deepcopy(tiny_llama), folders, arrow).eval()
    config = MeteoraConfig(top_k=top_k, temperature=2.0)
    adapters = {str(n): folder for n, folder in enumerate(folders)}
    ours = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), adapters, config, gates="arrow")
    assert ours.state.warning is None and not config.absolute_logits
    torch.testing.assert_close(logits(ours, core.tokens()), logits(theirs, core.tokens()), rtol=1e-3, atol=1e-3)
    ours.save_pretrained(tmp_path / "m")
    assert "as in Arrow" in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    again = MeteoraModel.from_pretrained(tiny_llama, tmp_path / "m")
    assert torch.equal(logits(again, core.tokens()), logits(ours, core.tokens()))


def test_signs_mean_nothing(core, tiny_llama, mixed_adapters):
    model = MeteoraModel.from_adapters(tiny_llama, mixed_adapters, gates="arrow")
    before = logits(model, core.tokens())
    with torch.no_grad():
        for n, layer in enumerate(model.layers.values()):
            layer.gate.weight[n % 4] *= -1
    torch.testing.assert_close(logits(model, core.tokens()), before)
    with torch.no_grad(), model.trace() as trace:
        model(core.tokens())
    assert all((seen >= 0).all() for seen in trace.logits.values())


def test_an_added_adapter_needs_no_training_either(core, tiny_llama, mixed_adapters):
    names = list(mixed_adapters)
    whole = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), mixed_adapters, gates="arrow")
    some = {name: mixed_adapters[name] for name in names[2:]}
    grown = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), some, gates="arrow")
    for name in names[:2]:
        grown.add_adapter(name, mixed_adapters[name])
    assert grown.state.warning is None
    torch.testing.assert_close(logits(grown, core.tokens()), logits(whole, core.tokens()))


def test_what_no_training_has_seen_is_untrained(core, tiny_llama, mixed_adapters):
    adapters = {"one": mixed_adapters["one"], "two": mixed_adapters["three"]}
    model = MeteoraModel.from_adapters(tiny_llama, adapters, gates="arrow")
    train_gates(model, core.rows(["one"]), GateTrainingConfig(max_steps=2), tokenizer=core.Tokenizer())
    assert model.state.untrained == {"two"} and "never trained for 'two'" in model.state.warning


@pytest.mark.parametrize("objective", ["joint", "gate"])
def test_training_starts_anew(core, tiny_llama, mixed_adapters, objective):
    adapters = {"one": mixed_adapters["one"], "two": mixed_adapters["three"]}
    config = GateTrainingConfig(objective=objective, max_steps=3, learning_rate=0.01)
    results = []
    for gates in (None, "arrow"):
        model = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), adapters, gates=gates)
        history = train_gates(model, core.rows(), config, tokenizer=core.Tokenizer())
        assert not model.state.absolute_logits
        results.append(([row["loss"] for row in history], logits(model, core.tokens())))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_other_gates_are_refused(tiny_llama, mixed_adapters):
    with pytest.raises(ValueError, match="unknown gates 'random'; choose 'arrow', or None"):
        MeteoraModel.from_adapters(tiny_llama, mixed_adapters, gates="random")
