"""Train the gates over a folder of adapters, on one process or, through ``accelerate launch``, on several GPUs.

    accelerate launch --config_file examples/accelerate/fsdp.yaml --num_processes 4 examples/train_gates.py \
        --base meta-llama/Meta-Llama-3-8B --adapters adapters/ --data train.jsonl --output mixture

``train.jsonl`` holds one row a line: {"prompt": ..., "response": ..., "task": <an adapter's name>}. An interrupted run
goes on where it was when it is started again.
"""

import argparse
import json
import logging
from dataclasses import fields
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from meteora import GateTrainingConfig, MeteoraModel, train_gates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (
        ("base", "the base model: a directory or hub id"),
        ("adapters", "a folder of PEFT adapters"),
        ("data", "training rows, one JSON object a line"),
        ("output", "where the checkpoint goes"),
    ):
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--objective", default="gate", choices=("gate", "joint"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings, as in JSON")
    options = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in options.set)
    unknown = sorted(set(settings) - {field.name for field in fields(GateTrainingConfig)})
    if unknown:
        parser.error(f"GateTrainingConfig has no {unknown[0]!r}")
    config = GateTrainingConfig(objective=options.objective, **{n: json.loads(value) for n, value in settings.items()})
    rows = [json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines() if line.strip()]

    base = AutoModelForCausalLM.from_pretrained(options.base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = MeteoraModel.from_adapters(base, options.adapters)
    history = train_gates(model, rows, config, tokenizer=tokenizer, output_dir=options.output)
    logging.info("gate loss %.4f -> %.4f", history[0]["gate_loss"], history[-1]["gate_loss"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
