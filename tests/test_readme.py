"""README.md says what is true: its tables come from the files, its example runs, its names exist."""

from __future__ import annotations

import importlib
import json
import re
import subprocess

import pandas as pd
import peft
import pytest

import meteora
from data_prep.base_models import load_base_model
from data_prep.sources import SMOLLM2, cache_root
from meteora.adapters import file_sha256
from meteora.study.benchmark_rows import RowFile, make_row
from meteora.study.profiles import REPOSITORY, load_profile
from meteora.study.readme import (
    NO_RESULTS, README, READMES, claims_block, fill, results_block, speed_block, summary_block, training_block,
)  # fmt: skip
from meteora.study.tables import interval_text

TEXT = README.read_text(encoding="utf-8")


def changed_in_checkout(folder: str) -> bool:
    command = ["git", "status", "--porcelain", folder]
    status = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return status.returncode == 0 and bool(status.stdout)


@pytest.mark.skipif(changed_in_checkout("results"), reason="results/ holds a run that is not committed")
@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_generated_tables_are_up_to_date(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert fill(text, READMES[path]()) == text, "run .venv/bin/meteora-study --readme"


def test_the_adapters_that_come_with_the_repository_are_those_of_the_laptops_record() -> None:
    folder = load_profile("laptop").adapters.path
    manifest = json.loads((REPOSITORY / "results" / "laptop" / "manifest.json").read_text(encoding="utf-8"))
    recorded = {name: sha for name, sha in manifest["inputs"]["files"].items() if name.startswith("adapters/")}
    paths = {f"adapters/{path.relative_to(folder).as_posix()}": path for path in folder.glob("*/*.safetensors")}
    here = {name: file_sha256(path) for name, path in paths.items()}
    assert here == recorded, "run profile laptop anew, or take the adapters back"


@pytest.mark.parametrize("profile", ["laptop", "smollm2"])
def test_a_record_has_the_digests_of_all_its_adapters_and_gates(profile: str) -> None:
    manifest = json.loads((REPOSITORY / "results" / profile / "manifest.json").read_text(encoding="utf-8"))
    recorded, what = manifest["inputs"]["files"], "adapter_model.safetensors"
    assert {f"adapters/{task}/{what}" for task in manifest["profile"]["tasks"]} < set(recorded)
    assert "gates/gates.safetensors" in recorded


def test_what_profile_smollm2_ships_is_what_it_trained() -> None:
    folder = REPOSITORY / "results" / "smollm2"
    recorded = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["inputs"]["files"]
    paths = [*folder.glob("adapters/*/*.safetensors"), *folder.glob("gates/*.safetensors")]
    here = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    assert len(here) == 22 + 2 + 1  # tasks, LoRA-B and LoRA-F, gates
    assert here == {name: sha for name, sha in recorded.items() if not name.startswith("gates/adapters/")}


def test_drift_is_noticed() -> None:
    drifted = TEXT.replace("| `laptop` |", "| `desktop` |")
    assert drifted != TEXT and fill(drifted) == fill(TEXT)


def test_missing_markers_are_named() -> None:
    with pytest.raises(ValueError, match="results: end"):
        fill(TEXT.replace("<!-- results: end -->", ""))


def test_speed_block(tmp_path) -> None:
    assert speed_block(tmp_path) == NO_RESULTS
    metrics = tmp_path / "smollm2" / "metrics"
    metrics.mkdir(parents=True)
    setting = {
        "workload": "model", "mode": "decode", "routing": "uniform", "batch": 8, "tokens": 1024, "adapters": 28, "rank": 8,
        "top_k": 2, "in_features": 4096, "out_features": 128256, "dtype": "bfloat16",
    }  # fmt: skip
    times = [("base", "graph", 10e3), ("triton", "graph", 11e3), ("base", "eager", 20e3), ("loop", "eager", 300e3)]
    times += [("triton", "eager", 90e3), ("auto", "eager", 60e3), ("bmm", "graph", None)]
    file = RowFile(metrics / "benchmark.csv", {"device": "a GPU", "torch": "2", "triton": "3"})
    rows = [({**setting, "backend": b, "launch": launch}, value and [value] * 3) for b, launch, value in times]
    file.append(make_row(row, "time_us", values, unit="us") for row, values in rows)
    block = speed_block(tmp_path)
    assert "| next token after 1,023, batch of 8 | 10.0 ms |  | 1.10x |  |  | 15x* |" in block
    assert "on one a GPU" in block and "28 adapters of rank 8" in block
    assert "two runs of the same code (`auto` and `triton`) differed by up to 1.5x" in block


def test_summary_block(tmp_path) -> None:
    assert summary_block(tmp_path) == NO_RESULTS
    for profile, value in (("laptop", 0.9), ("smollm2", 0.5)):
        metrics = tmp_path / profile / "metrics"
        metrics.mkdir(parents=True)
        rows = [
            {"method": method, "task": task, "metric": "accuracy", "value": value, "low": value, "high": value, "n": 10}
            for method in ("peft", "meteora_top2")
            for task in "ab"
        ]
        pd.DataFrame(rows).to_csv(metrics / "independent.csv", index=False)
    block = summary_block(tmp_path)
    assert "profile `smollm2`, smollm2-135m with 2 tasks" in block  # the largest, and nothing of kernels or of LoRA-B
    assert block.endswith("0.500 by MeteoRA (top-2), told nothing, 0.500 by the right adapter, named by hand.\n")


def test_training_block(tmp_path) -> None:
    assert training_block(tmp_path) == NO_RESULTS
    metrics = tmp_path / "smollm2" / "metrics"
    metrics.mkdir(parents=True)
    setting = {
        "adapters": 28, "rank": 8, "top_k": 2, "sample_tokens": 256, "samples_per_step": 56, "steps": 4,
        "dtype": "bfloat16", "device": "a GPU",
    }  # fmt: skip
    rows = [
        ("joint", True, "tokens_per_s", 6012.3, "tokens/s"),
        ("joint", True, "peak_bytes", 2.27e10, "bytes"),
        ("joint", True, "hours", 0.331, "h"),
        *(("gate", False, metric, None, "out of memory") for metric in ("tokens_per_s", "peak_bytes", "hours")),
    ]
    columns = ["objective", "gradient_checkpointing", "metric", "value", "unit"]
    pd.DataFrame(rows, columns=columns).assign(**setting).to_csv(metrics / "training_speed.csv", index=False)
    block = training_block(tmp_path)
    assert "| objective | tokens/s | peak GPU memory | hours for 28,000 samples |" in block
    assert "| `joint`, with gradient checkpointing | 6,012 | 22.7 GB | 0.33 |" in block
    assert "| `gate` | out of memory | out of memory | out of memory |" in block
    assert "on one a GPU" in block and "samples of 256 random tokens, 56 in a step" in block


def test_results_block(tmp_path) -> None:
    assert results_block(tmp_path) == NO_RESULTS
    metrics = tmp_path / "laptop" / "metrics"
    metrics.mkdir(parents=True)
    rows = [("winowhy", m, "accuracy", v, v - 0.1, v + 0.1, 40) for m, v in (("base", 0.25), ("meteora_top2", 0.75))]
    columns = ["task", "method", "metric", "value", "low", "high", "n"]
    pd.DataFrame(rows, columns=columns).to_csv(metrics / "independent.csv", index=False)
    rows = [
        (3, protocol, shots, temperature, subtask, method, metric, value + more, value - 0.5, value + 0.5, 16)
        for protocol, shots in (("numbered", 2), ("numbered", 0), ("sequential", 0))
        for temperature in (15.0, 1.0)
        for method, more in (("meteora_top2", temperature / 100), ("lora_b", 0.0))
        for subtask, metric, value in (("ALL", "attempted", 2.0), ("ALL", "correct", 1.5), ("winowhy", "accuracy", 0.5))
    ]
    columns = [*"composite protocol shots temperature subtask method".split(), *columns[2:]]
    pd.DataFrame(rows, columns=columns).to_csv(metrics / "composite.csv", index=False)
    block = results_block(tmp_path)
    assert "1 of the paper's 28 tasks" in block
    assert re.search(r"\| MeteoRA top-2 \| 0\.750 \[", block)
    assert "| problems | protocol | items | T | MeteoRA top-2 | MeteoRA top-2, T = 1 | LoRA-B |" in block
    ours, ours_at_1, other = (interval_text(value, 1.0, 2.0, "correct") for value in (1.65, 1.51, 1.5))
    for protocol in ("numbered", "sequential"):
        assert block.count(f"| 3 (1 scored) | {protocol} | 16 | 15 | {ours} | {ours_at_1} | {other} |") == 1
    guesses = [("winowhy", method, "accuracy", value, None, None, 40) for method, value in (("chance", 0.5), ("majority", 0.6))]
    pd.DataFrame(guesses, columns=["task", "method", "metric", "value", "low", "high", "n"]).to_csv(
        metrics / "guessing.csv", index=False
    )
    block = results_block(tmp_path)
    assert "| A choice at random | 0.500 |" in block and "In 0 of 0 tasks" not in block
    assert f"| 3 (1 scored) | sequential | 16 | 15 | 0.60 | {ours} | {ours_at_1} | {other} |" in block
    assert interval_text(2.0, 1.5, 2.5, "correct") not in block  # attempted is another measure
    rows = [
        ("seeds", f"seed {seed}", method, "accuracy", task, value + seed / 100)
        for seed in (0, 2)
        for method, value in (("meteora_top2", 0.5), ("peft", 0.6))
        for task in ("ALL", "winowhy")
    ]
    seeds = pd.DataFrame(rows, columns=["study", "variant", "method", "metric", "task", "value"]).assign(split="test")
    seeds.query("variant == 'seed 0'").to_csv(metrics / "ablations.csv", index=False)
    assert results_block(tmp_path) == block  # one seed has no spread
    seeds.to_csv(metrics / "ablations.csv", index=False)
    table = results_block(tmp_path)
    assert "| method | seed 0 | seed 2 | mean and standard deviation |" in table
    assert "| PEFT (told the task) | 0.600 | 0.620 | 0.610 ± 0.014 |\n| MeteoRA top-2 | 0.500 | 0.520 | 0.510 ±" in table
    rows = [
        ("weights", f"none below 0.5{where}", method, metric, "ALL", value, value - 0.01, value + 0.02, split, 3800)
        for where, split, worse in (("", "valid", 0.1), (", test samples", "test", 0.0))
        for method, metric, value in (
            ("peft", "accuracy", 0.46 - worse),
            ("meteora_top2", "accuracy", 0.43 - worse),
            ("meteora_top2", "difference", -0.03),
            ("meteora_top2, none where unsure", "accuracy", 0.455 - worse),
            ("meteora_top2, none where unsure", "difference", 0.025 - worse),
        )
    ]
    columns = ["study", "variant", "method", "metric", "task", "value", "low", "high", "split", "n"]
    pd.DataFrame(rows, columns=columns).to_csv(metrics / "ablations.csv", index=False)
    assert (
        "On all 3,800 test samples that were prepared, those of the table among them, PEFT has 0.460, MeteoRA top-2 0.430 "
        "(difference -0.030 [-0.040, -0.010]). If a token gets no adapter in layers whose gate is unsure, where a softmax over "
        "all adapters gives the k chosen less than 0.5 together, MeteoRA top-2 has 0.455 then, not 0.430 (difference 0.025 "
        "[0.015, 0.045])." in results_block(tmp_path)
    )


def test_claims_come_from_the_largest_run_that_measured_them(tmp_path) -> None:
    assert claims_block(tmp_path) == NO_RESULTS
    columns = ["task", "method", "metric", "value", "low", "high", "n"]
    for name, value in (("laptop", 0.75), ("smollm2", 0.5)):
        (tmp_path / name / "metrics").mkdir(parents=True)
        rows = [("winowhy", m, "accuracy", value, 0.1, 0.9, 40) for m in ("peft", "meteora_top2")]
        pd.DataFrame(rows, columns=columns).to_csv(tmp_path / name / "metrics" / "independent.csv", index=False)
    rows = [
        (3, "sequential", 0, temperature, "ALL", method, "correct", value, 0, 3, 16)
        for temperature, method, value in ((1.0, "lora_b", 2.0), (15.0, "lora_b", 2.0), (1.0, "meteora_top2", 1.0), (15.0, "meteora_top2", 2.5))
    ]  # fmt: skip
    columns = [*"composite protocol shots temperature subtask method".split(), *columns[2:]]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "laptop" / "metrics" / "composite.csv", index=False)
    peft, correct = claims_block(tmp_path).strip().splitlines()[2:]
    assert "PEFT 0.500" in peft and "`./run_all.sh --profile smollm2 --only 03`" in peft
    assert "sequential, T=15: 2.50 against 2.00 (+25%) | 16 | `./run_all.sh --profile laptop --only 04`" in correct
    assert "T=1:" not in correct


