"""The parts of README.md and kernels/README.md that are made from other files: recorded results, and the profiles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from meteora.study import loading_speed, training_speed
from meteora.study.ablations_routing import none_where_unsure
from meteora.study.artifacts import write_text
from meteora.study.benchmark_results import aims_table, side_by_side
from meteora.study.benchmark_rows import read_rows
from meteora.study.claims import COLUMNS, claims_table
from meteora.study.guessing import FILE, better_guess, expected_correct, tasks_at_a_guess
from meteora.study.profiles import REPOSITORY, load_profile, profile_names
from meteora.study.tables import (
    in_order,
    interval_text,
    label,
    method_means,
    scored_tasks,
    table1,
    table1_caption,
    to_markdown,
)

README, KERNELS = REPOSITORY / "README.md", REPOSITORY / "kernels" / "README.md"
KERNELS_RUN = "smollm2"  # the profile whose record tells of the kernels
RESULTS = REPOSITORY / "results"
ORDER = ("smoke", "laptop", "smollm2", "llama3-8b", "llama2-13b")
SPEED_COLUMNS = {
    "single_lora": "PEFT, one adapter", "triton": "MeteoRA, `triton`", "dense": "`dense`", "bmm": "`bmm`", "loop": "`loop`",
}  # fmt: skip
_COMPOSITES_CAPTION = (
    "Several problems in one prompt: correct answers per prompt (mean and 95% bootstrap interval; T is the gates' "
    "temperature, the paper's for each size or 1):"
)
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


def _recorded(results: Path, file: str) -> Iterator[tuple[str, Path]]:
    """The profiles whose run left this file among its metrics, and the file; the largest run first."""
    for name in reversed(ORDER):
        path = results / name / "metrics" / file
        if path.is_file():
            yield name, path


def summary_block(results: Path = RESULTS) -> str:
    """Two sentences: what the largest recorded run says of quality, and of one layer's time."""
    parts = []
    for name, path in _recorded(results, "independent.csv"):
        means = method_means(pd.read_csv(path))
        means = means[means["metric"] == "accuracy"].set_index("method")
        said = {
            "meteora_top2": "by MeteoRA (top-2), told nothing", "peft": "by the right adapter, named by hand",
            "lora_b": "by one LoRA for all tasks",
        }  # fmt: skip
        values = [f"{means.loc[method, 'value']:.3f} {words}" for method, words in said.items() if method in means.index]
        parts.append(
            f"**What came out**: accuracy in profile `{name}`, {load_profile(name).model.source} with "
            f"{means['tasks'].max()} tasks ([more](#results)): {', '.join(values)}."
        )
        break
    path = results / KERNELS_RUN / "metrics" / "benchmark.csv"
    if path.is_file():
        found = {}
        for launch in ("graph", "eager"):
            ratios = _layer_ratios(path, launch)
            ratios = ratios[(ratios["rank"] == 8) & (ratios["mode"] == "forward")]["ratio"].dropna()
            if len(ratios):
                found[launch] = f"{ratios.min():.1f} to {ratios.max():.1f} times", f"({len(ratios)} settings)"
        if "graph" in found:
            times, settings = found["graph"]
            without = ", and {} without one {}".format(*found["eager"]) if "eager" in found else ""
            parts.append(
                f"A layer's forward pass with 28 adapters of rank 8, top-2, gate included, takes {times} as long as one LoRA's "
                f"in a CUDA graph {settings}{without} ([more](#speed))."
            )
    return "\n".join(parts) + "\n" if parts else NO_RESULTS


