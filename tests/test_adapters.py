"""PEFT directories: read as PEFT reads them, refused by name where they are more than B A x."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from meteora import AdapterError, MeteoraModel, adapters
from meteora.adapters import adapter_directory, file_sha256, list_adapters, load_adapter

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def broken(mixed_adapters, tmp_path):
    """A copy of an adapter, and a function that changes its configuration or tensors."""
    directory = Path(shutil.copytree(mixed_adapters["one"], tmp_path / "copy"))

    def change(config=None, tensors=None):
        if config is not None:
            saved = json.loads((directory / "adapter_config.json").read_text())
            (directory / "adapter_config.json").write_text(json.dumps({**saved, **config}))
        if tensors is not None:
            weights = load_file(directory / "adapter_model.safetensors")
            tensors(weights)
            save_file(weights, directory / "adapter_model.safetensors")
        return directory

    return change


def refused(directory, message):
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter("mine", directory)
    assert "'mine'" in str(error.value) and "\n" not in str(error.value)


def test_what_is_read(mixed_adapters):
    adapter = load_adapter("x", mixed_adapters["one"])
    assert len(adapter.modules) == 14 and adapter.modules[Q].rank == 4
    assert adapter.modules[Q].A.shape == (4, 32) and adapter.modules[Q].B.shape == (32, 4)
    assert adapter.modules[Q].scaling == 2.0
    assert adapter.sha256 == file_sha256(Path(mixed_adapters["one"]) / "adapter_model.safetensors")


def test_scalings_follow_rslora_and_patterns(mixed_adapters):
    rslora = load_adapter("x", mixed_adapters["two. with/odd names ü"])
    assert rslora.modules[Q].scaling == pytest.approx(3 / 2**0.5)
    patterns = load_adapter("x", mixed_adapters["four"])
    assert {name: (w.rank, w.scaling) for name, w in patterns.modules.items()} == {
        "model.layers.1.self_attn.k_proj": (4, 1 / 4),
        "model.layers.1.self_attn.o_proj": (4, 8 / 4),
        "model.layers.1.mlp.up_proj": (6, 8 / 6),
    }


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 1]]},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
)
def test_more_than_a_plain_lora_is_refused_by_name(broken, config):
    refused(broken(config), next(iter(config)))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "PiSSA", "corda", "loftq"])
def test_initialisations_that_change_the_base_are_refused(broken, init):
    refused(broken({"init_lora_weights": init}), f"initialised by '{init.lower()}'.*path_initial_model")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_do_not_are_read(broken, init):
    assert load_adapter("mine", broken({"init_lora_weights": init})).modules


def test_other_kinds_of_adapters_are_refused(broken):
    refused(broken({"peft_type": "LOHA"}), "of type 'LOHA'")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(broken, value):
    def change(tensors):
        tensors[f"base_model.model.{Q}.lora_B.weight"][0, 0] = value

    refused(broken(tensors=change), f"{Q}.*NaN or infinite")


def test_a_missing_half_is_named(broken):
    refused(broken(tensors=lambda t: t.pop(f"base_model.model.{Q}.lora_B.weight")), f"{Q}.*only lora_A")


def test_ranks_that_differ_are_named(broken):
    def change(tensors):
        tensors[f"base_model.model.{Q}.lora_B.weight"] = torch.zeros(32, 3)

    refused(broken(tensors=change), rf"{Q}.*lora_A \(4, 32\) and lora_B \(32, 3\)")


def test_a_configuration_of_another_rank_is_refused(broken):
    refused(broken({"r": 8}), "has rank 4, but adapter_config.json says 8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": None}, "has lora_alpha=None, which must be a finite number"),
        ({"lora_alpha": "16"}, "has lora_alpha='16', which must be a finite number"),
        ({"lora_alpha": True}, "has lora_alpha=True, which must be a finite number"),
        ({"lora_alpha": float("nan")}, "has lora_alpha=nan, which must be a finite number"),
        ({"r": None}, "has r=None, which must be a positive number"),
        ({"r": "4"}, "has r='4', which must be a positive number"),
        ({"r": 0}, "has r=0, which must be a positive number"),
        ({"rank_pattern": {"q_proj": None}}, r"has rank_pattern\['q_proj'\]=None, which must be a positive number"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"has alpha_pattern\['q_proj'\]='8', which must be a finite number"),
        ({"alpha_pattern": ["q_proj"]}, r"has alpha_pattern=\['q_proj'\], which must be an object"),
    ],
)
def test_what_is_no_rank_or_alpha_is_named(broken, config, message):
    refused(broken(config), f"copy/adapter_config.json {message}; save the adapter again")


@pytest.mark.parametrize("key", ["lora_embedding_A", "lora_magnitude_vector", "base_layer.weight", "lora_B.bias"])
def test_other_tensors_are_refused(broken, key):
    def change(tensors):
        tensors[f"base_model.model.{Q}.{key}"] = torch.zeros(4)

    refused(broken(tensors=change), f"holds 'base_model.model.{Q}.{key}'")


def test_corrupt_files_are_named(broken):
    directory = broken()
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    refused(directory, "adapter_model.safetensors is corrupt")
    (directory / "adapter_config.json").write_text('{"peft_type": ')
    refused(directory, "adapter_config.json is not valid JSON")
    (directory / "adapter_config.json").write_text("[]")
    refused(directory, "not a PEFT configuration")


def test_pickled_weights_are_never_opened(broken, monkeypatch):
    directory = broken()
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    refused(directory, "has no adapter_model.safetensors.*pickled")


def test_what_is_neither_directory_nor_hub_id(tmp_path):
    refused(tmp_path / "gone" / "far", "there is no directory")


def test_a_hub_id_is_downloaded_without_pickles(mixed_adapters, monkeypatch):
    asked = []

    def download(source, allow_patterns):
        asked.append((source, allow_patterns))
        return mixed_adapters["one"]

    monkeypatch.setattr(adapters, "snapshot_download", download)
    assert load_adapter("mine", "someone/adapter").source == "someone/adapter"
    assert asked == [("someone/adapter", ["adapter_config.json", "adapter_model.safetensors"])]


def test_no_network_is_said_in_one_sentence(monkeypatch):
    def download(source, allow_patterns):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(adapters, "snapshot_download", download)
    refused("someone/adapter", "hub did not give it.*check the path, the id or the network")


@pytest.mark.parametrize(
    "name", ["gsm8k", "a.b", ".hidden", "..", ".", "a/b", "a b", "日本語", "100%", "C:\\x", "%2Fx"]
)
def test_every_name_has_a_directory_and_comes_back_from_it(mixed_adapters, tmp_path, name):
    directory = adapter_directory(tmp_path, name)
    assert directory.parent == tmp_path
    shutil.copytree(mixed_adapters["one"], directory)
    assert list_adapters(tmp_path) == {name: str(directory)}


def test_a_folder_lists_what_is_complete(mixed_adapters, tmp_path):
    shutil.copytree(mixed_adapters["one"], tmp_path / "b")
    shutil.copytree(mixed_adapters["three"], tmp_path / "a")
    shutil.copytree(mixed_adapters["one"], tmp_path / ".c.17.new")
    (tmp_path / "notes").mkdir()
    assert list(list_adapters(tmp_path)) == ["a", "b"]


def test_two_folders_of_one_name_are_refused(mixed_adapters, tmp_path):
    for name in ("a b", "a%20b"):
        shutil.copytree(mixed_adapters["one"], tmp_path / name)
    with pytest.raises(AdapterError, match="two folders for an adapter 'a b', 'a b' and 'a%20b'; rename one"):
        list_adapters(tmp_path)


def test_what_is_neither_a_dict_nor_a_folder_is_refused(tiny_llama, mixed_adapters):
    with pytest.raises(AdapterError, match="a dict name -> directory or hub id, or one folder .* not a list"):
        MeteoraModel.from_adapters(tiny_llama, list(mixed_adapters.values()))


@pytest.mark.parametrize("given", [{}, [], {"": "x"}, {3: "x"}])
def test_no_adapters_and_no_names_are_refused(given):
    with pytest.raises(AdapterError, match="no adapters given|non-empty string"):
        list_adapters(given)


def test_what_lies_too_deep_in_a_folder_is_named(mixed_adapters, tmp_path, caplog):
    for place in ("sql", "sql/checkpoint-5", "deep/checkpoint-5", ".new/checkpoint-5"):
        shutil.copytree(mixed_adapters["one"], tmp_path / place, dirs_exist_ok=True)
    assert list(list_adapters(tmp_path)) == ["sql"]
    assert "deep/checkpoint-5 lies too deep" in caplog.text and "sql/" not in caplog.text and ".new" not in caplog.text


def test_a_folder_without_adapters_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="holds no PEFT directory"):
        list_adapters(tmp_path)
    with pytest.raises(AdapterError, match="is not a folder"):
        list_adapters(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="is a PEFT directory itself; give a dict name -> path"):
        list_adapters(tmp_path)
    with pytest.raises(AdapterError, match="adapter 'a' must be given by its directory or hub id, not as a NoneType"):
        list_adapters({"a": None})


def test_an_adapter_of_another_base_model_is_told_by_shapes_and_modules(broken, tiny_llama):
    directory = broken(tensors=lambda t: t.update({f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 16)}))
    with pytest.raises(AdapterError, match=rf"'mine' expects '{Q}' to be 16 -> 32, the base model's is 32 -> 32"):
        MeteoraModel.from_adapters(tiny_llama, {"mine": directory})

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)

    directory = broken(tensors=lambda t: t.update({f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 32)}))
    with pytest.raises(AdapterError, match="'mine' has weights for 'model.layers.7.*does not have"):
        MeteoraModel.from_adapters(tiny_llama, {"mine": broken(tensors=rename)})
    assert type(tiny_llama.get_submodule(Q)) is torch.nn.Linear  # nothing was changed on the way
