"""A whole model's speed and memory, prefill and decoding, beside the base model and PEFT."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from meteora.study.benchmark_results import NEEDED
from meteora.study.figures_benchmark import draw_lines, log_axis, variable_axis
from meteora.study.figures_style import BACKEND_LABELS, INK, legend_below, styled
from meteora.study.tables import require_columns

_LABELS = BACKEND_LABELS | {"base": "base model alone", "single_lora": "PEFT, one adapter"}
# Mode -> what is on the x axis, its name, and what is one number in a panel.
_COLUMNS = {"prefill": ("tokens", "tokens of the prompt", "batch"), "decode": ("batch", "contexts at once", "tokens")}
_LINES = {
    "tokens_per_s": ("tokens per second", 1.0),
    "ratio": ("time, over the base model's", 1.0),
    "peak_bytes": ("memory above the weights (MiB)", 2.0**-20),
}
_AIM = 1.15


@styled
def model_speed(benchmark: pd.DataFrame, *, launch: str = "graph") -> Figure:
    """Tokens per second, times as multiples of the base model's, and memory above the weights, of workload ``model``.

    Prefill is drawn over the prompt's tokens, for the fewest prompts at once; decoding over the contexts at once, for
    the longest. A strategy that was not measured in ``launch`` is drawn in the other, and the title says so. The dashed
    line is the base model, the dotted one what this project aims at.

    Raises:
        ValueError: if no whole model was measured.
    """
    require_columns(benchmark, [*NEEDED, "p20", "p80"], "benchmark.csv")
    measured = benchmark[benchmark["workload"] == "model"].dropna(subset="value")
    if measured.empty:
        raise ValueError("benchmark.csv has no rows of workload model; give its profile a section benchmark.model.")
    frame = pd.concat([measured, _ratios(measured)])
    frame = frame.sort_values("launch", key=lambda launches: launches != launch, kind="stable")
    frame = frame.drop_duplicates(["mode", "batch", "tokens", "backend", "metric"])
    modes = [mode for mode in _COLUMNS if (frame["mode"] == mode).any()]
    figure = plt.figure(figsize=(1.6 + 3.6 * len(modes), 8.2), layout="constrained")
    grid = figure.subplots(len(_LINES), len(modes), squeeze=False, sharex="col", sharey="row")
    for column, mode in enumerate(modes):
        variable, text, fixed = _COLUMNS[mode]
        rows = frame[frame["mode"] == mode]
        value = int(rows[fixed].min() if mode == "prefill" else rows[fixed].max())
        rows = rows[rows[fixed] == value]
        for line, (metric, (label, scale)) in enumerate(_LINES.items()):
            draw_lines(grid[line, column], rows[rows["metric"] == metric], variable, scale, labels=_LABELS)
            log_axis(grid[line, column])
            grid[line, 0].set_ylabel(label)
        for height, style in ((1, "--"), (_AIM, ":")):
            grid[1, column].axhline(height, color=INK, linestyle=style, linewidth=1)
        what = f"{value} prompt{'s' * (value > 1)} at once" if mode == "prefill" else f"contexts of {value} tokens"
        grid[0, column].set_title(f"{mode}, {what}")
        variable_axis(grid[-1, column], text, rows[variable])
    figure.suptitle(f"{_in_words(frame, launch)}; dotted: {_AIM:g}x, the aim", fontsize=9)
    legend_below(figure, grid[0, 0])
    return figure


def _ratios(measured: pd.DataFrame) -> pd.DataFrame:
    """Rows of metric ``ratio``: every time over that of the base model, launched likewise."""
    times = measured[measured["metric"] == "time_us"]
    key = ["mode", "launch", "batch", "tokens"]
    base = times[times["backend"] == "base"].set_index(key)["value"].rename("one")
    ratios = times[times["backend"] != "base"].join(base, on=key)
    ratios[["value", "p20", "p80"]] = ratios[["value", "p20", "p80"]].div(ratios["one"], axis=0)
    return ratios.drop(columns="one").assign(metric="ratio").dropna(subset="value")


def _in_words(frame: pd.DataFrame, launch: str) -> str:
    names = {"graph": "CUDA graph", "eager": "eager"}
    timed, row = frame[frame["metric"] == "time_us"], frame.iloc[0]
    other = sorted(set(timed[timed["launch"] != launch]["backend"]))
    if len(other) == timed["backend"].nunique():  # nothing was measured in that launch
        launch, other = timed["launch"].iloc[0], []
    rest = f" ({', '.join(other)}: {names['eager' if launch == 'graph' else 'graph']})" if other else ""
    return (
        f"hidden size {row['in_features']}, {row['adapters']} adapters of rank {row['rank']}, top-{row['top_k']}, "
        f"{row['dtype']}, {names[launch]}{rest}"
    )
