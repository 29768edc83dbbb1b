"""Gates and adapters while they learn, and what the gates choose afterwards."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meteora.study.figures_style import BLUE, GREY, ORANGE, PINK, legend_below, styled
from meteora.study.tables import require_columns

_LOSSES = {
    "loss": ("total loss", "#000000", "-"),
    "lm_loss": ("language-modelling loss", ORANGE, "-."),
    "gate_loss": ("gate cross-entropy", BLUE, "--"),
}


@styled
def gate_curves(
    gate_training: pd.DataFrame, *, adapters: int | None = None, stand_in: str | None = None
) -> Figure:
    """Losses and gate accuracy over the steps, each step pale and a running mean over 1/40 of the steps on top.

    Where ``lm_loss`` begins or ends, another objective is trained: a line marks that step, and no mean reaches over it.

    Args:
        gate_training: rows ``step,loss,lm_loss,gate_loss,gate_accuracy``; a loss that was not computed is empty.
        adapters: draws the accuracy of a gate that guesses among so many.
        stand_in: what ``lm_loss`` is where it is no language-modelling loss, hence not in nats.
    """
    require_columns(gate_training, ("step", "loss", "lm_loss", "gate_loss", "gate_accuracy"), "gate_training.csv")
    figure = plt.figure(figsize=(8.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    changes = gate_training["lm_loss"].notna().astype(int).diff().fillna(0) != 0
    for column, (text, color, line) in _LOSSES.items():
        label = stand_in if stand_in and column == "lm_loss" else text
        _curve(left, gate_training["step"], gate_training[column], color, line, label, changes.cumsum())
    unit = "loss" if stand_in else "loss (nats per token)"
    left.set(xlabel="step (optimiser updates)", ylabel=unit, title="Loss (bold: running mean)")
    left.set_ylim(0, 1.06 * left.dataLim.y1)
    _curve(right, gate_training["step"], gate_training["gate_accuracy"], BLUE, "-", "gates' first choice")
    if adapters:
        right.axhline(1 / adapters, color=GREY, linestyle=":", label=f"guessing among {adapters}")
    right.set(xlabel="step (optimiser updates)", ylabel="share of tokens and layers")
    right.set_title("Gate accuracy (bold: running mean)")
    right.set_ylim(0, 1.02)
    for n, step in enumerate(gate_training["step"][changes]):
        for axes in (left, right):
            label = "another objective" if axes is right and n == 0 else None
            axes.axvline(step - 0.5, color=GREY, linestyle="--", linewidth=1, label=label)
    handles = [handle for axes in (left, right) for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if len(handles) <= 5 else 3)
    return figure


@styled
def adapter_curves(history: pd.DataFrame) -> Figure:
    """Every adapter's training loss (pale, with its running mean) and validation loss (marked), a panel an adapter.

    A panel ends at three times its largest validation loss.

    Args:
        history: rows ``step,task,split,loss``, split train or valid.
    """
    require_columns(history, ("step", "task", "split", "loss"), "adapter_training.csv")
    tasks = list(dict.fromkeys(history["task"]))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = plt.figure(figsize=(0.6 + 2.5 * columns, 0.8 + 2.0 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axes, task in zip(grid.flat, tasks):
        own = history[history["task"] == task]
        train, valid = own[own["split"] == "train"], own[own["split"] == "valid"]
        _curve(axes, train["step"], train["loss"], ORANGE, "-", "training")
        if len(valid):
            axes.plot(valid["step"], valid["loss"], color=BLUE, marker="o", markersize=3.5, label="validation")
            best = valid.loc[valid["loss"].idxmin()]
            axes.plot(best["step"], best["loss"], color=PINK, marker="*", markersize=10, linestyle="", label="kept")
        axes.set_title(task, fontsize=9)
        most = own["loss"].max() if valid.empty else min(own["loss"].max(), 3 * valid["loss"].max())
        axes.set_ylim(0, 1.06 * most)  # of the first steps' losses, what would press the others to the ground is cut off
    for axes in list(grid.flat)[len(tasks):]:
        axes.set_visible(False)
    for n, axes in enumerate(list(grid.flat)[: len(tasks)]):
        if n + columns >= len(tasks):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step (optimiser updates)")
    figure.supylabel("loss (nats per response token)", fontsize=9)
    legend_below(figure, grid.flat[0])
    return figure


@styled
def routing_heatmaps(routing: pd.DataFrame) -> Figure:
    """What the gates choose: task by adapter; then a task's own adapter, task by layer and module by layer.

    Args:
        routing: rows ``layer,module,task,adapter,share``; the shares of one layer, module and task sum to 1.
    """
    require_columns(routing, ("layer", "module", "task", "adapter", "share"), "routing.csv")
    tasks, adapters = list(dict.fromkeys(routing["task"])), list(dict.fromkeys(routing["adapter"]))
    modules = list(dict.fromkeys(routing["module"]))
    own = routing[routing["task"] == routing["adapter"]]
    matrix = routing.pivot_table(index="task", columns="adapter", values="share").loc[tasks, adapters]
    height = 1.2 + 0.2 * max(len(tasks), 6) + 0.05 * max(map(len, adapters))  # the latter for the slanted names
    widths = [1.2 + 0.22 * len(adapters), 2.6, 2.6] if len(own) else [1.2 + 0.22 * len(adapters)]
    figure = plt.figure(figsize=(sum(widths) + 3.2, height), layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _heatmap(panels[0], matrix, "Routing weight by task", "adapter", "task", annotate=len(tasks) <= 8)
    if len(own):
        by_layer = own.pivot_table(index="task", columns="layer", values="share").reindex(tasks)
        _heatmap(panels[1], by_layer, "Own adapter's weight by layer", "layer", "")
        by_module = own.pivot_table(index="module", columns="layer", values="share").loc[modules]
        _heatmap(panels[2], by_module, "Own adapter's weight by module", "layer", "")
        panels[1].tick_params(labelleft=False)
    figure.colorbar(panels[0].collections[0], ax=list(panels), label="share of routing weight", pad=0.01)
    return figure


def _heatmap(axes: Axes, matrix: pd.DataFrame, title: str, xlabel: str, ylabel: str, annotate: bool = False) -> None:
    values = matrix.to_numpy(dtype=float)
    edges = {"edgecolors": "white", "linewidth": 0.5} if annotate else {}
    axes.pcolormesh(values, vmin=0, vmax=1, cmap="cividis", rasterized=True, **edges)
    axes.invert_yaxis()
    if annotate:
        for (line, column), value in np.ndenumerate(values):
            ink = "black" if value > 0.5 else "white"
            axes.text(column + 0.5, line + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=9)
    axes.grid(visible=False)
    if xlabel == "adapter":
        places = np.arange(matrix.shape[1]) + 0.5
        axes.set_xticks(places, matrix.columns, rotation=45, ha="right", rotation_mode="anchor")
    else:
        every = -(-matrix.shape[1] // 8)
        axes.set_xticks(np.arange(0, matrix.shape[1], every) + 0.5, matrix.columns[::every], rotation=0)
    axes.set_yticks(np.arange(matrix.shape[0]) + 0.5, matrix.index, rotation=0)


def _curve(
    axes: Axes, steps: pd.Series, values: pd.Series, color: str, line: str, text: str, parts: pd.Series | None = None
) -> None:
    """Values and their running mean; with ``parts``, which says what part a step belongs to, one of each part."""
    present = values.notna()
    if not present.any():
        return
    steps, values = steps[present], values[present].astype(float)
    window = max(1, len(values) // 40)
    parts = pd.Series(0, index=values.index) if parts is None else parts[present]
    for n, (_, part) in enumerate(values.groupby(parts)):
        axes.plot(steps[part.index], part, color=color, alpha=0.25, linewidth=0.8)
        smooth = part.rolling(window, min_periods=1, center=True).mean()
        axes.plot(steps[part.index], smooth, color=color, linestyle=line, linewidth=1.8, label=text if n == 0 else None)
