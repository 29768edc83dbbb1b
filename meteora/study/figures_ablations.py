"""Figures of notebook 06, from ``ablations.csv``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meteora.study.figures_style import BLUE, METHOD_STYLES, mix, style_of, styled
from meteora.study.tables import in_order, label, require_columns

NEEDED = ("study", "variant", "method", "task", "metric", "value", "low", "high")
STUDY_TITLES = {
    "top_k": "adapters per token (k)",
    "temperature": "temperature, k = 2",
    "deciding": "gates that decide",
    "weights": "weights of the chosen",
    "told": "own adapter in some layers, gates in the others",
    "silent": "no adapters in some layers",
    "modules": "modules with adapters",
    "gates": "training of the gates",
    "arrow": "gates without training",
    "seeds": "seeds (test split)",
}
_SPEED = {  # metric -> label, factor
    "prefill": ("prefill (s)", 1.0),
    "decode": ("decode (ms per step)", 1.0),
    "peak_bytes": ("peak above the weights (MB)", 1e-6),
}
_STYLES = METHOD_STYLES | {
    "meteora_top3": (mix(BLUE, "#000000", 0.3), "D", "-"),
    "meteora_top4": (mix(BLUE, "#000000", 0.6), "s", "-"),
    "meteora_top1, none where unsure": (mix(BLUE, "#ffffff", 0.4), "^", "-"),
    "meteora_top2, none where unsure": (mix(BLUE, "#000000", 0.3), "^", "-"),
    "single_lora": ("#000000", "v", "--"),
}


@styled
def variant_accuracy(ablations: pd.DataFrame, studies: Sequence[str]) -> Figure:
    """Mean accuracy of every variant, a panel a study; lines: the base model, and PEFT told the task.

    All on validation examples, but for ``seeds``.

    Args:
        ablations: rows of these studies and of ``reference``.
        studies: those without rows are left out.
    """
    require_columns(ablations, NEEDED, "ablations.csv")
    frame = ablations[(ablations["metric"] == "accuracy") & (ablations["task"] == "ALL")]
    frame = frame[(frame["study"] == "seeds") | (frame["split"] != "test")]
    lines = frame[frame["study"] == "reference"].set_index("method")["value"]
    panels = {study: frame[frame["study"] == study] for study in studies}
    panels = {study: part for study, part in panels.items() if len(part)}
    if not panels:
        raise ValueError(f"ablations.csv has no accuracy of {', '.join(studies)}; run these studies first.")
    heights = [part["variant"].nunique() for part in panels.values()]
    figure = plt.figure(figsize=(6.8, 0.9 + sum(0.45 + 0.32 * n for n in heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=[n + 0.4 for n in heights])[:, 0]
    for axes, (study, part) in zip(grid, panels.items()):
        _dots(axes, part, list(dict.fromkeys(part["variant"])))
        axes.set_title(STUDY_TITLES.get(study, study), loc="left", fontsize=9)
        if study != "seeds":
            for method in ("base", "peft"):
                if method in lines:
                    color, _, line = style_of(_STYLES, method)
                    axes.axvline(lines[method], color=color, linestyle=line, linewidth=1.1, label=label(method))
    grid[-1].set_xlabel("mean accuracy over the tasks, with 95% bootstrap interval")
    _one_legend(figure, grid)
    return figure


@styled
def added_adapter(ablations: pd.DataFrame) -> Figure:
    """An adapter added to trained gates: accuracy of its task, and mean over the others, by how its row was made."""
    frame = _of(ablations, "added", "accuracy")
    variants = list(dict.fromkeys(frame["variant"]))
    figure = plt.figure(figsize=(7.6, 1.5 + 0.4 * len(variants)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (part, title) in zip(panels, (("ADDED", "the added task"), ("OTHERS", "mean over the other tasks"))):
        _dots(axes, frame[frame["task"] == part], variants)
        axes.set(title=title, xlabel="accuracy")
    _one_legend(figure, panels)
    return figure


@styled
def accuracy_over_adapters(ablations: pd.DataFrame) -> Figure:
    """Accuracy of the same tasks in models with more and more adapters, and how often the gates are right there."""
    frame = _of(ablations, "adapters")
    figure = plt.figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _mean_lines(left, frame[frame["task"] == "COMMON"], "adapters")
    left.set(title="tasks that all models have", xlabel="adapters in the model", ylabel="mean accuracy", ylim=(0, None))
    _gate_lines(right, frame, "adapters")
    counts = np.array(sorted(frame["adapters"].dropna().unique()), dtype=float)
    right.plot(counts, 1 / counts, color="#888888", linestyle=":", label="guessing")
    right.set(title="right adapter first", xlabel="adapters in the model", ylabel="share of tokens", ylim=(0, 1.02))
    for axes in (left, right):
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
    _one_legend(figure, (left, right))
    return figure


@styled
def accuracy_over_prompts(ablations: pd.DataFrame) -> Figure:
    """Accuracy, and how often the gates are right, by the examples of each task that the gates were trained on."""
    frame = _of(ablations, "prompts")
    figure = plt.figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _mean_lines(left, frame[frame["task"] == "ALL"], "prompts")
    told = ablations.query("study == 'reference' and method == 'peft' and metric == 'accuracy' and task == 'ALL'")
    if len(told):
        color, _, line = style_of(_STYLES, "peft")
        left.axhline(told["value"].iloc[0], color=color, linestyle=line, linewidth=1.1, label=label("peft"))
    left.set(title="all tasks", ylabel="mean accuracy", ylim=(0, None))
    _gate_lines(right, frame, "prompts")
    right.set(title="right adapter first", ylabel="share of tokens", ylim=(0, 1.02))
    counts = sorted(frame["prompts"].dropna().unique())
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("training examples of each task")
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.minorticks_off()
    _one_legend(figure, (left, right))
    return figure


@styled
def unknown_tasks(ablations: pd.DataFrame) -> Figure:
    """Tasks that no adapter of the model was trained for: accuracy, and loss of the right answer."""
    frame = _of(ablations, "unknown")
    tasks = list(dict.fromkeys(frame[frame["metric"] == "response_loss"]["task"]))
    figure = plt.figure(figsize=(8.6, 1.6 + 0.36 * len(tasks)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric, text in zip(
        panels, ("accuracy", "response_loss"), ("accuracy", "loss of the right answer (nats per token)")
    ):
        part = frame[(frame["metric"] == metric) & frame["task"].isin(tasks)]
        _dots(axes, part.assign(variant=part["task"]), tasks)
        axes.set_xlabel(text)
    figure.suptitle("tasks for which the model has no adapter", fontsize=10)
    _one_legend(figure, panels)
    return figure


@styled
def shots_curves(ablations: pd.DataFrame) -> Figure:
    """Composite answers attempted (hollow) and correct (filled) by the number of solved examples in the prompt."""
    frame = _of(ablations, "shots")
    frame = frame[frame["metric"].isin(["attempted", "correct"])]
    protocols = list(dict.fromkeys(frame["protocol"]))
    figure = plt.figure(figsize=(0.8 + 3.4 * len(protocols), 3.2), layout="constrained")
    panels = figure.subplots(1, len(protocols), squeeze=False, sharey=True)[0]
    for axes, protocol in zip(panels, protocols):
        for method in in_order(frame["method"]):
            color, marker, line = style_of(_STYLES, method)
            for metric, face in (("attempted", "white"), ("correct", color)):
                part = frame[
                    (frame["protocol"] == protocol) & (frame["method"] == method) & (frame["metric"] == metric)
                ].sort_values("shots")
                axes.fill_between(part["shots"].astype(float), part["low"], part["high"], color=color, alpha=0.1)
                axes.plot(
                    part["shots"], part["value"], color=color, marker=marker, linestyle=line, markerfacecolor=face,
                    label=f"{label(method)}, {metric}", clip_on=False,
                )  # fmt: skip
        size = int(frame["composite"].iloc[0])
        told = f"{protocol} ({frame['split'].iloc[0]} split, n = {frame['n'].max():g})"
        axes.set(title=f"composite-{size}, {told}", xlabel="solved examples in the prompt", ylim=(0, size))
        axes.set_xticks(sorted(frame["shots"].unique()))
    panels[0].set_ylabel(f"answers per item (of {size})")
    _one_legend(figure, panels, columns=2)
    return figure


@styled
def formats_curves(ablations: pd.DataFrame) -> Figure:
    """Correct answers by size of the composite: training on single questions (hollow), and on composites too (filled)."""
    frame = _of(ablations, "formats", "correct")
    protocols, variants = (list(dict.fromkeys(frame[column])) for column in ("protocol", "variant"))
    figure = plt.figure(figsize=(0.8 + 2.9 * len(protocols), 4.4), layout="constrained")
    panels = figure.subplots(1, len(protocols), squeeze=False, sharey=True)[0]
    for axes, protocol in zip(panels, protocols):
        for method in in_order(frame["method"]):
            color, marker, _ = style_of(_STYLES, method)
            for variant, face, line in zip(variants, ("white", color), (":", "-")):
                part = frame[
                    (frame["protocol"] == protocol) & (frame["method"] == method) & (frame["variant"] == variant)
                ].sort_values("composite")
                if part.empty:
                    continue  # a line without points would count as one in the figure's corner
                axes.plot(
                    part["composite"], part["value"] / part["composite"], color=color, marker=marker, linestyle=line,
                    markerfacecolor=face, label=f"{label(method)}, {variant}", clip_on=False,
                )  # fmt: skip
                low, high = (part[end] / part["composite"] for end in ("low", "high"))
                axes.fill_between(part["composite"].astype(float), low, high, color=color, alpha=0.08)
        axes.set(title=protocol, xlabel="problems in the composite", ylim=(0, 1))
        axes.set_xticks(sorted(frame["composite"].unique()))
    panels[0].set_ylabel(f"share of correct answers ({frame['split'].iloc[0]} split, n = {frame['n'].max():g})")
    _one_legend(figure, panels, columns=2)
    return figure


@styled
def speed_curves(ablations: pd.DataFrame) -> Figure:
    """Time and memory of the whole model: a row a measure, a column what is varied. Adapters: copies with some noise."""
    frame = _of(ablations, "scale")
    frame = frame[frame["metric"].isin(_SPEED)]
    usual = frame.groupby("variant")[["adapters", "batch", "tokens"]].first()
    columns = ("adapters", "batch", "tokens")
    # what most settings share is what is held while another one is varied
    held = {column: usual[column].mode().iloc[0] for column in columns}
    varied = [column for column in columns if frame[column].nunique() > 1] or ["adapters"]
    figure = plt.figure(figsize=(0.8 + 2.9 * len(varied), 7.0), layout="constrained")
    grid = figure.subplots(len(_SPEED), len(varied), squeeze=False, sharex="col", sharey="row")
    for column, axes_of in zip(varied, grid.T):
        part = frame
        for other in columns:
            part = part[part[other] == held[other]] if other != column else part
        for axes, (metric, (text, factor)) in zip(axes_of, _SPEED.items()):
            for method in [m for m in ("base", "single_lora", "meteora_top2") if m in set(part["method"])]:
                points = part[(part["method"] == method) & (part["metric"] == metric)].sort_values(column)
                color, marker, line = style_of(_STYLES, method)
                axes.plot(
                    points[column].astype(float), points["value"].astype(float) * factor, color=color, marker=marker,
                    linestyle=line, label="One LoRA" if method == "single_lora" else label(method),
                )  # fmt: skip
            axes.set_xscale("log", base=2)
        words = {"adapters": "{:g} adapters", "batch": "batch of {:g}", "tokens": "{:g} tokens"}
        rest = ", ".join(words[other].format(held[other]) for other in columns if other != column)
        axes_of[0].set_title(rest, fontsize=8)
        axes_of[-1].set_xlabel({"batch": "prompts at once", "tokens": "tokens of a prompt"}.get(column, column))
        ticks = sorted(part[column].unique())
        axes_of[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes_of[-1].minorticks_off()
    for axes, (text, _) in zip(grid[:, 0], _SPEED.values()):  # shared by the row, so only when all of it is drawn
        axes.set(ylabel=text, ylim=(0, None))
    _one_legend(figure, grid.flat)
    return figure


def _of(ablations: pd.DataFrame, study: str, metric: str | None = None) -> pd.DataFrame:
    require_columns(ablations, NEEDED, "ablations.csv")
    frame = ablations[ablations["study"] == study]
    frame = frame if metric is None else frame[frame["metric"] == metric]
    if frame.empty:
        raise ValueError(f"ablations.csv has no rows of study {study!r}; run it first.")
    return frame


def _mean_lines(axes: Axes, frame: pd.DataFrame, column: str) -> None:
    """Every method's mean accuracy over ``column``, with its interval."""
    means = frame[frame["metric"] == "accuracy"]
    for method in in_order(means["method"]):
        part = means[means["method"] == method].sort_values(column)
        color, marker, line = style_of(_STYLES, method)
        axes.plot(part[column], part["value"], color=color, marker=marker, linestyle=line, label=label(method))
        axes.fill_between(part[column].astype(float), part["low"], part["high"], color=color, alpha=0.12)


