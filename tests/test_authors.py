"""The authors' checkpoint: a state dict of the same form, made here, gives what their formula gives."""

import copy
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora import AdapterError, MeteoraConfig, MeteoraModel
from meteora.adapters import load_adapter

Q = "model.layers.0.self_attn.q_proj"
NAMES = ["gsm8k", "news_de", "winowhy"]


@pytest.fixture
def adapters(core, tiny_llama, tmp_path):
    """Three adapters of one rank, as the authors' code needs them."""
    return {
        name: str(core.make_adapter(tmp_path / "adapters" / name, tiny_llama, seed=n)) for n, name in enumerate(NAMES)
    }


def state_dict_of(base, adapters, *, moved=0.0, dtype=torch.float32):
    """Their whole model's state dict, its LoRA weights ``moved`` by training (relative to their own size)."""
    torch.manual_seed(7)
    loaded = [load_adapter(name, source) for name, source in adapters.items()]
    state = {}
    for name, tensor in base.state_dict().items():
        module = name.removesuffix(".weight")
        adapted = module in loaded[0].modules
        state[f"base_model.model.{module}{'.base_layer' if adapted else ''}.weight"] = tensor
        if adapted:
            pairs = [adapter.modules[module] for adapter in loaded]
            A, B = torch.cat([pair.A for pair in pairs]), torch.cat([pair.B for pair in pairs], dim=1)
            key = f"base_model.model.{module}"
            state[f"{key}.lora_A.weight"] = A + moved * A.std() * torch.randn_like(A)
            state[f"{key}.lora_B.weight"] = B + moved * B.std() * torch.randn_like(B)
            state[f"{key}.moe_gate.weight"] = torch.randn(len(loaded), A.shape[1])
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def theirs(base, state, ids, top_k, temperature):
    """The authors' forward pass written out: their gate, their top-k, and adapter n in rows n * r .. n * r + r - 1."""

    def patch(name):
        A, B, G = (state[f"base_model.model.{name}.{part}.weight"] for part in ("lora_A", "lora_B", "moe_gate"))
        r = len(A) // len(G)

        def hook(module, args, y):
            values, indices = (args[0] @ G.T).topk(top_k)
            weights = torch.softmax(values / temperature, dim=-1)
            for n in range(len(G)):
                share = (weights * (indices == n)).sum(-1, keepdim=True)
                y = y + share * (8 / 4) * (args[0] @ A[n * r : n * r + r].T @ B[:, n * r : n * r + r].T)
            return y

        return hook

    base = copy.deepcopy(base)
    for name, module in base.named_modules():
        if f"base_model.model.{name}.moe_gate.weight" in state:
            module.register_forward_hook(patch(name))
    return logits(base, ids)


@pytest.mark.parametrize("moved", [0.0, 0.5])
@pytest.mark.parametrize("form", ["safetensors", "no-suffix", "shards", "torch"])
def test_it_is_their_model(core, tiny_llama, adapters, tmp_path, moved, form):
    state = state_dict_of(tiny_llama, adapters, moved=moved)
    file = tmp_path / {"safetensors": "model.safetensors", "no-suffix": "top_2", "shards": "s", "torch": "m.pt"}[form]
    if form == "torch":
        torch.save(state, file)
    elif form == "shards":
        file.mkdir()
        for n in (0, 1):
            save_file(dict(list(state.items())[n::2]), file / f"model-{n}.safetensors")
    else:
        save_file(state, file)
    expected = theirs(tiny_llama, state, core.tokens(), 2, 15.0)
    config = MeteoraConfig(top_k=2, temperature=15.0)
    model = MeteoraModel.from_authors_checkpoint(copy.deepcopy(tiny_llama), adapters, file, config)
    assert model.adapter_names == NAMES and model.state.warning is None
    assert [adapter.in_memory for adapter in model.adapters] == [moved > 0] * 3
    torch.testing.assert_close(logits(model, core.tokens()), expected, rtol=1e-4, atol=1e-4)
    if moved:
        with pytest.raises(AdapterError, match="'gsm8k' lies in no directory yet; leave out copy_adapters=False"):
            model.save_pretrained(tmp_path / "m", copy_adapters=False)
    model.save_pretrained(tmp_path / "m")
    again = MeteoraModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "m")
    assert torch.equal(logits(again, core.tokens()), logits(model, core.tokens()))
    with again.route_to("winowhy"):  # a stock PEFT adapter, with the trained weights
        own = MeteoraModel.from_adapters(tiny_llama, {"it": tmp_path / "m" / "adapters" / "002"})
        with own.route_to("it"):
            torch.testing.assert_close(logits(again, core.tokens()), logits(own, core.tokens()))


def test_bf16_of_float32_adapters_is_no_change(tiny_llama, adapters, tmp_path):
    save_file(state_dict_of(tiny_llama, adapters, dtype=torch.bfloat16), tmp_path / "m.safetensors")
    model = MeteoraModel.from_authors_checkpoint(tiny_llama, adapters, tmp_path / "m.safetensors")
    assert not any(adapter.in_memory for adapter in model.adapters)
    assert all(layer.gate.weight.dtype == torch.float32 for layer in model.layers.values())