def results_block(results: Path = RESULTS) -> str:
    """Every recorded run's accuracy by method, and its answers to composites in one context; the largest run first."""
    parts = []
    for name in [name for name in reversed(ORDER) if name != "smoke"]:
        metrics = results / name / "metrics"
        guessing = pd.read_csv(metrics / FILE) if (metrics / FILE).is_file() else None
        if (metrics / "independent.csv").is_file():
            independent = pd.read_csv(metrics / "independent.csv")
            means = table1(pd.concat([independent.query("metric == 'accuracy'"), *([] if guessing is None else [guessing])]))
            caption = table1_caption(independent).removeprefix("Table 1. ")
            parts.append(f"**Profile `{name}`: {load_profile(name).description}**\n\n{caption}\n\n{to_markdown(means)}")
            if guessing is not None and "peft" in set(independent["method"]):
                few, tasks = tasks_at_a_guess(guessing, independent)
                parts.append(
                    f"In {few} of {tasks} tasks PEFT's interval reaches down to the better of the two guesses, which have "
                    f"{better_guess(guessing).mean():.3f} on average.\n"
                )
        if (metrics / "ablations.csv").is_file():
            ablations = pd.read_csv(metrics / "ablations.csv")
            parts += [_seeds(ablations), _unsure(ablations)]
        if (metrics / "composite.csv").is_file():
            temperatures = load_profile(name).composite.temperature
            parts.append(_composites(pd.read_csv(metrics / "composite.csv"), temperatures, guessing))
    return "\n".join(part for part in parts if part) or NO_RESULTS


def _seeds(ablations: pd.DataFrame) -> str:
    """One row a method, one column a seed: how far a mean moves if all is trained again; nothing if it was not."""
    rows = ablations[(ablations["study"] == "seeds") & (ablations["metric"] == "accuracy") & (ablations["task"] == "ALL")]
    means = rows.pivot(index="method", columns="variant", values="value")[list(dict.fromkeys(rows["variant"]))]
    if len(means.columns) < 2:
        return ""
    means = means.loc[in_order(means.index)].rename(index=label)
    named = means.map("{:.3f}".format).rename_axis(columns=None)
    named["mean and standard deviation"] = [f"{m:.3f} ± {s:.3f}" for m, s in zip(means.mean(axis=1), means.std(axis=1))]
    caption = f"Everything trained {len(means.columns)} times, with other seeds (accuracy on the same test samples):"
    return to_markdown(named.rename_axis("method").reset_index(), caption)


def _unsure(ablations: pd.DataFrame) -> str:
    """What it is worth that adapters whose gate is unsure add nothing, on all test samples; nothing if not tried."""
    rows = ablations[(ablations["study"] == "weights") & (ablations["split"] == "test") & (ablations["task"] == "ALL")]
    if rows.empty:
        return ""
    least = re.search(r"below (\S+),", rows["variant"].iloc[0])[1]
    values = {
        (row.method, row.metric): interval_text(row.value, *((row.low, row.high) if row.metric == "difference" else ()))
        for row in rows.itertuples()
    }
    pairs = {usual: none_where_unsure(usual) for usual in in_order(rows["method"])}
    pairs = {usual: method for usual, method in pairs.items() if (method, "accuracy") in values}
    as_it_is = [f"{label(usual)} {values[usual, 'accuracy']} (difference {values[usual, 'difference']})" for usual in pairs]
    changed = [
        f"{label(usual)} has {values[method, 'accuracy']} then, not {values[usual, 'accuracy']} (difference "
        f"{values[method, 'difference']})"
        for usual, method in pairs.items()
    ]
    samples = int(rows.loc[rows["metric"] == "accuracy", "n"].iloc[0])
    return (
        f"On all {samples:,} test samples that were prepared, those of the table among them, PEFT has "
        f"{values['peft', 'accuracy']}, {' and '.join(as_it_is)}. If a token gets no adapter in layers whose gate is unsure, "
        f"where a softmax over all adapters gives the k chosen less than {least} together, {'; '.join(changed)}. Nothing was "
        f"trained for that: it is study `weights` of notebook 06, and `MeteoraConfig(least_share={least})` in the library.\n"
    )


