"""Figure 3, a radar and the same as a sorted dot plot, from ``independent.csv``; composites from ``composite.csv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meteora.study.figures_style import INK, METHOD_STYLES, legend_below, style_of, styled
from meteora.study.tables import (
    COMPOSITE_COLUMNS,
    INDEPENDENT_COLUMNS,
    METRIC_LABELS,
    in_order,
    label,
    method_means,
    require_columns,
    scored_tasks,
)

RADAR_METHODS = ("peft", "meteora_top1", "meteora_top2", "lora_f", "lora_b")


@styled
def figure3_radar(
    independent: pd.DataFrame, metric: str = "accuracy", methods: Sequence[str] = RADAR_METHODS
) -> Figure:
    """Figure 3: one spoke a task, one line a method. Methods that were not measured are left out.

    Args:
        independent: rows ``task,method,metric,value,low,high,n``.
    """
    frame = _of_metric(independent, metric)
    tasks = sorted(frame["task"].unique())
    angles = 2 * np.pi * np.arange(len(tasks)) / len(tasks)
    size = 5.0 + 0.1 * len(tasks)
    figure = plt.figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    for method in in_order(m for m in methods if m in set(frame["method"])):
        values = frame[frame["method"] == method].set_index("task")["value"].reindex(tasks).to_numpy(dtype=float)
        color, marker, line = style_of(METHOD_STYLES, method)
        axes.plot(
            np.append(angles, angles[0]), np.append(values, values[0]), color=color, marker=marker, linestyle=line,
            linewidth=1.6, markersize=4.5, label=label(method), clip_on=False,
        )  # fmt: skip
        if method.startswith("meteora"):
            axes.fill(angles, values, color=color, alpha=0.08)
    top = 100.0 if metric.startswith("bleu") else 1.0
    reach = frame[frame["method"].isin(methods)]["value"].max()
    outer = min(1.0, max(0.2, np.ceil(10 * reach / top) / 10)) * top
    axes.set_ylim(0, outer)
    step = (0.2 if outer > 0.5 * top else 0.1) * top
    axes.set_yticks(np.arange(step, outer - step / 2, step))  # the outermost one would lie on a task's name
    axes.set_rlabel_position(180 / len(tasks))
    axes.tick_params(axis="y", labelsize=7, labelcolor="#444444")
    axes.set_axisbelow(False)  # the numbers lie among the curves
    for text in axes.get_yticklabels():
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6})
    axes.set_xticks(angles, [_wrapped(task) for task in tasks], fontsize=8 if len(tasks) > 12 else 9)
    for text, angle in zip(axes.get_xticklabels(), angles):
        side, height = np.sin(angle), np.cos(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        text.set_verticalalignment("center" if abs(height) < 0.8 else "bottom" if height > 0 else "top")
    figure.suptitle(f"{METRIC_LABELS.get(metric, metric)} by task (rim: {outer:g})", fontsize=10)
    legend_below(figure, axes, columns=3)
    return figure


@styled
def figure3_dots(
    independent: pd.DataFrame, metric: str = "accuracy", methods: Sequence[str] | None = None
) -> Figure:
    """Figure 3 as a dot plot with 95% intervals: tasks sorted by PEFT's value (else by the mean), the mean on top.

    Args:
        independent: rows ``task,method,metric,value,low,high,n``.
        methods: default: all.
    """
    frame = _of_metric(independent, metric)
    methods = in_order(m for m in methods or frame["method"] if m in set(frame["method"]))
    frame = frame[frame["method"].isin(methods)]
    key = frame[frame["method"] == "peft"] if "peft" in methods else frame
    tasks = key.groupby("task")["value"].mean().sort_values(kind="stable").index.tolist()
    means = method_means(frame).assign(task=f"mean over {len(tasks)} tasks")
    rows = [*tasks, means["task"].iloc[0]]
    frame = pd.concat([frame, means.astype({"low": float, "high": float})])
    pitch = 0.25 + 0.075 * len(methods) if len(tasks) <= 12 else 0.15 + 0.05 * len(methods)  # inches a task
    figure = plt.figure(figsize=(7.5, 1.4 + pitch * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    offsets = np.linspace(0.36, -0.36, len(methods)) if len(methods) > 1 else [0.0]
    for method, offset in zip(methods, offsets):
        part = frame[frame["method"] == method].set_index("task").reindex(rows)
        color, marker, _ = style_of(METHOD_STYLES, method)
        places = np.arange(len(rows)) + offset
        axes.hlines(places, part["low"], part["high"], color=color, linewidth=1.3)
        axes.plot(part["value"], places, color=color, marker=marker, linestyle="", markersize=5, label=label(method))
    for place in range(0, len(rows), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#f7f7f7", zorder=0)
    axes.axhline(len(tasks) - 0.5, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.grid(axis="y", visible=False)
    unit = "0..100" if metric.startswith("bleu") else "0..1"
    axes.set_xlabel(f"{METRIC_LABELS.get(metric, metric)} ({unit}), with 95% bootstrap interval")
    axes.tick_params(top=True, labeltop=True)  # the rows may fill several screens
    legend_below(figure, axes)
    return figure


@styled
def composite_summary(composite: pd.DataFrame, guess: Mapping[int, float] | None = None) -> Figure:
    """Attempted (hollow) and correct (filled) answers per item: a row a composite and temperature, a column a protocol.

    A protocol that was run with and without examples has a column for each.

    Args:
        composite: rows ``composite,protocol,shots,temperature,subtask,method,metric,value,low,high,n``.
        guess: size -> correct answers of the better guess of each problem, a dotted line.
    """
    require_columns(composite, COMPOSITE_COLUMNS, "composite.csv")
    frame = composite[composite["subtask"] == "ALL"]
    if frame.empty:
        raise ValueError("composite.csv has no rows of sub-task ALL; run the composite evaluation again.")
    methods, scored = in_order(frame["method"]), scored_tasks(composite)
    keys = ["composite", "temperature", "protocol", "shots"]
    panels = {(*key[:2], key[2:]): part for key, part in frame.groupby(keys, sort=False)}
    runs = list(dict.fromkeys(run for _, _, run in panels))
    rows = list(dict.fromkeys((size, temperature) for size, temperature, _ in panels))
    height = 0.7 + len(rows) * (0.9 + 0.28 * len(methods))
    figure = plt.figure(figsize=(1.3 + 2.9 * len(runs), height), layout="constrained")
    grid = figure.subplots(len(rows), len(runs), squeeze=False, sharey=True)
    for (size, temperature), line in zip(rows, grid):
        for run, axes in zip(runs, line):
            part = panels.get((size, temperature, run))
            if part is None:
                axes.set_visible(False)
            else:
                _composite_panel(axes, part, methods, size, len(scored.get(size, range(size))))
                if guess is not None:
                    axes.axvline(guess[size], color=INK, linestyle=":", linewidth=1.1, zorder=0)
                axes.set_title(f"composite-{size}, {run[0]}\n{run[1]}-shot, T = {temperature:g}")
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color="#333333", markerfacecolor=face, label=text)
        for face, text in (("white", "attempted"), ("#333333", "correct"))
    ]
    if guess is not None:
        handles.append(plt.Line2D([], [], color=INK, linestyle=":", linewidth=1.1, label="the better guess, correct"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _composite_panel(axes: Axes, part: pd.DataFrame, methods: Sequence[str], size: int, scored: int) -> None:
    for metric, offset, filled in (("attempted", 0.14, False), ("correct", -0.14, True)):
        found = part[part["metric"] == metric].set_index("method").reindex(methods)
        for place, method in enumerate(methods):
            color, marker, _ = style_of(METHOD_STYLES, method)
            row, height = found.loc[method], len(methods) - 1 - place + offset
            axes.hlines(height, row["low"], row["high"], color=color, linewidth=1.4)
            axes.plot(
                row["value"], height, marker=marker, color=color, markerfacecolor=color if filled else "white",
                markersize=5.5, linestyle="", clip_on=False,
            )  # fmt: skip
    axes.set_xlim(0, size)
    axes.set_xlabel(f"answers per item (of {size})" if scored == size else f"attempted (of {size}), correct (of {scored})")
    axes.set_yticks(range(len(methods)), [label(m) for m in reversed(methods)])
    axes.set_ylim(-0.6, len(methods) - 0.4)


def _of_metric(independent: pd.DataFrame, metric: str) -> pd.DataFrame:
    require_columns(independent, INDEPENDENT_COLUMNS, "independent.csv")
    frame = independent[independent["metric"] == metric]
    if frame.empty:
        known = ", ".join(independent["metric"].unique())
        raise ValueError(f"independent.csv has no metric {metric!r}; it has {known}.")
    return frame


def _wrapped(task: str) -> str:
    """A task's name on lines of about 22 characters, broken at underscores."""
    lines = [""]
    for word in task.split("_"):
        if lines[-1] and len(lines[-1]) + len(word) >= 22:
            lines.append("")
        lines[-1] += ("_" if lines[-1] else "") + word
    return "_\n".join(lines)
