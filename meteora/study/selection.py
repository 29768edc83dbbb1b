"""Chooses the tasks of profile `laptop` and trains the adapters that ship with the repository.

The rule: of the profile's tasks, those short enough for a CPU (mean prompt and response of the training examples), and
of these the ones where the adapter gains most over the base model, by accuracy on the *validation* split. Test examples
are not looked at. `task_selection.csv` records every candidate, chosen or not.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas
import torch

from data_prep.base_models import load_base_model
from data_prep.prepare import load_split
from data_prep.sources import BIGBENCH
from data_prep.tasks import get_task
from meteora import MeteoraModel, train_adapters
from meteora.adapters import adapter_directory
from meteora.batches import token_ids
from meteora.study.artifacts import device_name, versions, write_json, write_text
from meteora.study.baselines import build_methods
from meteora.study.collection import HISTORY
from meteora.study.evaluation import answer_budget, evaluate_independent
from meteora.study.profiles import Profile, load_profile

logger = logging.getLogger(__name__)


def mean_tokens(tokenizer, examples: Sequence[Mapping]) -> float:
    """Mean number of tokens of prompt and response."""
    return sum(map(len, token_ids(tokenizer, [row["prompt"] + row["response"] for row in examples]))) / len(examples)


def choose(candidates: pandas.DataFrame, count: int) -> list[str]:
    """The ``count`` tasks with the largest gain of ``peft`` over ``base``; columns ``task, base, peft``."""
    gain = candidates["peft"] - candidates["base"]
    return candidates.assign(gain=gain).sort_values("gain", ascending=False, kind="stable")["task"].head(count).tolist()


def select_and_train(
    profile: Profile, data: Path, output: Path, *, count: int = 5, longest: float = 128.0, device: str = "cuda"
) -> pandas.DataFrame:
    """Train the candidates' adapters, choose, train LoRA-B on the union of the chosen tasks' samples, write it all.

    Args:
        profile: its model, tasks and settings for adapters.
        data: prepared examples of all its tasks (`data_prep.prepare_tasks`).
        output: gets adapters/ (the tasks', `lora_b`, and their curves in adapter_training.csv) and metrics/ (task_selection.*).
        longest: most mean tokens of prompt and response that a candidate may have.
    """
    base, tokenizer = load_base_model(profile.model.source, dtype=profile.model.dtype, device=device)
    examples = {task: load_split(data, task, "train") for task in profile.tasks}
    lengths = {task: mean_tokens(tokenizer, rows) for task, rows in examples.items()}
    candidates = [task for task in profile.tasks if lengths[task] <= longest and get_task(task).accuracy]
    valid = {task: load_split(data, task, "valid") for task in candidates}
    config = profile.adapters.config(profile.seed)
    folder = output / "candidates"
    history = train_adapters(
        base, {task: examples[task] for task in candidates}, config,
        tokenizer=tokenizer, output_dir=folder, validation=valid,
    )  # fmt: skip
    table = _measure(base, tokenizer, folder, examples, valid, lengths, profile, output)
    chosen = choose(table, count)
    table["chosen"] = table["task"].isin(chosen)
    write_text(output / "metrics" / "task_selection.csv", table.to_csv(index=False))
    made_by = {"device": device_name(), "versions": versions(), "adapters": asdict(config)}
    write_json(output / "metrics" / "task_selection.json", made_by)
    # LoRA-B sees in every step as many samples of each chosen task as that task's own adapter does.
    union = {"lora_b": [row for task in chosen for row in examples[task]]}
    history += train_adapters(
        base, union, replace(config, samples_per_step=config.samples_per_step * count),
        tokenizer=tokenizer, output_dir=output / "lora_b_run",
        validation={"lora_b": [row for task in chosen for row in valid[task]]},
    )  # fmt: skip
    write_text(output / "adapters" / HISTORY, pandas.DataFrame(history).to_csv(index=False))
    for task in chosen:
        _ship(adapter_directory(folder, task), adapter_directory(output / "adapters", task), [task])
    _ship(output / "lora_b_run" / "lora_b", output / "adapters" / "lora_b", chosen)
    return table


def _measure(base, tokenizer, folder, examples, valid, lengths, profile, output) -> pandas.DataFrame:
    model = MeteoraModel.from_adapters(base, {task: adapter_directory(folder, task) for task in valid})
    budgets = {
        task: answer_budget(tokenizer, [r["response"] for r in examples[task]], cap=profile.evaluation.max_new_tokens)
        for task in valid
    }
    result = evaluate_independent(
        build_methods(("base", "peft"), model), valid, tokenizer=tokenizer, predictions_dir=output / "predictions",
        batch_size=profile.evaluation.batch_size, max_new_tokens=budgets,
    )  # fmt: skip
    model.unload()
    frame = pandas.DataFrame(result.rows)
    accuracy = frame[frame["metric"] == "accuracy"].pivot(index="task", columns="method", values="value")
    rows = [
        {"task": task, "mean_tokens": round(lengths[task], 1), "train": len(examples[task]), "valid": len(valid[task])}
        | accuracy.loc[task, ["base", "peft"]].to_dict()
        for task in valid
    ]
    return pandas.DataFrame(rows)


def _ship(source: Path, target: Path, tasks: Sequence[str]) -> None:
    """Move an adapter to where it ships, its card completed by what it was trained on."""
    card = (source / "README.md").read_text(encoding="utf-8")
    write_text(source / "README.md", card + data_section(tasks))
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def data_section(tasks: Sequence[str]) -> str:
    """The part of a model card that says what the adapter saw."""
    names = "\n".join(f"- `{task}`" for task in tasks)
    return f"""
## Data

Training examples of BIG-bench (package `{BIGBENCH.name}` {BIGBENCH.version}, Apache-2.0), as `data_prep` prepares them:

{names}

Prompt `[INST] question [/INST]` and a line break, then the answer and the end-of-text token. BIG-bench's own test part
was left out; the kept step is the one with the lowest loss on validation examples, which are no training examples.
"""


def main() -> None:
    """`python -P -m meteora.study.selection --help`"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="smollm2", help="whose model, tasks and adapter settings")
    parser.add_argument("--data", type=Path, required=True, help="prepared examples of its tasks")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for adapters and metrics")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    table = select_and_train(load_profile(options.profile), options.data, options.output, device=options.device)
    logger.info("\n%s", table.to_string())


if __name__ == "__main__":
    main()
