"""How long loading takes: it times `from_adapters` on files of the model's shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from meteora import MeteoraModel
from meteora.study import loading_speed
from meteora.study.artifacts import Workspace
from meteora.study.loading_speed import COLUMNS, main, measure_loading
from meteora.study.profiles import PROFILES
from meteora.study.readme import training_block

WHOLE = Workspace("smoke").profile.benchmark.model


def test_what_is_timed_is_loading_as_anyone_calls_it(monkeypatch):
    loaded = []
    real = MeteoraModel.from_adapters

    def watched(base, places):
        assert all((place / "adapter_model.safetensors").is_file() for place in places.values())
        loaded.append(real(base, places))
        return loaded[-1]

    monkeypatch.setattr(loading_speed.MeteoraModel, "from_adapters", watched)
    rows = pd.DataFrame(measure_loading(WHOLE, "bfloat16", torch.device("cpu"))).set_index("metric")
    [model] = loaded
    assert len(model.adapter_names) == WHOLE.adapters and set(rows["adapters"]) == {WHOLE.adapters}
    ones = [layer.lora_A[0] for layer in model.layers.values()]
    assert all(one.dtype == torch.bfloat16 and one.any() for one in ones)
    held = sum(layer.ranks[0][1] * (layer.in_features + layer.out_features) for layer in model.layers.values())
    assert rows["value"]["adapter_bytes"] == 2 * held * WHOLE.adapters and rows["value"]["seconds"] > 0


def test_the_peak_is_what_loading_took(monkeypatch):
    large = replace(WHOLE, rank=64, adapters=64, shape=replace(WHOLE.shape, hidden_size=256, intermediate_size=1024))
    rows = pd.DataFrame(measure_loading(large, "float32", torch.device("cpu"))).set_index("metric")["value"]
    assert rows["adapter_bytes"] > 60e6
    assert rows["adapter_bytes"] < rows["peak_bytes"] < 2.5 * rows["adapter_bytes"]


def test_the_command_line(tmp_path, caplog, monkeypatch):
    path = tmp_path / "smoke.yaml"
    path.write_text((PROFILES / "smoke.yaml").read_text(encoding="utf-8") + f"\nroot: {tmp_path}\n", encoding="utf-8")
    assert main(["--profile", str(path)]) == 0
    frame = pd.read_csv(tmp_path / "results" / "smoke" / "metrics" / "loading_speed.csv")
    assert tuple(frame.columns) == COLUMNS and frame["metric"].tolist() == ["seconds", "adapter_bytes", "peak_bytes"]
    (tmp_path / "results" / "smoke").rename(tmp_path / "results" / "laptop")
    assert f"`from_adapters` puts {WHOLE.adapters} adapters of rank" in training_block(tmp_path / "results")
    assert main(["--profile", "laptop"]) == 2
    assert caplog.messages[-1] == "error: profile 'laptop' has no section benchmark.model; give it one."
    real = Path.write_text

    def elsewhere(path, *arguments, **options):
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", elsewhere)
    assert main(["--profile", str(path)]) == 2 and "on Linux alone" in caplog.messages[-1]
