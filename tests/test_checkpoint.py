"""Checkpoints: whole or not at all, refused by name where they do not fit, on the hub as in a directory."""

import copy
import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import meteora
from meteora import AdapterError, MeteoraConfig, MeteoraModel, checkpoint, train_gates
from meteora.layer import MeteoraLinear

Q = "model.layers.0.self_attn.q_proj"
ODD = ["dots.in.it", "with space", "a/b", "日本", "..", "trailing."]


@pytest.fixture
def base(tiny_llama):
    return tiny_llama


@pytest.fixture
def model(core, base, mixed_adapters):
    return core.randomize_gates(MeteoraModel.from_adapters(copy.deepcopy(base), mixed_adapters))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("copy_adapters", [True, False])
def test_a_checkpoint_restores_everything(core, model, base, tmp_path, copy_adapters):
    model.set_top_k(3)
    model.set_temperature(7.5)
    model.set_least_share(0.25)
    model.set_backend("loop")
    model.state.untrained.clear()
    model.save_pretrained(tmp_path / "m", copy_adapters=copy_adapters)
    assert (tmp_path / "m" / "adapters").exists() == copy_adapters
    assert not list((tmp_path / "m").rglob("*.bin")) and not list((tmp_path / "m").rglob("*.pt"))
    again = MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")
    assert again.adapter_names == model.adapter_names
    assert (again.top_k, again.state.temperature, again.state.backend, again.state.least_share) == (3, 7.5, "loop", 0.25)
    assert "the chosen less than 0.25 together, they add nothing" in (tmp_path / "m" / "README.md").read_text()
    assert torch.equal(logits(again, core.tokens()), logits(model, core.tokens()))


def test_odd_names_survive(core, base, mixed_adapters, tmp_path):
    model = core.randomize_gates(MeteoraModel.from_adapters(base, dict.fromkeys(ODD, mixed_adapters["one"])))
    model.save_pretrained(tmp_path / "m")
    again = MeteoraModel.from_pretrained(model.unload(), tmp_path / "m")
    assert again.adapter_names == ODD
    for name in ODD:
        with again.route_to(name):
            logits(again, core.tokens(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_saving_onto_the_directory_it_came_from(core, model, base, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")
    core.randomize_gates(again, seed=5)
    with pytest.raises(AdapterError, match="'one' lies in .*which would be replaced"):
        again.save_pretrained(tmp_path / "m", copy_adapters=False)
    again.save_pretrained(tmp_path / "m")
    third = MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")
    assert torch.equal(logits(third, core.tokens()), logits(again, core.tokens()))


def test_saving_never_replaces_other_files(model, base, tmp_path, core):
    """A tokenizer, say, may lie in the same directory, saved before or after."""
    here = tmp_path / "m"
    (here / "more").mkdir(parents=True)
    for file in ("thesis.tex", "more/chapter.tex"):
        (here / file).write_text("years of work")
    (here / "link").symlink_to("more")
    core.make_adapter(here / "extra", base, r=2)
    for count in (4, 5):
        model.save_pretrained(here)
        assert len(list((here / "adapters").iterdir())) == count
        assert (here / "thesis.tex").read_text() == (here / "more" / "chapter.tex").read_text() == "years of work"
        assert (here / "link").is_symlink() and (here / "link" / "chapter.tex").is_file()
        if count == 4:
            model.add_adapter("extra", here / "extra")
    assert len(MeteoraModel.from_pretrained(copy.deepcopy(base), here).adapters) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="something else than a checkpoint, whose README.md would be lost; choose a new"):
        model.save_pretrained(tmp_path / "other")
    with pytest.raises(FileExistsError, match="README.md is a file; choose a new directory for a checkpoint"):
        model.save_pretrained(tmp_path / "other" / "README.md")
    assert (tmp_path / "other" / "README.md").read_text() == "mine"
    (here / "adapters" / "sql").mkdir()
    with pytest.raises(FileExistsError, match="adapters/sql is nothing that a checkpoint holds, and would be lost; move it"):
        model.save_pretrained(here)


def test_adapters_beside_a_checkpoint_may_be_referred_to(core, base, tmp_path):
    for name in ("one", "two"):
        core.make_adapter(tmp_path / "m" / name, base, r=2)
    made = MeteoraModel.from_adapters(copy.deepcopy(base), {name: tmp_path / "m" / name for name in ("one", "two")})
    for options in ({"copy_adapters": False}, {}):
        made.save_pretrained(tmp_path / "m", **options)
        again = MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")
    with pytest.raises(AdapterError, match="adapter 'one' lies in .*m/adapters, which would be replaced"):
        again.save_pretrained(tmp_path / "m", copy_adapters=False)


def test_another_alpha_is_another_adapter(base, mixed_adapters, tmp_path):
    """Also where the weights are the same."""
    folder = tmp_path / "adapters"
    for name, path in mixed_adapters.items():
        shutil.copytree(path, folder / quote(name))
    made = MeteoraModel.from_adapters(copy.deepcopy(base), folder)
    made.save_pretrained(tmp_path / "whole")
    made.save_pretrained(tmp_path / "referring", copy_adapters=False)
    one = next(folder.iterdir()) / "adapter_config.json"
    before = one.read_text()
    one.write_text(json.dumps(json.loads(before) | {"lora_alpha": 80}))
    for options in ({}, {"copy_adapters": False}):
        with pytest.raises(AdapterError, match="adapter_config.json changed since it was loaded; load the model again"):
            made.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(AdapterError, match="adapter_config.json at .* is not the one the gates in .*referring were trained"):
        MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "referring")
    MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "whole")
    one.write_text(before)
    MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "referring")
    settings = tmp_path / "whole" / "meteora_config.json"
    saved = json.loads(settings.read_text())
    for entry in saved["adapters"]:  # as those of before did not say it
        del entry["config_sha256"]
    settings.write_text(json.dumps(saved))
    MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "whole")


