"""Figure 5 (total running time) and the backends' time and memory over tokens and adapters, from ``benchmark.csv``."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from meteora.study.figures_style import BACKEND_LABELS, BACKEND_STYLES, legend_below, style_of, styled
from meteora.study.tables import require_columns

_SETTING = ["mode", "launch", "routing", "rank", "top_k", "dtype"]
_CELL = ["workload", *_SETTING, "batch", "tokens", "adapters", "in_features", "out_features"]
_NEEDED = [*_CELL, "backend", "metric", "value", "p20", "p80"]
_AXES = {"time_us": "time (ms)", "peak_bytes": "extra memory (MiB)"}
_SCALE = {"time_us": 1e-3, "peak_bytes": 2.0**-20}
_AMONG = {"tokens": "tokens in the call", "adapters": "adapters"}


@styled
def figure5_total_time(benchmark: pd.DataFrame) -> Figure:
    """Figure 5: total time of every forward strategy over the same cells, the slowest on top.

    Of workload ``tasks`` (the tasks' real prompts) if it was measured, else of the linear layers. Only the cells in
    which every strategy was measured count, and each is plain time, no root.
    """
    require_columns(benchmark, _NEEDED, "benchmark.csv")
    frame = benchmark[(benchmark["metric"] == "time_us") & (benchmark["mode"] != "backward")]
    workload = "tasks" if (frame["workload"] == "tasks").any() else "layer"
    wide = _wide(frame[frame["workload"] == workload])
    totals = wide.sum().sort_values()
    unit, scale = ("s", 1e-6) if totals.max() >= 1e6 else ("ms", 1e-3)
    totals *= scale
    figure = plt.figure(figsize=(7.5, 1.3 + 0.42 * len(totals)), layout="constrained")
    axes = figure.add_subplot()
    colors = [style_of(BACKEND_STYLES, name)[0] for name in totals.index]
    hatches = ["//" if name in ("single_lora", "base") else "" for name in totals.index]
    bars = axes.barh([BACKEND_LABELS.get(n, n) for n in totals.index], totals, color=colors, height=0.65)
    for bar, hatch in zip(bars, hatches):
        bar.set(hatch=hatch, edgecolor="white", linewidth=0)
    fastest = totals.min()
    axes.bar_label(bars, [f"{t:.3g} {unit}  ({t / fastest:.1f}x)" for t in totals], padding=4, fontsize=8)
    axes.set_xlim(0, totals.max() * 1.25)
    axes.grid(axis="y", visible=False)
    what = "the tasks' prompts" if workload == "tasks" else "linear layers of several sizes"
    axes.set(xlabel=f"total time over {len(wide)} measurements ({unit})", title=f"Total running time: {what}")
    return figure


@styled
def benchmark_over(benchmark: pd.DataFrame, variable: str = "tokens", *, mode: str = "forward") -> Figure:
    """Time and memory of the layer's adapter part over ``tokens`` or ``adapters``, one column a layer size.

    The other of the two is at its largest value. Bands are the 20% and 80% quantiles of the repeats; both axes are
    logarithmic. Memory is left out where it was not measured, and where it is zero.

    Raises:
        ValueError: for another variable, or if nothing was measured in that mode.
    """
    require_columns(benchmark, _NEEDED, "benchmark.csv")
    if variable not in _AMONG:
        raise ValueError(f"a benchmark is drawn over {' or '.join(_AMONG)}, not over {variable!r}.")
    frame = benchmark[(benchmark["workload"] == "layer") & (benchmark["mode"] == mode)]
    if frame.empty:
        raise ValueError(f"benchmark.csv has no rows of workload layer and mode {mode!r}; run notebook 05 again.")
    other = "adapters" if variable == "tokens" else "tokens"
    fixed = frame[other].max()
    frame, setting = _one_setting(frame[frame[other] == fixed])
    metrics = [m for m in _AXES if (frame[frame["metric"] == m]["value"] > 0).any()]
    sizes = sorted(set(zip(frame["in_features"], frame["out_features"])))
    figure = plt.figure(figsize=(1.2 + 3.4 * len(sizes), 0.9 + 2.6 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(sizes), squeeze=False, sharex=True, sharey="row")
    for column, size in enumerate(sizes):
        part = frame[(frame["in_features"] == size[0]) & (frame["out_features"] == size[1])]
        for line, metric in enumerate(metrics):
            _lines(grid[line, column], part[part["metric"] == metric], variable, metric)
        grid[0, column].set_title(f"{size[0]} → {size[1]}")
        grid[-1, column].set_xlabel(_AMONG[variable])
        grid[-1, column].set_xticks(sorted(frame[variable].unique()))
        grid[-1, column].xaxis.set_minor_locator(NullLocator())
        grid[-1, column].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for line, metric in enumerate(metrics):
        grid[line, 0].set_ylabel(_AXES[metric])
    figure.suptitle(f"{mode} pass, {fixed} {_AMONG[other]}, {setting}", fontsize=9)
    legend_below(figure, grid[0, 0], columns=3)
    return figure


def _lines(axes: Axes, part: pd.DataFrame, variable: str, metric: str) -> None:
    scale = _SCALE[metric]
    for backend in [b for b in BACKEND_STYLES if b in set(part["backend"])]:
        rows = part[part["backend"] == backend].groupby(variable)[["value", "p20", "p80"]].median() * scale
        color, marker, line = style_of(BACKEND_STYLES, backend)
        text = BACKEND_LABELS.get(backend, backend)
        axes.plot(rows.index, rows["value"], color=color, marker=marker, linestyle=line, markersize=4.5, label=text)
        axes.fill_between(rows.index, rows["p20"], rows["p80"], color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _one_setting(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of the setting that has the most, and that setting in words: curves must differ in one thing only.

    Of several with as many, the alphabetically last one: routing uniform rather than runs.
    """
    counts = frame.groupby(_SETTING).size()
    best = counts[counts == counts.max()].index[-1]
    chosen = frame[(frame[_SETTING] == pd.Series(best, index=_SETTING)).all(axis=1)]
    values = dict(zip(_SETTING, best))
    return chosen, "rank {rank}, top-{top_k}, {dtype}, {launch}, {routing} routing".format(**values)


def _wide(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell that every backend has, one column a backend."""
    wide = frame.pivot_table(index=_CELL, columns="backend", values="value", aggfunc="median").dropna()
    if wide.empty:
        raise ValueError("benchmark.csv has no cell in which every backend was timed; run notebook 05 again.")
    return wide
