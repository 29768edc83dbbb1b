"""The roofline: how fast the strategies compute, beside what the device's memory and arithmetic allow."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from meteora.study.benchmark_results import SETTING, side_by_side
from meteora.study.figures_style import BACKEND_LABELS, BACKEND_STYLES, INK, legend_below, style_of, styled
from meteora.study.tables import require_columns

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def necessary_work(setting: pd.DataFrame, *, single: bool = False) -> pd.DataFrame:
    """What a layer's forward mixture cannot do without, for rows with the columns SETTING: ``flop`` and ``bytes``.

    Arithmetic: the gate, and for each token the k adapters it chose. Bytes: x is read once, y is read and written, the
    weights of the gate (float32) and of every adapter that can be wanted at all (no more than T * k) are read once.
    With ``single``: one adapter for all tokens, and no gate.
    """
    s = setting.assign(top_k=1) if single else setting
    both, item = s["in_features"] + s["out_features"], s["dtype"].map(_BYTES)
    gate = 0 if single else s["adapters"] * s["in_features"]
    flop = 2 * s["tokens"] * (gate + s["top_k"] * s["rank"] * both)
    wanted = 1 if single else np.minimum(s["adapters"], s["tokens"] * s["top_k"])
    numbers = s["tokens"] * (both + s["out_features"]) + wanted * s["rank"] * both
    return pd.DataFrame({"flop": flop, "bytes": item * numbers + 4 * gate})


@styled
def roofline(benchmark: pd.DataFrame, *, routing: str = "uniform", top_k: int = 2) -> Figure:
    """Useful arithmetic per second over useful arithmetic per byte, of every backend's forward pass; one panel a rank.

    All backends are credited with the same `necessary_work`, so that points of one setting lie above each other and the
    distance to the roof is the time that could be saved; one LoRA is credited with its own. The roof is what the same
    run measured of the device: copying a large matrix (the slope) and multiplying two (the top).

    Raises:
        ValueError: if the file holds nothing of workload device, or no forward pass of that routing and ``top_k``.
    """
    require_columns(benchmark, ["workload", *SETTING, "backend", "metric", "value"], "benchmark.csv")
    device = benchmark[benchmark["workload"] == "device"].set_index("metric")["value"]
    if not {"bytes_per_s", "flop_per_s"} <= set(device.index):
        raise ValueError("benchmark.csv has no rows of workload device; run notebook 05 again.")
    bandwidth, arithmetic = device["bytes_per_s"], device["flop_per_s"]
    wide = side_by_side(benchmark).reset_index()
    wide = wide[(wide["mode"] == "forward") & (wide["routing"] == routing) & (wide["top_k"] == top_k)]
    if wide.empty:
        raise ValueError(f"benchmark.csv has no forward pass with routing {routing!r} and top-{top_k}.")
    mixture, one = necessary_work(wide), necessary_work(wide, single=True)
    intensity = mixture["flop"] / mixture["bytes"]
    ranks = sorted(wide["rank"].unique())
    figure = plt.figure(figsize=(1.0 + 4.2 * len(ranks), 4.4), layout="constrained")
    grid = figure.subplots(1, len(ranks), squeeze=False, sharex=True, sharey=True)[0]
    ridge = arithmetic / bandwidth
    span = np.geomspace(min(intensity.min(), ridge) / 2, max(intensity.max(), ridge) * 4, 200)
    backends = [b for b in BACKEND_STYLES if b in wide.columns and b != "base"]
    for axes, rank in zip(grid, ranks):
        axes.plot(span, np.minimum(bandwidth * span, arithmetic), color=INK, linewidth=1.5)
        chosen = wide["rank"] == rank
        for name in backends:
            color, marker, _ = style_of(BACKEND_STYLES, name)
            work = (one if name == "single_lora" else mixture)[chosen]
            achieved = work["flop"] / (1e-6 * wide[name][chosen])
            points = {"color": color, "marker": marker, "linestyle": "none", "markersize": 5, "alpha": 0.75}
            axes.plot(work["flop"] / work["bytes"], achieved, label=BACKEND_LABELS.get(name, name), **points)
        axes.set(xscale="log", yscale="log", xlabel="useful arithmetic per byte (FLOP/B)", title=f"rank {rank}")
        axes.annotate(f"{bandwidth / 1e9:,.0f} GB/s", (span[60], bandwidth * span[60]), (-6, 6), ha="right",
                      textcoords="offset points", fontsize=8)  # fmt: skip
        axes.annotate(f"{arithmetic / 1e12:.3g} TFLOP/s", (span[-1], arithmetic), (0, 4), ha="right",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    grid[0].set_ylabel("useful arithmetic per second (FLOP/s)")
    what = f"forward pass, top-{top_k}, {routing} routing, {wide['dtype'].iloc[0]}: layers and tokens of all sizes"
    figure.suptitle(what, fontsize=9)
    legend_below(figure, grid[0])
    return figure