def test_a_failed_load_gives_the_base_model_back(model, base, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "m")
    gates = load_file(tmp_path / "m" / "gates.safetensors")
    list(gates.values())[-1][0, 0] = float("nan")
    save_file(gates, tmp_path / "m" / "gates.safetensors")
    again = copy.deepcopy(base)
    trainable = [parameter.requires_grad for parameter in again.parameters()]
    for _ in range(2):
        with pytest.raises(AdapterError, match="NaN or infinite"):
            MeteoraModel.from_pretrained(again, tmp_path / "m")
    def untouched():
        found = [parameter.requires_grad for parameter in again.parameters()]
        return found == trainable and not any(isinstance(module, MeteoraLinear) for module in again.modules())

    assert untouched()

    def full(self, module, weights, wrap=MeteoraModel._wrap):
        if module.endswith("down_proj"):
            raise RuntimeError("out of memory")
        wrap(self, module, weights)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(MeteoraModel, "_wrap", full)
        MeteoraModel.from_adapters(again, {"one": model.adapters[0].directory})
    assert untouched()


def test_what_was_unloaded_replaces_no_checkpoint(model, base, tmp_path, mixed_adapters):
    model.save_pretrained(tmp_path / "m")
    model.unload()
    name, path = next(iter(mixed_adapters.items()))
    for use in (
        lambda: model.save_pretrained(tmp_path / "m"),
        lambda: model.route_to(name).__enter__(),
        lambda: model.trace().__enter__(),
        lambda: model.add_adapter("new", path),
        lambda: train_gates(model, [], tokenizer=None),
    ):
        with pytest.raises(AdapterError, match="this model was unloaded; make a new one with from_adapters or from_pre"):
            use()
    MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")


def test_adapters_are_found_wherever_the_process_has_gone(base, mixed_adapters, tmp_path, monkeypatch):
    name, path = next(iter(mixed_adapters.items()))
    (tmp_path / "home" / "set").mkdir(parents=True)
    shutil.copytree(path, tmp_path / "home" / "set" / "one")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made = MeteoraModel.from_adapters(copy.deepcopy(base), "~/set")
    made.save_pretrained("~/mixture")
    assert len(MeteoraModel.from_pretrained(copy.deepcopy(base), "~/mixture").adapters) == 1
    monkeypatch.chdir(tmp_path / "home")
    relative = MeteoraModel.from_adapters(copy.deepcopy(base), {"one": "set/one"})
    monkeypatch.chdir("/")
    for target, options in (("copied", {}), ("referred", {"copy_adapters": False})):
        relative.save_pretrained(tmp_path / target, **options)
        MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / target)


def test_a_backend_of_another_machine_is_no_obstacle(model, base, tmp_path, monkeypatch, caplog):
    model.save_pretrained(tmp_path / "m")
    settings = tmp_path / "m" / "meteora_config.json"
    saved = json.loads(settings.read_text())
    saved["config"]["backend"] = "triton"
    settings.write_text(json.dumps(saved))
    monkeypatch.setattr(meteora.backends.triton, "why_not", lambda device_type: "it needs a GPU")
    assert MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m").state.backend == "auto"
    assert "m names a backend of another machine, so it is 'auto' here: backend 'triton' cannot run on" in caplog.text
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run on"):
        MeteoraModel.from_adapters(base, {"one": model.adapters[0].directory}, MeteoraConfig(backend="triton"))