def _gate_lines(axes: Axes, frame: pd.DataFrame, column: str) -> None:
    """How often single gates, and their majority, are right, over ``column``."""
    for metric, marker, line in (("gate_accuracy", "o", "-"), ("majority_accuracy", "s", "--")):
        part = frame[frame["metric"] == metric].sort_values(column)
        text = "single gates" if metric == "gate_accuracy" else "majority of a token's gates"
        axes.plot(part[column], part["value"], color=BLUE, marker=marker, linestyle=line, label=text)


def _dots(axes: Axes, part: pd.DataFrame, variants: Sequence[str]) -> None:
    """Values with intervals: a line a variant, from the top down, a marker a method."""
    methods = in_order(part["method"])
    alone = part.groupby("variant").size().max() == 1  # then nothing is in its way
    offsets = len(methods) * [0.0] if alone else np.linspace(0.22, -0.22, len(methods))
    for method, offset in zip(methods, offsets):
        own = part[part["method"] == method].set_index("variant").reindex(variants)
        color, marker, _ = style_of(_STYLES, method)
        places = np.arange(len(variants))[::-1] + offset
        axes.hlines(places, own["low"].astype(float), own["high"].astype(float), color=color, linewidth=1.3)
        axes.plot(
            own["value"], places, color=color, marker=marker, linestyle="", markersize=5, label=label(method),
            clip_on=False,
        )  # fmt: skip
    axes.set_yticks(range(len(variants)), list(variants)[::-1])
    axes.set_ylim(-0.5, len(variants) - 0.5)
    axes.grid(axis="y", visible=False)


