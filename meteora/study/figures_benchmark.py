"""Figure 5 (total running time), and the strategies' time and memory over tokens and adapters."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from meteora.study.benchmark_results import BOUNDS, NEEDED, best_launch, side_by_side
from meteora.study.figures_style import BACKEND_LABELS, BACKEND_STYLES, INK, legend_below, style_of, styled
from meteora.study.profiles import ROUTINGS
from meteora.study.tables import require_columns

_SETTING = ["routing", "rank", "top_k", "dtype"]
_SIZE = ["in_features", "out_features"]
_AXES = {"time_us": "time (ms)", "peak_bytes": "extra memory (MiB)"}
_SCALE = {"time_us": 1e-3, "peak_bytes": 2.0**-20}
_AMONG = {"tokens": "tokens in the call", "adapters": "adapters"}
_RATIO_AIMS = {"forward": 1.15, "backward": 1.3}  # of the fused kernels, hence only where they were measured


@styled
def figure5_total_time(benchmark: pd.DataFrame) -> Figure:
    """Figure 5: total time of every strategy over the same work, the slowest on top; one panel a routing.

    Of workload ``tasks`` (the tasks' real prompts) if it was measured, else of the linear layers' forward passes. Only
    what every strategy was measured on counts, and each is plain time, no root.
    """
    require_columns(benchmark, NEEDED, "benchmark.csv")
    tasks = benchmark[(benchmark["workload"] == "tasks") & (benchmark["metric"] == "time_us")]
    if tasks.empty:
        wide = side_by_side(benchmark).dropna().reset_index()
        wide = wide[wide["mode"] == "forward"]
    else:
        # Two tasks may have prompts of as many tokens; they are told apart by their order.
        key = ["routing", *_SIZE, "tokens"]
        tasks = tasks.assign(nth=tasks.groupby([*key, "backend"]).cumcount())
        wide = tasks.pivot(index=[*key, "nth"], columns="backend", values="value").dropna().reset_index()
    if wide.empty:
        raise ValueError("benchmark.csv has no setting in which every strategy was timed; run notebook 05 again.")
    backends = [name for name in wide.columns if name in BACKEND_STYLES]
    panels = {routing: wide[wide["routing"] == routing] for routing in ROUTINGS if (wide["routing"] == routing).any()}
    size = (7.5, len(panels) * (0.9 + 0.36 * len(backends)) + 0.4)
    figure = plt.figure(figsize=size, layout="constrained")
    for axes, (routing, part) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
        _total_bars(axes, part[backends].sum().sort_values())
        axes.set_title(f"{routing} routing", loc="left")
    layers = len(wide[_SIZE].drop_duplicates())
    if tasks.empty:
        what = f"linear layers of {layers} size{'s' * (layers > 1)}, {len(part)} settings"
    else:
        tokens, count = part["tokens"].sum() // layers, len(part) // layers
        what = f"{tokens:,} tokens of {count} tasks' prompts, {layers} linear layer{'s' * (layers > 1)}\n"
        one = tasks.iloc[0]
        what += f"{one['adapters']} adapters of rank {one['rank']}, top-{one['top_k']}"
    figure.suptitle(f"Total running time: {what}")
    return figure


def _total_bars(axes: Axes, totals: pd.Series) -> None:
    unit, scale = ("s", 1e-6) if totals.max() >= 1e6 else ("ms", 1e-3)
    totals = totals * scale
    colors = [style_of(BACKEND_STYLES, name)[0] for name in totals.index]
    bars = axes.barh([BACKEND_LABELS.get(n, n) for n in totals.index], totals, color=colors, height=0.65)
    for bar, name in zip(bars, totals.index):
        bar.set(hatch="//" if name in BOUNDS else "", edgecolor="white", linewidth=0)
    one = totals.get("single_lora", totals.min())
    axes.bar_label(bars, [f"{t:.3g} {unit}  ({t / one:.1f}x)" for t in totals], padding=4, fontsize=8)
    axes.set_xlim(0, totals.max() * 1.25)
    axes.set_xlabel(f"total time ({unit}); in brackets: in times of one LoRA's")
    axes.grid(axis="y", visible=False)


@styled
def benchmark_over(
    benchmark: pd.DataFrame,
    variable: str = "tokens",
    *,
    mode: str = "forward",
    rank: int | None = None,
    routing: str | None = None,
) -> Figure:
    """Time and memory of the layer's adapter part over ``tokens`` or ``adapters``, one column a layer size.

    Everything else is what most was measured at, unless ``rank`` or ``routing`` is given; over ``adapters`` there is a
    column for the fewest and one for the most tokens. Bands are the 20% and 80% quantiles of the repeats; both axes are
    logarithmic. Memory is left out where it was not measured, and where it is zero.

    Raises:
        ValueError: for another variable, or if nothing was measured in that mode.
    """
    if variable not in _AMONG:
        raise ValueError(f"a benchmark is drawn over {' or '.join(_AMONG)}, not over {variable!r}.")
    frame = _layer_rows(benchmark, mode)
    for column, value in (("rank", rank), ("routing", routing)):
        frame = frame if value is None else frame[frame[column] == value]
    other = ["adapters"] if variable == "tokens" else []
    frame = _one_setting(frame, variable, other)
    columns = _SIZE if variable == "tokens" else [*_SIZE, "tokens"]
    values = frame.groupby(columns)[variable].nunique()
    places = values[values == values.max()].index.to_frame(index=False)
    if variable == "adapters":
        of_size, tokens = places.groupby(_SIZE)["tokens"], places["tokens"]
        places = places[(tokens == of_size.transform("min")) | (tokens == of_size.transform("max"))]
    places = list(places.itertuples(index=False, name=None))
    metrics = [m for m in _AXES if (frame[frame["metric"] == m]["value"] > 0).any()]
    figure = plt.figure(figsize=(1.2 + 3.2 * len(places), 0.9 + 2.6 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(places), squeeze=False, sharex=True, sharey="row")
    for column, place in enumerate(places):
        part = _rows_with(frame, columns, place)
        for line, metric in enumerate(metrics):
            draw_lines(grid[line, column], part[part["metric"] == metric], variable, _SCALE[metric])
            log_axis(grid[line, column])
        tokens = "" if variable == "tokens" else f", {place[2]} token{'s' * (place[2] > 1)}"
        grid[0, column].set_title(f"{place[0]} → {place[1]}{tokens}")
        variable_axis(grid[-1, column], _AMONG[variable], frame[variable])
    for line, metric in enumerate(metrics):
        grid[line, 0].set_ylabel(_AXES[metric])
    fixed = f"{frame['adapters'].iloc[0]} adapters, " if variable == "tokens" else ""
    figure.suptitle(f"{mode} pass, {fixed}{_in_words(frame)}", fontsize=9)
    legend_below(figure, grid[0, 0])
    return figure


@styled
def benchmark_ratios(benchmark: pd.DataFrame, mode: str = "forward", *, routing: str = "uniform") -> Figure:
    """Every strategy's time as a multiple of one LoRA's over the tokens: one column a layer size, one row a rank.

    The dashed line is one LoRA itself, the dotted one what the fused kernels aim at, where they were measured. There
    ``auto`` is one of them, and has no line of its own; nor has the loop, beside which all others would be one.
    """
    frame = _layer_rows(benchmark, mode)
    frame = frame[(frame["metric"] == "time_us") & (frame["routing"] == routing)]
    if (frame["backend"] == "triton").any():
        frame = frame[~frame["backend"].isin(["auto", "loop"])]
    key = [column for column in NEEDED if column not in ("backend", "value", "launch")]
    one = frame[frame["backend"] == "single_lora"].set_index(key)["value"].rename("one")
    frame = frame.join(one, on=key)
    frame[["value", "p20", "p80"]] = frame[["value", "p20", "p80"]].div(frame["one"], axis=0)
    aimed = frame["backend"].isin(["triton", "auto"]).any()
    ranks, sizes = sorted(frame["rank"].unique()), sorted(set(zip(*(frame[column] for column in _SIZE))))
    figure = plt.figure(figsize=(1.2 + 3.2 * len(sizes), 1.0 + 2.7 * len(ranks)), layout="constrained")
    grid = figure.subplots(len(ranks), len(sizes), squeeze=False, sharex=True, sharey="row")
    for line, rank in enumerate(ranks):
        chosen = _one_setting(frame[frame["rank"] == rank], "tokens", ["adapters"])
        for column, size in enumerate(sizes):
            axes = grid[line, column]
            part = _rows_with(chosen[~chosen["backend"].isin(BOUNDS)], _SIZE, size)
            draw_lines(axes, part, "tokens", 1.0)
            axes.axhline(1, color=INK, linestyle="--", linewidth=1)
            if aimed:
                axes.axhline(_RATIO_AIMS[mode], color=INK, linestyle=":", linewidth=1)
            log_axis(axes)
            axes.set_title(f"{size[0]} → {size[1]}, rank {rank}")
            variable_axis(grid[-1, column], _AMONG["tokens"], frame["tokens"])
        grid[line, 0].set_ylabel("times one LoRA")
    fixed = f"{chosen['adapters'].iloc[0]} adapters, {_in_words(chosen, rank=False)}"
    aim = f"; dotted: {_RATIO_AIMS[mode]:g}x, the aim" if aimed else ""
    figure.suptitle(f"{mode} pass, {fixed}{aim}", fontsize=9)
    legend_below(figure, grid[0, 0])
    return figure


def _layer_rows(benchmark: pd.DataFrame, mode: str) -> pd.DataFrame:
    require_columns(benchmark, [*NEEDED, "p20", "p80"], "benchmark.csv")
    frame = best_launch(benchmark[(benchmark["workload"] == "layer") & (benchmark["mode"] == mode)])
    if frame.empty:
        raise ValueError(f"benchmark.csv has no rows of workload layer and mode {mode!r}; run notebook 05 again.")
    return frame


def _one_setting(frame: pd.DataFrame, variable: str, other: list[str]) -> pd.DataFrame:
    """The rows of the one setting with the most values of ``variable``: curves must differ in one thing only.

    Of several: uniform routing rather than runs, the lowest rank, the highest k, the most adapters.
    """
    key = [*_SETTING, *other]
    counts = frame.groupby(key)[variable].nunique()
    best = min(
        counts[counts == counts.max()].index,
        key=lambda s: (s[0] != "uniform", s[1], -s[2], s[3], [-n for n in s[4:]]),
    )
    return _rows_with(frame, key, best)


def _rows_with(frame: pd.DataFrame, columns: list[str], values: tuple) -> pd.DataFrame:
    return frame[(frame[columns] == pd.Series(values, index=columns)).all(axis=1)]


def _in_words(frame: pd.DataFrame, *, rank: bool = True) -> str:
    first = frame.iloc[0]
    timed = frame[frame["metric"] == "time_us"]
    eager = [b for b in BACKEND_STYLES if b in set(timed[timed["launch"] == "eager"]["backend"])]
    launch = "eager"
    if (timed["launch"] == "graph").any():
        launch = "CUDA graph" + (f" ({', '.join(eager)}: eager)" if eager else "")
    ranked = f"rank {first['rank']}, " if rank else ""
    return f"{ranked}top-{first['top_k']}, {first['dtype']}, {launch}, {first['routing']} routing, {first['device']}"


def draw_lines(
    axes: Axes, part: pd.DataFrame, variable: str, scale: float, *, labels: dict[str, str] = BACKEND_LABELS
) -> None:
    """A line for each backend of ``part``, its band from p20 to p80."""
    for backend in [b for b in BACKEND_STYLES if b in set(part["backend"])]:
        rows = part[part["backend"] == backend].set_index(variable)[["value", "p20", "p80"]].sort_index() * scale
        color, marker, line = style_of(BACKEND_STYLES, backend)
        text = labels.get(backend, backend)
        axes.plot(rows.index, rows["value"], color=color, marker=marker, linestyle=line, markersize=4.5, label=text)
        axes.fill_between(rows.index, rows["p20"], rows["p80"], color=color, alpha=0.15, linewidth=0)


def variable_axis(axes: Axes, text: str, values: pd.Series) -> None:
    """A logarithmic axis with a tick at each of ``values``, labelled ``text``."""
    axes.set_xlabel(text)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values.unique()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_axis(axes: Axes) -> None:
    """A logarithmic axis with enough labelled ticks, in plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
