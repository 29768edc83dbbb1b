"""Two processes, started by accelerate with the configurations that ship, train as one does."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from meteora import AdapterTrainingConfig, GateTrainingConfig, MeteoraModel, train_adapters, train_gates
from meteora.adapters import load_adapter

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"
GATES = {"max_steps": 3, "samples_per_step": 2, "learning_rate": 0.01, "tokens_per_batch": 40, "balance": "turn"}
ADAPTERS = {"max_steps": 3, "samples_per_step": 2, "learning_rate": 0.02, "rank": 2, "dtype": "float32"}

SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import LlamaForCausalLM
from meteora import AdapterTrainingConfig, GateTrainingConfig, MeteoraModel, train_adapters, train_gates

base, adapters, rows, gates, lora, held_out, sharded = map(json.loads, sys.argv[1:])

class Tokenizer:
    eos_token_id = pad_token_id = 2
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [3 + ord(c) % 61 for c in text]}

accelerator = Accelerator()
if sharded:  # accelerate keeps FSDP for accelerators; it has read the configuration, and here it is used
    AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin()
histories, pieces = {}, []
for objective in ("joint", "gate"):
    model = MeteoraModel.from_adapters(LlamaForCausalLM.from_pretrained(base), adapters)
    config = GateTrainingConfig(objective=objective, gradient_checkpointing=objective == "joint", **gates)
    histories[objective] = train_gates(model, rows, config, tokenizer=Tokenizer(), output_dir=f"out-{objective}")
    ids = torch.arange(3, 24).view(3, 7)
    with torch.no_grad():
        logits = model(ids).logits
    parameters = list(model.unload().parameters())
    here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
    pieces.append(here / sum(p.numel() for p in parameters))
    again = MeteoraModel.from_pretrained(model.base_model, f"out-{objective}")  # every process finds it
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
data = {task: [row for row in rows if row["task"] == task] for task in ("one", "two")}
histories["adapters"] = train_adapters(
    LlamaForCausalLM.from_pretrained(base), data, AdapterTrainingConfig(**lora), tokenizer=Tokenizer(),
    output_dir="adapters", validation=held_out,
)
with open(f"out-{accelerator.process_index}.json", "w") as file:
    json.dump([accelerator.num_processes, pieces, histories], file)
torch.distributed.destroy_process_group()
"""


def launch(kind, script, *arguments, cwd):
    """``accelerate launch`` of two processes on the CPU, with a configuration that ships."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["launch", "--config_file", str(CONFIGS / f"{kind}.yaml"), "--main_process_port", str(port), str(script)]
    program = [sys.executable, "-c", "from accelerate.commands.accelerate_cli import main; main()"]
    done = subprocess.run(
        [*program, *command, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_history_of_one(core, tiny_llama, mixed_adapters, tmp_path, kind):
    tiny_llama.save_pretrained(tmp_path / "base")
    (tmp_path / "script.py").write_text(SCRIPT)
    adapters = {"one": mixed_adapters["one"], "two": mixed_adapters["three"]}
    # Lengths so unlike that one process has more batches than the other.
    rows = core.rows() + [{"task": "two", "prompt": "long " * 20, "response": "ok"}]
    held_out = {"one": core.rows(("one",), 3)}
    arguments = ["base", adapters, rows, GATES, ADAPTERS, held_out, kind == "fsdp"]
    launch(kind, "script.py", *map(json.dumps, arguments), cwd=tmp_path)

    expected = {}
    for objective in ("joint", "gate"):
        model = MeteoraModel.from_adapters(copy.deepcopy(tiny_llama), adapters)
        config = GateTrainingConfig(objective=objective, **GATES)
        expected[objective] = train_gates(model, rows, config, tokenizer=core.Tokenizer())
        trained = MeteoraModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / f"out-{objective}")
        for name, layer in trained.layers.items():
            mine, theirs = layer.gate.weight, model.layers[name].gate.weight
            assert (mine - theirs).norm() < 0.01 * theirs.norm(), name
    data = {task: [row for row in rows if row["task"] == task] for task in ("one", "two")}
    expected["adapters"] = train_adapters(
        tiny_llama, data, AdapterTrainingConfig(**ADAPTERS), tokenizer=core.Tokenizer(),
        output_dir=tmp_path / "alone", validation=held_out,
    )  # fmt: skip
    for rank in (0, 1):
        count, pieces, histories = json.loads((tmp_path / f"out-{rank}.json").read_text())
        assert count == 2
        assert all(piece == 1 if kind == "ddp" else 0.4 < piece < 0.6 for piece in pieces)
        for name, history in histories.items():
            assert [row["step"] for row in history] == [row["step"] for row in expected[name]]
            for key in set(history[0]) & {"loss", "gate_loss", "lm_loss", "gate_accuracy"}:
                mine, theirs = ([row.get(key) for row in rows] for rows in (history, expected[name]))
                assert mine == pytest.approx(theirs, rel=1e-4, nan_ok=True), (name, key)
    for task in data:
        mine, theirs = (load_adapter(task, tmp_path / where / task).modules for where in ("adapters", "alone"))
        for name, weights in theirs.items():
            assert (mine[name].A - weights.A).norm() < 0.01 * weights.A.norm(), name


def test_more_processes_than_samples(core, tiny_llama, mixed_adapters, tmp_path):
    """A process without samples only keeps in step with the other."""
    tiny_llama.save_pretrained(tmp_path / "base")
    (tmp_path / "script.py").write_text(SCRIPT.replace('("one", "two")', '("one",)'))
    adapters = {"one": mixed_adapters["one"], "two": mixed_adapters["three"]}
    rows, single = core.rows(("one",), 1), {"samples_per_step": 1}
    arguments = ["base", adapters, rows, {**GATES, **single}, {**ADAPTERS, **single}, {}, True]
    launch("fsdp", "script.py", *map(json.dumps, arguments), cwd=tmp_path)
    model = MeteoraModel.from_adapters(tiny_llama, adapters)
    expected = train_gates(model, rows, GateTrainingConfig(**{**GATES, **single}), tokenizer=core.Tokenizer())
    history = json.loads((tmp_path / "out-1.json").read_text())[2]["joint"]
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_are_accelerates(path):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    loaded = load_config_from_file(str(path))
    assert loaded.distributed_type.value == settings["distributed_type"] and loaded.num_processes == 2
    assert loaded.mixed_precision == "no"