@pytest.fixture
def refused(tiny_llama, adapters, tmp_path):
    def check(change, message, given=None):
        state = state_dict_of(tiny_llama, adapters, moved=0.3)
        change(state)
        file = tmp_path / "m.safetensors"
        save_file(state, file)
        with pytest.raises(AdapterError, match=message) as error:
            MeteoraModel.from_authors_checkpoint(copy.deepcopy(tiny_llama), given or adapters, file)
        assert "\n" not in str(error.value)

    return check


def keep(state):
    pass


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_a_permutation_is_refused_by_name(refused, adapters, order):
    given = [NAMES[n] for n in order]
    right = ", ".join(map(repr, NAMES))
    message = rf"place 0 is 'gsm8k', but '{given[0]}' was given there; the checkpoint's order is {right}"
    refused(keep, message, {name: adapters[name] for name in given})


@pytest.mark.parametrize("module", [Q, "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_a_permutation_in_one_module_is_refused_by_name(refused, module, order):
    def permute(state):
        key = f"base_model.model.{module}"
        A, B = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
        state[f"{key}.lora_A.weight"] = torch.cat([A.chunk(3)[n] for n in order])
        state[f"{key}.lora_B.weight"] = torch.cat([B.chunk(3, dim=1)[n] for n in order], dim=1)

    found = NAMES[order[0]]
    refused(permute, f"in module '{module}' the adapter in place 0 is '{found}', which elsewhere is 'gsm8k'; .*again")


def test_a_module_that_an_adapter_left_at_zero_has_no_order(core, tiny_llama, adapters, tmp_path):
    file = tmp_path / "adapters" / "gsm8k" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[f"base_model.model.{Q}.lora_B.weight"].zero_()
    save_file(weights, file)
    state = state_dict_of(tiny_llama, adapters, moved=0.3)
    state[f"base_model.model.{Q}.lora_B.weight"][:, :4] = 0.01 * torch.randn(32, 4)
    save_file(state, tmp_path / "m.safetensors")
    MeteoraModel.from_authors_checkpoint(tiny_llama, adapters, tmp_path / "m.safetensors")


def test_other_adapters_are_refused(core, refused, tiny_llama, adapters, tmp_path):
    other = {**adapters, "winowhy": str(core.make_adapter(tmp_path / "other", tiny_llama, seed=9))}
    refused(keep, r"in place 2, where 'winowhy' was given, resembles none of those given \(its cosine", other)
    refused(keep, "mixes 3 adapters, 2 were given", {name: adapters[name] for name in NAMES[:2]})
    rank = {**adapters, "news_de": str(core.make_adapter(tmp_path / "rank", tiny_llama, r=2))}
    refused(keep, r"'news_de' has lora_A \(2, .* and lora_B \(.*, 2\) in 'model\..*', the checkpoint \(4, ", rank)
    some = {**adapters, "gsm8k": str(core.make_adapter(tmp_path / "some", tiny_llama, target_modules=["q_proj"]))}
    refused(keep, "does not match adapter 'gsm8k': only one of them has 'model.layers.0.mlp.down_proj'", some)


def test_the_same_adapter_twice_has_no_order(tiny_llama, adapters, tmp_path):
    twice = {"a": adapters["gsm8k"], "b": adapters["winowhy"], "c": adapters["gsm8k"]}
    save_file(state_dict_of(tiny_llama, twice), tmp_path / "m.safetensors")
    assert MeteoraModel.from_authors_checkpoint(tiny_llama, twice, tmp_path / "m.safetensors").adapter_names == [
        "a",
        "b",
        "c",
    ]


def test_what_is_missing_or_misshapen_is_named(refused):
    def cut(part, size):
        def change(state):
            state[f"base_model.model.{Q}.{part}.weight"] = torch.ones(size)

        return change

    refused(lambda state: state.pop(f"base_model.model.{Q}.lora_B.weight"), f"module '{Q}' has no lora_B")
    shapes = re.escape("moe_gate (3, 32), lora_A (11, 32) and lora_B (32, 12); expected (N, in)")
    refused(cut("lora_A", (11, 32)), f"module '{Q}' has {shapes}")
    refused(cut("moe_gate", (3,)), rf"module '{Q}' has moe_gate \(3,\)")
    refused(cut("moe_gate", (3, 31)), rf"module '{Q}' has moe_gate \(3, 31\)")
    refused(
        lambda state: state[f"base_model.model.{Q}.moe_gate.weight"].fill_(torch.nan), f"moe_gate of module '{Q}' holds"
    )
    refused(lambda state: [state.pop(key) for key in list(state) if "moe" in key or "lora" in key], "holds no moe_gate")


def test_files_that_are_none_are_refused(tiny_llama, adapters, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    (tmp_path / "text").write_bytes(b"not a checkpoint")
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "empty").mkdir()
    for file, message in (
        ("gone", "is no file, nor a folder"),
        ("empty", "is no file, nor a folder"),
        ("text", "text is no safetensors file, or a corrupt one"),
        ("old.bin", "old.bin is no safetensors file"),
        ("evil.pt", "holds more than tensors, or is corrupt, and is not unpickled"),
    ):
        with pytest.raises(AdapterError, match=message):
            MeteoraModel.from_authors_checkpoint(tiny_llama, adapters, tmp_path / file)
