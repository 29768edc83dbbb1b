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

from transformers import AutoTokenizer

from meteora import GateTrainingConfig, MeteoraModel, train_gates
from meteora.training import samples_of_stages


def read_settings(given: list[str]) -> dict:
    """The settings of a `GateTrainingConfig` from ``NAME=VALUE``, each value in JSON, or a plain word for a text."""
    kinds = {field.name: field.type for field in fields(GateTrainingConfig)}
    settings = {}
    for setting in given:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting} has no value; write it as in --set max_steps=300")
        if name == "objective":
            raise ValueError("--set objective=... has a name of its own; write --objective joint")
        if name not in kinds:
            raise ValueError(f"GateTrainingConfig has no {name!r}; it has {', '.join(kinds)}")
        try:
            settings[name] = json.loads(value)
        except ValueError as error:
            if kinds[name] != "str":
                raise ValueError(f"--set {setting}: {value!r} is not JSON, such as 300, 0.01, true or null") from error
            settings[name] = value
    return settings


def read_rows(file: Path) -> list[dict]:
    """The rows of a file of one JSON object a line; empty lines count for nothing."""
    rows = []
    with open(file, "rb") as lines:  # not str.splitlines, which cuts at characters that JSON may hold
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors begin a file with a mark
                rows += [json.loads(text)] if text.strip() else []
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number} is not UTF-8 ({error}); save the file as UTF-8") from error
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON ({error}); each line must be one row") from error
    return rows


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
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE", help="other settings, as in JSON"
    )
    options = parser.parse_args()
    try:
        config = GateTrainingConfig(objective=options.objective, **read_settings(options.set))
        rows = read_rows(Path(options.data))
        model = MeteoraModel.from_adapters(options.base, options.adapters)
        tokenizer = AutoTokenizer.from_pretrained(options.base)
        samples_of_stages(model, rows, config, tokenizer)  # for what it says of bad rows
    except (ValueError, OSError) as error:  # each says what is wrong, and the mend
        parser.error(str(error))

    history = train_gates(model, rows, config, tokenizer=tokenizer, output_dir=options.output)
    logging.info("gate loss %.4f -> %.4f", history[0]["gate_loss"], history[-1]["gate_loss"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