def _composites(composite: pd.DataFrame, temperatures: Mapping[int, float], guessing: pd.DataFrame | None) -> str:
    """One row a protocol and size, one column a method: correct answers of an item, over all its sub-tasks.

    Prompts without examples are left out. Of the problems, those that have an accuracy are counted.
    A method that depends on the temperature has the paper's for each size beside the other methods, and 1 beside that.
    """
    correct = composite[(composite["subtask"] == "ALL") & (composite["metric"] == "correct")]
    correct = correct[(correct["shots"] > 0) | (correct["protocol"] == "sequential")]
    scored = scored_tasks(composite)
    guess = {} if guessing is None else expected_correct(guessing, composite)
    keys, rows = ["composite", "protocol", "shots"], []
    depends = correct.groupby(["method", *keys])["value"].nunique().groupby("method").max() > 1
    for (size, protocol, shots), cells in correct.groupby(keys, sort=False):
        own_temperature = temperatures.get(size, 1.0)
        items = int(cells["n"].max())
        few = len(scored.get(size, range(size)))
        problems = f"{size}" if few == size else f"{size} ({few} scored)"
        row = {"problems": problems, "protocol": protocol, "items": items, "T": f"{own_temperature:g}"}
        row |= {"the better guess": f"{guess[size]:.2f}"} if guess else {}
        for method in in_order(correct["method"]):
            own = cells[cells["method"] == method]
            columns = {label(method): own_temperature} | ({f"{label(method)}, T = 1": 1.0} if depends[method] else {})
            for column, temperature in columns.items():
                found = own[own["temperature"] == temperature].itertuples()
                row[column] = next((interval_text(c.value, c.low, c.high, "correct") for c in found), "")
        rows.append(row)
    return to_markdown(pd.DataFrame(rows), _COMPOSITES_CAPTION)


def speed_block(results: Path = RESULTS) -> str:
    """How much longer a whole decoder takes with its adapters, by strategy; of the largest recorded run that timed one."""
    for _, path in _recorded(results, "benchmark.csv"):
        rows = read_rows(path)
        rows = rows[rows["workload"] == "model"]
        if len(rows):
            return _whole_models(rows)
    return NO_RESULTS


def _whole_models(rows: pd.DataFrame) -> str:
    """One row a prompt length or a number of contexts, one column a strategy; eager where no graph can hold it."""
    times = rows[rows["metric"] == "time_us"].dropna(subset="value")
    lines = []
    for (mode, batch, tokens), cells in times.groupby(["mode", "batch", "tokens"], sort=False):
        value = cells.set_index(["launch", "backend"])["value"]
        what = f"prompt of {tokens:,} tokens" if mode == "prefill" else f"next token after {tokens - 1:,}, batch of {batch}"
        line = {"": what, "base model": f"{value['graph', 'base'] / 1000:.1f} ms"}
        for backend, column in SPEED_COLUMNS.items():
            launch = next((name for name in ("graph", "eager") if (name, backend) in value), None)
            ratio = value[launch, backend] / value[launch, "base"] if launch else None
            line[column] = f"{ratio:.{2 if ratio < 10 else 0}f}x" + "*" * (launch == "eager") if launch else ""
        for backend in ("single_lora", "triton"):
            both = [("eager", backend), ("eager", "base")]
            ratio = f"{value[both[0]] / value[both[1]]:.2f}x" if all(place in value for place in both) else ""
            line[f"{SPEED_COLUMNS[backend]}, no graph"] = ratio
        lines.append(line)
    first = rows.iloc[0]
    caption = (
        f"Random weights of Llama-3-8B's shape, {first['adapters']} adapters of rank {first['rank']} in every linear "
        f"layer, top-{first['top_k']}, {first['dtype']}, on one {first['device']}. Times as multiples of the base "
        "model's, in CUDA graphs; entries with * compare runs without graphs, as the loop cannot be captured. The last two "
        "columns are without graphs as well, which is what to expect of `model.generate` with its usual cache: Python then "
        "starts one kernel after the other."
    )
    twins = times[times["launch"] == "eager"].pivot_table("value", ["mode", "batch", "tokens"], "backend")
    if {"auto", "triton"} <= set(twins):
        ratio = twins["auto"] / twins["triton"]
        apart = max(ratio.max(), 1 / ratio.min())
        caption += f" There the CPU's load matters: two runs of the same code (`auto` and `triton`) differed by up to {apart:.1f}x."
    return to_markdown(pd.DataFrame(lines), caption)


def training_block(results: Path = RESULTS) -> str:
    """How fast a whole model's gates are trained and its adapters loaded, and in what memory, where a run timed it.

    Of either the largest recorded run.
    """
    parts = []
    for file, text in ((training_speed.FILE, _gate_training), (loading_speed.FILE, _loading)):
        for _, path in _recorded(results, file):
            parts.append(text(pd.read_csv(path)))
            break
    return "\n".join(parts) or NO_RESULTS