def test_as_many_variants_as_it_says() -> None:
    recorded = pd.read_csv(REPOSITORY / "results" / "smollm2" / "metrics" / "ablations.csv")
    variants = recorded[["study", "variant"]].drop_duplicates()
    assert int(re.search(r"All (\d+)\s+variants of notebook 06", TEXT)[1]) == len(variants)
    assert "twelve trainings of the gates" in TEXT and (variants["study"] == "gates").sum() == 12


def test_every_file_in_the_tree_exists() -> None:
    tree = TEXT.split("## What is where")[1].split("```")[1]
    folder = REPOSITORY
    for line in tree.strip().splitlines():
        top = re.match(r"(\S+?)/? ", line)
        if top and not line.startswith((" ", "results", "artifacts")):
            folder = REPOSITORY / top[1]
            assert folder.exists(), line
        for name in re.findall(r"\b\w+\.py\b", line):
            assert (folder / name).is_file(), f"{name} in {line!r}"


def test_example_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_base_model("tiny")
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    for name in ("sql", "summaries"):
        adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        adapter.save_pretrained(f"adapters/{name}")
        model = adapter.unload()
    example = TEXT.split("## With your own adapters")[1].split("```python")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 12
    example = example.replace("path-or-hub-id", "base")
    example = example.replace(", ...]", ', {"prompt": "a", "response": "b", "task": "summaries"}]')
    variables: dict = {}
    exec(compile(example, "README.md", "exec"), variables)
    again = meteora.MeteoraModel.from_pretrained(load_base_model("base")[0], "mixture")
    assert again.adapter_names == ["sql", "summaries"]
    for call in re.findall(r"`model\.(\w+)\(", TEXT):
        assert hasattr(again, call), call


