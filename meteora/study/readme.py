"""The parts of README.md that are made from other files: the results that are recorded here, and the profiles."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from meteora.study.artifacts import write_text
from meteora.study.claims import COLUMNS, claims_table
from meteora.study.profiles import REPOSITORY, load_profile, profile_names
from meteora.study.tables import in_order, interval_text, label, table1, table1_caption, to_markdown

README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "results"
ORDER = ("smoke", "laptop", "smollm2", "llama3-8b", "llama2-13b")
NO_RESULTS = "No run is recorded in this checkout yet: `./run_all.sh` makes one and writes it to `results/laptop/`.\n"


def profiles_block() -> str:
    """A table of the profiles that come with the repository."""
    known = [name for name in ORDER if name in profile_names()]
    rows = []
    for profile in map(load_profile, [*known, *(name for name in profile_names() if name not in known)]):
        needs = profile.needs
        memory = f"{needs.memory_gb:g} GB"
        memory += f" and {needs.gpu_memory_gb:g} GB on the GPU" if needs.gpu_memory_gb else ""
        time = f"{needs.minutes:g} min" if needs.minutes < 120 else f"{needs.minutes / 60:g} h"
        rows.append([f"`{profile.name}`", profile.description, needs.device, memory, f"{needs.disk_gb:g} GB", time])
    return to_markdown(pd.DataFrame(rows, columns=["profile", "what", "needs", "memory", "disk", "time"]))


def results_block(results: Path = RESULTS) -> str:
    """Every recorded run's accuracy by method, and its answers to composites in one context."""
    parts = []
    for name in [name for name in ORDER if name != "smoke"]:
        metrics = results / name / "metrics"
        if (metrics / "independent.csv").is_file():
            independent = pd.read_csv(metrics / "independent.csv")
            means = table1(independent[independent["metric"] == "accuracy"])
            caption = table1_caption(independent).removeprefix("Table 1. ")
            parts.append(f"**Profile `{name}`: {load_profile(name).description}**\n\n{caption}\n\n{to_markdown(means)}")
        if (metrics / "composite.csv").is_file():
            parts.append(_composites(pd.read_csv(metrics / "composite.csv")))
    return "\n".join(parts) or NO_RESULTS


def _composites(composite: pd.DataFrame) -> str:
    """One row a setting, one column a method: correct answers of an item, over all its sub-tasks."""
    correct = composite[(composite["subtask"] == "ALL") & (composite["metric"] == "correct")]
    rows = []
    for (size, protocol, shots, temperature), cells in correct.groupby(
        ["composite", "protocol", "shots", "temperature"], sort=False
    ):
        values = {row.method: interval_text(row.value, row.low, row.high, "correct") for row in cells.itertuples()}
        methods = {label(method): values.get(method, "") for method in in_order(correct["method"])}
        rows.append({"protocol": protocol, "problems": size, "shots": shots, "T": f"{temperature:g}", **methods})
    items = int(correct["n"].max())
    caption = f"Composites, correct answers per item (mean over {items} items, 95% bootstrap interval):"
    return to_markdown(pd.DataFrame(rows), caption)


def claims_block(results: Path = RESULTS) -> str:
    """The paper's claims, each with what the largest recorded run that measured it says, and the command for it.

    Of composites at the temperatures that the paper has for their size.
    """
    found: dict[str, list | None] = {}
    for name in [name for name in ORDER if name != "smoke"]:  # later ones are larger
        files = sorted((results / name / "metrics").glob("*.csv"))
        metrics = {path.stem: pd.read_csv(path) for path in files}
        if "composite" in metrics:
            temperature = load_profile(name).composite.temperature
            composite = metrics["composite"]
            metrics["composite"] = composite[composite["temperature"] == composite["composite"].map(temperature)]
        for row in claims_table(metrics, name).itertuples(index=False):
            if row.paper.startswith("our aim"):
                continue
            found.setdefault(row.claim, None)  # a claim keeps its place, whichever run measured it
            if row.n != "":
                found[row.claim] = [*row[:-1], f"`{row.command}`"]
    measured = [row for row in found.values() if row is not None]
    return to_markdown(pd.DataFrame(measured, columns=COLUMNS)) if measured else NO_RESULTS


def fill(text: str, results: Path = RESULTS) -> str:
    """README's text with its marked blocks made anew."""
    blocks = {"results": results_block(results), "profiles": profiles_block(), "claims": claims_block(results)}
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must have the lines {begin!r} and {end!r} once each.")
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{block}{end}", text, flags=re.DOTALL
        )
    return text


def update() -> bool:
    """Bring README.md up to date; whether anything changed."""
    old = README.read_text(encoding="utf-8")
    new = fill(old)
    if new != old:
        write_text(README, new)
    return new != old