def test_a_failed_save_leaves_the_old_checkpoint(model, base, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "m")

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(meteora.checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")


def test_a_changed_adapter_is_refused(model, base, mixed_adapters, tmp_path):
    source = Path(shutil.copytree(mixed_adapters["one"], tmp_path / "source"))
    mine = MeteoraModel.from_adapters(copy.deepcopy(base), {"one": source})
    mine.save_pretrained(tmp_path / "m", copy_adapters=False)
    weights = load_file(source / "adapter_model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, source / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match="'one' .*is not the one the gates .*sha256 is [0-9a-f]{64}, .*says [0-9a-f]{64}"
    ):
        MeteoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "m")
    for copy_adapters in (True, False):
        with pytest.raises(AdapterError, match="'one'.*changed since it was loaded"):
            mine.save_pretrained(tmp_path / "m2", copy_adapters=copy_adapters)
        assert not (tmp_path / "m2").exists()


@pytest.mark.parametrize("copy_adapters", [True, False])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_gone_is_named(base, mixed_adapters, tmp_path, file, copy_adapters):
    source = Path(shutil.copytree(mixed_adapters["one"], tmp_path / "source"))
    model = MeteoraModel.from_adapters(base, {"mine": source})
    (source / file).unlink()
    with pytest.raises(AdapterError, match=f"'mine': {source} has no {file} any more; put it back, or load") as error:
        model.save_pretrained(tmp_path / "m", copy_adapters=copy_adapters)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_broken_checkpoints_are_named(model, base, tmp_path):
    directory = tmp_path / "m"
    with pytest.raises(AdapterError, match="there is no directory .*m, and it is no hub id"):
        MeteoraModel.from_pretrained(base, directory)
    directory.mkdir()
    with pytest.raises(AdapterError, match="has no meteora_config.json"):
        MeteoraModel.from_pretrained(base, directory)
    model.save_pretrained(directory)
    gates = load_file(directory / "gates.safetensors")

    def refused(message):
        with pytest.raises(AdapterError, match=message):
            MeteoraModel.from_pretrained(copy.deepcopy(base), directory)

    save_file({**gates, Q: gates[Q][:3]}, directory / "gates.safetensors")
    refused(rf"the gate of '{Q}' has shape \(3, 32\); expected \(4, 32\)")
    save_file({**gates, Q: gates[Q] * torch.nan}, directory / "gates.safetensors")
    refused(f"the gate of '{Q}' holds NaN")
    save_file({name: gate for name, gate in gates.items() if name != Q}, directory / "gates.safetensors")
    refused(f"a gate for '{Q}' is on one side only")
    (directory / "gates.safetensors").write_bytes(b"not safetensors")
    refused("gates.safetensors is corrupt")
    saved = json.loads((directory / "meteora_config.json").read_text())
    (directory / "meteora_config.json").write_text(json.dumps({**saved, "format": 99}))
    refused("has format 99")
    for text in ("{", "[]"):
        (directory / "meteora_config.json").write_text(text)
        refused("not valid JSON|has format None")
    (directory / "gates.safetensors").unlink()
    refused("has no gates.safetensors")