def _one_legend(figure: Figure, panels: Sequence[Axes], *, columns: int = 4) -> None:
    """Every label of all panels once, below them."""
    seen = {}
    for axes in panels:
        for handle, text in zip(*axes.get_legend_handles_labels()):
            seen.setdefault(text, handle)
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=min(columns, max(1, len(seen)))
    )  # fmt: skip


# Study -> what its figure shows, in words for a page that has nothing else of it, and the figure.
KNOBS = ("top_k", "temperature", "deciding", "weights", "told", "silent", "modules", "gates", "arrow")
DRAWN: dict[str, tuple[str, Callable[[pd.DataFrame], Figure]]] = {
    "top_k": (
        "One thing is varied, the rest stays. *Gates that decide*: all layers follow those of attention or of "
        "the MLP. *Weights*: what they add up to, or those of an unsure gate. *Own adapter*: some layers are told "
        "the task. *Gates without training*: rows are made of the adapters, as in Arrow.",
        lambda rows: variant_accuracy(rows, KNOBS),
    ),
    "adapters": (
        "The same tasks in models with more and more adapters, whose gates were trained anew.",
        accuracy_over_adapters,
    ),
    "prompts": (
        "Gates that were trained on few examples of each task.",
        accuracy_over_prompts,
    ),
    "added": (
        "An adapter that joins trained gates: its row alone is trained, or made of the adapter (*closed form*), "
        "or all are trained anew.",
        added_adapter,
    ),
    "unknown": (
        "Tasks for which the model has no adapter. Those named *toy* are not the paper's.",
        unknown_tasks,
    ),
    "shots": (
        "Solved examples in the prompt: answers attempted (hollow) and correct (filled), with intervals.",
        shots_curves,
    ),
    "formats": (
        "Adapters, LoRA-B and gates that learned from composites, too: share of correct answers, with intervals.",
        formats_curves,
    ),
    "seeds": (
        "All was trained again with other seeds.",
        lambda rows: variant_accuracy(rows, ["seeds"]),
    ),
    "scale": (
        "Time and memory of the whole model on {device}. Adapters beyond those of the tasks are copies with some noise.",
        speed_curves,
    ),
}