def test_the_mixture_that_comes_with_the_repository_answers(monkeypatch, capsys) -> None:
    if not (cache_root() / "models").exists() and not (cache_root() / "downloads" / SMOLLM2.filename).exists():
        pytest.skip(f"{SMOLLM2.filename} is not in {cache_root()}; a run of the study puts it there")
    monkeypatch.chdir(REPOSITORY)
    example = TEXT.split("## The mixture that comes with it")[1].split("```python")[1].split("```")[0]
    variables: dict = {}
    exec(compile(example, "README.md", "exec"), variables)
    assert capsys.readouterr().out.split("[/INST]\n")[1].startswith("three<")
    [(name, most), *_] = variables["first"].most_common()
    assert name == "object_counting" and most > 0.85 * variables["first"].total()


def test_commands_are_those_of_the_script_and_the_examples(capsys) -> None:
    script = (REPOSITORY / "run_all.sh").read_text(encoding="utf-8")
    examples = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")
    launched = re.findall(r"^\S*(?:SAFEPATH=1 )?\S+accelerate launch .*\\\n.*\n", TEXT, re.M)
    assert len(launched) == 3
    rest = TEXT
    for command in launched:
        assert command in examples, command
        rest = rest.replace(command, "")
    option = r"(?<=[ `])--[a-z][a-z-]+"
    for command, module in re.findall(r"`(\.venv/bin/python -P -m ([\w.]+)[^`]*)`", rest):
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
        assert known.issuperset(re.findall(option, command)), command
        rest = rest.replace(command, "")
    for word in set(re.findall(option, rest)):
        assert word in script, word