def _loading(rows: pd.DataFrame) -> str:
    first, value = rows.iloc[0], rows.set_index("metric")["value"]
    return (
        f"`from_adapters` puts {first['adapters']} adapters of rank {first['rank']}, {value['adapter_bytes'] / 1e9:.1f} GB in "
        f"{first['dtype']}, from their files into a model of that shape within {value['seconds']:.1f} s, and takes at most "
        f"{value['peak_bytes'] / value['adapter_bytes']:.1f} times their size of main memory meanwhile (on {first['device']}, "
        f"PyTorch with {first['threads']} thread{'s' if first['threads'] > 1 else ''}).\n"
    )


def _gate_training(rows: pd.DataFrame) -> str:
    """One row an objective; a measurement without a value says why it has none."""
    budget = f"{training_speed.BUDGET:,}"
    formats = {
        "tokens_per_s": ("tokens/s", lambda value: f"{value:,.0f}"),
        "peak_bytes": ("peak GPU memory", lambda value: f"{value / 1e9:.1f} GB"),
        "hours": (f"hours for {budget} samples", lambda value: f"{value:.2f}"),
    }
    lines = []
    for (objective, checkpointing), cells in rows.groupby(["objective", "gradient_checkpointing"], sort=False):
        line = {"objective": f"`{objective}`" + ", with gradient checkpointing" * checkpointing}
        for cell in cells.itertuples():
            column, text = formats[cell.metric]
            line[column] = cell.unit if pd.isna(cell.value) else text(cell.value)
        lines.append(line)
    first = rows.iloc[0]
    caption = (
        f"Training the gates of a model of Llama-3-8B's shape with random weights: {first['adapters']} adapters of "
        f"rank {first['rank']} in every linear layer, top-{first['top_k']}, {first['dtype']}, on one "
        f"{first['device']}; samples of {first['sample_tokens']} random tokens, {first['samples_per_step']} in a step. "
        f"The memory holds the model's weights too. The hours are what {budget} samples of that length, the paper's "
        f"1,000 for each task, would take at the speed measured over {first['steps']} steps."
    )
    return to_markdown(pd.DataFrame(lines), caption)


def claims_block(results: Path = RESULTS) -> str:
    """The paper's claims, each with what the largest recorded run that measured it says, and the command for it.

    Of composites at the temperatures that the paper has for their size, and with examples in the prompt as there.
    """
    found: dict[str, list | None] = {}
    for name in [name for name in ORDER if name != "smoke"]:  # later ones are larger
        files = sorted((results / name / "metrics").glob("*.csv"))
        metrics = {path.stem: pd.read_csv(path) for path in files}
        if "composite" in metrics:
            temperature = load_profile(name).composite.temperature
            composite = metrics["composite"]
            composite = composite[composite["temperature"] == composite["composite"].map(temperature)]
            metrics["composite"] = composite[(composite["shots"] > 0) | (composite["protocol"] == "sequential")]
        for row in claims_table(metrics, name).itertuples(index=False):
            if row.paper.startswith("our aim"):
                continue
            found.setdefault(row.claim, None)  # a claim keeps its place, whichever run measured it
            if row.n != "":
                found[row.claim] = [*row[:-1], f"`{row.command}`"]
    measured = [row for row in found.values() if row is not None]
    return to_markdown(pd.DataFrame(measured, columns=COLUMNS)) if measured else NO_RESULTS


def ratios_block(results: Path = RESULTS) -> str:
    """One layer's time as a multiple of one LoRA, top-2 of 28 adapters, by backend ``triton`` in CUDA graphs."""
    ratios = _layer_ratios(results / KERNELS_RUN / "metrics" / "benchmark.csv")
    rows = []
    for (mode, rank, columns, width, routing), cells in ratios.groupby(
        ["mode", "rank", "in_features", "out_features", "routing"], sort=False
    ):
        by_tokens = cells.set_index("tokens")["ratio"].sort_index()
        layer = {"": mode, "rank": rank, "layer": f"{columns} → {width}", "routing": routing}
        rows.append(layer | {f"{tokens:,}": f"{ratio:.2f}" for tokens, ratio in by_tokens.items()})
    rows.sort(key=lambda row: (row[""] != "forward", row["rank"], row["layer"], row["routing"] != "uniform"))
    return to_markdown(pd.DataFrame(rows))