@pytest.mark.parametrize("warned", [False, True])
def test_a_checkpoint_of_the_former_format_is_read(base, model, tmp_path, warned):
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "meteora_config.json"
    saved = json.loads(file.read_text())
    del saved["untrained"]
    file.write_text(json.dumps({**saved, "format": 1, "warning": "never trained" if warned else None}))
    again = MeteoraModel.from_pretrained(base, tmp_path / "m")
    assert again.state.untrained == (set(model.adapter_names) if warned else set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(untrained=["nobody"]), "has no usable 'untrained', as there is no adapter 'nobody'"),
        (lambda saved: saved.pop("adapters"), "has no usable 'adapters'"),
        (lambda saved: saved.pop("config"), "has no usable 'config'"),
        (lambda saved: saved.pop("untrained"), "has no usable 'untrained'"),
        (lambda saved: saved.update(adapters=None), "has no usable 'adapters'"),
        (lambda saved: saved["adapters"].append("one"), "has no usable 'name' of adapter 4"),
        (lambda saved: saved["adapters"][1].pop("name"), "has no usable 'name' of adapter 1"),
        (lambda saved: saved["adapters"][1].pop("sha256"), "has no usable 'sha256' of adapter 1"),
        (lambda saved: saved["adapters"][1].pop("directory"), "has no usable 'directory' or 'source' of adapter 1"),
    ],
)
def test_a_missing_setting_is_named(model, base, tmp_path, change, message):
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "meteora_config.json"
    saved = json.loads(file.read_text())
    change(saved)
    file.write_text(json.dumps(saved))
    with pytest.raises(AdapterError, match=f"meteora_config.json {message}; copy the checkpoint again") as error:
        MeteoraModel.from_pretrained(base, tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_setting_of_another_version_is_named(model, base, tmp_path):
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "meteora_config.json"
    saved = json.loads(file.read_text())
    for setting, value, message in (
        ("top_p", 0.9, r"a setting that is unknown here, config\['top_p'\]; update meteora"),
        ("temperature", 0, "meteora_config.json: temperature must be positive"),
    ):
        file.write_text(json.dumps(saved | {"config": saved["config"] | {setting: value}}))
        with pytest.raises(AdapterError, match=message):
            MeteoraModel.from_pretrained(base, tmp_path / "m")
    file.write_text(json.dumps(saved | {"adapters": []}))
    with pytest.raises(AdapterError, match="meteora_config.json names no adapters"):
        MeteoraModel.from_pretrained(base, tmp_path / "m")


def test_the_card_says_what_is_inside(model, base, tmp_path):
    model.state.untrained.clear()
    model.base_model.config._name_or_path = "me/tiny: a 'test'"
    model.save_pretrained(tmp_path / "m")
    _, header, body = (tmp_path / "m" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["base_model"] == "me/tiny: a 'test'" and header["pipeline_tag"] == "text-generation"
    for n, adapter in enumerate(model.adapters):
        assert f"| {n} | `{adapter.name}` | " in body and f"`{adapter.sha256[:12]}`" in body
    assert "4 LoRA adapters, and a gate in each of 14 linear layers that chooses\n2 of them" in body
    assert "The gates are trained." in body
    assert "| `one` | 4: 14 |" in body and "| `four` | 4: 2, 6: 1 |" in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    model.state.untrained = {"one", "four"}
    assert "The gates are trained, but not for `one`, `four`." in checkpoint.model_card(model)
    model.state.untrained = set(model.adapter_names)
    assert "never trained: what they choose is arbitrary" in checkpoint.model_card(model)


def test_the_card_holds_no_path_of_this_machine(core, base, mixed_adapters, tmp_path):
    base.save_pretrained(tmp_path / "secret" / "tiny")
    model = MeteoraModel.from_adapters(tmp_path / "secret" / "tiny", mixed_adapters)
    assert "secret" not in checkpoint.model_card(model) and "`tiny`" in checkpoint.model_card(model)


class FakeHub:
    """The two calls of the hub's client that are used; what is uploaded lands in ``folder``."""

    def __init__(self, folder):
        self.folder, self.made = folder, []

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.folder / repo_id)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    def download(self, repo_id, revision, allow_patterns):
        self.revision = revision
        here = self.folder / repo_id
        if not here.is_dir():
            raise LocalEntryNotFoundError("offline")
        found = {path for pattern in allow_patterns for path in here.glob(pattern)}
        copied = self.folder / "cache"
        for path in found:
            (copied / path.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied / path.relative_to(here))
        return str(copied)


def test_a_checkpoint_goes_to_the_hub_and_comes_back(core, model, base, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(checkpoint, "HfApi", hub)
    monkeypatch.setattr(checkpoint, "snapshot_download", hub.download)
    assert model.push_to_hub("me/mixture", private=True, token="t") == "https://hub/me/mixture/commit/1"
    assert (hub.made, hub.token) == ([("me/mixture", True, True)], "t")
    assert (tmp_path / "me" / "mixture" / "README.md").is_file()
    again = MeteoraModel.from_pretrained(copy.deepcopy(base), "me/mixture", revision="v1")
    assert hub.revision == "v1"
    assert torch.equal(logits(again, core.tokens()), logits(model, core.tokens()))
    assert not list((tmp_path / "cache").rglob("README.md"))  # only what is read is downloaded
    with pytest.raises(AdapterError, match="no directory me/other, and the hub did not give it .*network"):
        MeteoraModel.from_pretrained(base, "me/other")


@pytest.mark.parametrize("error", HfHubHTTPError.__bases__, ids=lambda error: error.__name__)
def test_a_hub_that_refuses_or_is_silent_is_one_sentence(model, monkeypatch, error):
    class Refusing(FakeHub):
        def create_repo(self, repo_id, **options):
            raise error("no route to host")

    monkeypatch.setattr(checkpoint, "HfApi", Refusing(None))
    with pytest.raises(AdapterError, match="the hub did not take 'me/mixture' .*your token") as told:
        model.push_to_hub("me/mixture")
    assert "\n" not in str(told.value)
    monkeypatch.undo()
    with pytest.raises(AdapterError, match="'no id at all' is no hub id"):
        model.push_to_hub("no id at all")


def test_the_weights_are_held_once(model, mixed_adapters):
    model.add_adapter("late", mixed_adapters["one"])
    assert len(model.adapters) == 5 and not any(adapter.modules for adapter in model.adapters)