def _layer_ratios(benchmark: Path, launch: str = "graph") -> pd.DataFrame:
    """Every setting with 28 adapters and top-2, and its ``ratio`` of ``triton`` to one LoRA, in CUDA graphs or without."""
    times = side_by_side(read_rows(benchmark), launch=launch)
    ratios = (times["triton"] / times["single_lora"]).rename("ratio").reset_index()
    return ratios[(ratios["adapters"] == 28) & (ratios["top_k"] == 2)]


def aims_block(results: Path = RESULTS) -> str:
    """What this project aims at, and in how many of the settings measured it is so."""
    aims = aims_table(read_rows(results / KERNELS_RUN / "metrics" / "benchmark.csv"))
    rows = [
        {
            "what": row.case,
            "aim": row.aim,
            "median": f"{row.median:.2f}",
            "worst": f"{row.worst:.2f} ({row.worst_at})",
            "reached in": f"{row.within} of {row.settings}",
        }
        for row in aims.itertuples()
        if row.backend != "auto" or len(aims[aims["case"] == row.case]) == 1
    ]
    return to_markdown(pd.DataFrame(rows))


def profile_block(results: Path = RESULTS) -> str:
    """Where the time of a forward pass goes, kernel by kernel: of 4096 tokens or few, top-2 of 28 adapters."""
    frame = pd.read_csv(results / KERNELS_RUN / "metrics" / "kernel_profile.csv")
    frame = frame[frame["mode"] == "forward"]
    rows = []
    cases = ["rank", "in_features", "out_features", "tokens", "routing", "backend"]
    for (rank, columns, width, tokens, routing, backend), kernels in frame.groupby(cases, sort=False):
        steps = [
            f"{_kernel(row.kernel)} {row.time_us:.1f} ({row.memory:.0%}, {row.compute:.0%})" for row in kernels.itertuples()
        ]
        layer = {"layer": f"{columns} → {width}", "rank": rank, "tokens": f"{tokens:,}", "routing": routing}
        total = f"{kernels['time_us'].sum():.1f}"
        rows.append(layer | {"": _strategy(backend), "us": total, "kernels: us (memory, compute)": ", ".join(steps)})
    return to_markdown(pd.DataFrame(rows))


def _kernel(name: str) -> str:
    """A kernel's name, short: our own functions', or whose it is."""
    if name.startswith("_"):
        return f"`{name[1:]}`"
    return "cuBLAS's sum of splits" if "splitKreduce" in name else "cuBLAS"


def _strategy(backend: str) -> str:
    return {"single_lora": "one LoRA", "triton": "ours"}[backend]


def fill(text: str, blocks: dict[str, str] | None = None) -> str:
    """A README's text with its marked blocks made anew; by default those of the repository's own."""
    for name, block in (readme_blocks() if blocks is None else blocks).items():
        begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the README must have the lines {begin!r} and {end!r} once each.")
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{block}{end}", text, flags=re.DOTALL
        )
    return text


def readme_blocks() -> dict[str, str]:
    """Name -> text of the generated blocks of README.md."""
    return {
        "summary": summary_block(), "results": results_block(), "speed": speed_block(), "training": training_block(),
        "profiles": profiles_block(), "claims": claims_block(),
    }  # fmt: skip


def kernels_blocks() -> dict[str, str]:
    """Name -> text of the generated blocks of kernels/README.md."""
    return {"ratios": ratios_block(), "aims": aims_block(), "profile": profile_block()}


READMES = {README: readme_blocks, KERNELS: kernels_blocks}


def update() -> list[str]:
    """Bring the READMEs up to date; the names of those that have changed."""
    changed = []
    for path, blocks in READMES.items():
        old = path.read_text(encoding="utf-8")
        new = fill(old, blocks())
        if new != old:
            write_text(path, new)
            changed.append(str(path.relative_to(REPOSITORY)))
    return changed
