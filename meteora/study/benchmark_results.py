"""What the rows of ``benchmark.csv`` say: ratios between strategies, and whether the aims of this project are reached.

A strategy's time is that of its CUDA graph; of what no graph can hold, and on a CPU, the eager time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from meteora.study.tables import require_columns

SETTING = ["mode", "routing", "rank", "top_k", "dtype", "tokens", "adapters", "in_features", "out_features"]
MODEL_SETTING = ["launch", "batch", *SETTING]
NEEDED = ["workload", "launch", "batch", *SETTING, "backend", "metric", "value"]
BOUNDS = ("base", "single_lora")
OURS = ("triton", "auto")
PLAIN = ("loop", "bmm", "dense", "triton")  # what ``auto`` can choose from


def best_launch(benchmark: pd.DataFrame) -> pd.DataFrame:
    """The measured rows without those of an eager call that was measured in a CUDA graph as well."""
    rows = benchmark.dropna(subset="value").sort_values("launch", ascending=False, kind="stable")  # graph, eager
    return rows.drop_duplicates(["workload", "batch", *SETTING, "backend", "metric"])


def side_by_side(benchmark: pd.DataFrame, metric: str = "time_us", launch: str | None = None) -> pd.DataFrame:
    """One row a setting of a layer (SETTING), one column a strategy; missing where it was not measured.

    Args:
        launch: the one whose rows are taken; default: in a graph where that was measured.
    """
    require_columns(benchmark, NEEDED, "benchmark.csv")
    rows = benchmark[(benchmark["workload"] == "layer") & (benchmark["metric"] == metric)]
    rows = best_launch(rows) if launch is None else rows[rows["launch"] == launch]
    return rows.pivot(index=SETTING, columns="backend", values="value")


def models_side_by_side(benchmark: pd.DataFrame, metric: str = "time_us") -> pd.DataFrame:
    """One row a setting of a whole model (MODEL_SETTING), one column a strategy; missing where it was not measured."""
    require_columns(benchmark, NEEDED, "benchmark.csv")
    rows = benchmark[(benchmark["workload"] == "model") & (benchmark["metric"] == metric)]
    return rows.dropna(subset="value").pivot(index=MODEL_SETTING, columns="backend", values="value")


@dataclass(frozen=True)
class Aim:
    """``metric`` of ours over that of ``against`` is to be at most ``limit`` in all settings that ``where`` selects.

    The settings are those of ``workload``: SETTING of a ``layer``, or MODEL_SETTING of a whole ``model``.
    """

    case: str
    against: str | tuple[str, ...]  # of several, the best
    limit: float
    where: Callable[[pd.DataFrame], pd.Series]
    metric: str = "time_us"
    of: tuple[str, ...] = OURS
    workload: str = "layer"

    @property
    def text(self) -> str:
        other = self.against if isinstance(self.against, str) else "the best single backend"
        if self.limit < 1:
            return f"at least {1 / self.limit:g}x as fast as {other}"
        return f"at most {self.limit:g}x {other}"


def _forward(rows: pd.DataFrame) -> pd.Series:
    return rows["mode"] == "forward"


def _many(rows: pd.DataFrame, rank: int) -> pd.Series:
    """The settings with the paper's 28 adapters, of that rank."""
    return (rows["adapters"] == 28) & (rows["rank"] == rank)


def _whole(case: str, against: str, limit: float, mode: str | None, launch: str) -> Aim:
    def where(rows: pd.DataFrame) -> pd.Series:
        return (rows["launch"] == launch) & ((rows["mode"] == mode) | (mode is None))

    return Aim(f"whole model, {case}", against, limit, where, workload="model")


AIMS = (
    Aim("forward, rank 8, 512 tokens and more", "single_lora", 1.15,
        lambda t: _forward(t) & _many(t, 8) & (t["tokens"] >= 512)),
    Aim("forward, rank 8, 17 to 511 tokens", "single_lora", 1.15,
        lambda t: _forward(t) & _many(t, 8) & t["tokens"].between(17, 511)),
    Aim("forward, rank 8, 16 tokens and fewer", "single_lora", 1.2,
        lambda t: _forward(t) & _many(t, 8) & (t["tokens"] <= 16)),
    Aim("forward, rank 64, 16 tokens and fewer", "single_lora", 1.2,
        lambda t: _forward(t) & _many(t, 64) & (t["tokens"] <= 16)),
    Aim("forward, rank 64, 4096 tokens, uniform routing", "single_lora", 3.0,
        lambda t: _forward(t) & _many(t, 64) & (t["tokens"] == 4096) & (t["routing"] == "uniform")),
    Aim("forward, rank 64, 4096 tokens, routing in runs", "single_lora", 1.5,
        lambda t: _forward(t) & _many(t, 64) & (t["tokens"] == 4096) & (t["routing"] == "runs")),
    Aim("backward, rank 8", "single_lora", 1.3, lambda t: ~_forward(t) & _many(t, 8)),
    Aim("backward, rank 64", "single_lora", 1.3, lambda t: ~_forward(t) & _many(t, 64)),
    Aim("forward, top-2, 4096 tokens and more", "bmm", 1 / 50,
        lambda t: _forward(t) & (t["top_k"] == 2) & (t["tokens"] >= 4096)),
    Aim("forward, everywhere", "dense", 1.0, _forward),
    Aim("backward, everywhere", "dense", 1.0, lambda t: ~_forward(t)),
    Aim("peak memory, forward, everywhere", "loop", 1.0, _forward, metric="peak_bytes"),
    Aim("peak memory, backward, everywhere", "loop", 1.0, lambda t: ~_forward(t), metric="peak_bytes"),
    Aim("forward and backward, everywhere", PLAIN, 1.03, lambda t: t["mode"].notna(), of=("auto",)),
    _whole("prefill in a CUDA graph", "base", 1.15, "prefill", "graph"),
    _whole("prefill", "base", 1.15, "prefill", "eager"),
    _whole("decoding in a CUDA graph", "base", 1.15, "decode", "graph"),
    _whole("prefill in a CUDA graph, beside PEFT", "single_lora", 1.0, "prefill", "graph"),
    _whole("prefill, beside PEFT", "single_lora", 1.0, "prefill", "eager"),
    _whole("decoding in a CUDA graph, beside PEFT", "single_lora", 1.0, "decode", "graph"),
    _whole("beside the loop", "loop", 1 / 10, None, "eager"),
)  # fmt: skip


def aims_table(benchmark: pd.DataFrame) -> pd.DataFrame:
    """The aims that the rows have something to say to, one row for each and each of our backends.

    Returns:
        ``case, aim, backend, median, worst, worst_at, within, settings, reached``: the ratio's median and largest
        value, the setting that has it, and in how many settings it is within the aim. For an aim at a speed-up,
        ``median`` and ``worst`` are speed-ups, the worst being the smallest.
    """
    tables = {("layer", metric): side_by_side(benchmark, metric) for metric in ("time_us", "peak_bytes")}
    tables["model", "time_us"] = models_side_by_side(benchmark)
    rows = []
    for aim in AIMS:
        table = tables[aim.workload, aim.metric]
        others = [aim.against] if isinstance(aim.against, str) else [n for n in aim.against if n in table]
        if not set(others) <= set(table):
            continue
        table = table[aim.where(table.index.to_frame())]
        for name in aim.of:
            if name not in table:
                continue
            ratio = (table[name] / table[others].min(axis=1)).dropna()
            if ratio.empty:
                continue
            speed = aim.limit < 1
            shown = (1 / ratio) if speed else ratio
            within = int((ratio <= aim.limit).sum())
            rows.append(
                {
                    "case": aim.case,
                    "aim": aim.text,
                    "backend": name,
                    "median": shown.median(),
                    "worst": shown.min() if speed else shown.max(),
                    "worst_at": _in_words(dict(zip(table.index.names, ratio.idxmax()))),
                    "within": within,
                    "settings": len(ratio),
                    "reached": "yes" if within == len(ratio) else "no",
                }
            )
    columns = ["case", "aim", "backend", "median", "worst", "worst_at", "within", "settings", "reached"]
    return pd.DataFrame(rows, columns=columns)


def _in_words(s: dict[str, object]) -> str:
    adapters = f"{s['adapters']} adapters, rank {s['rank']}, top-{s['top_k']}, {s['routing']}"
    if "batch" in s:
        return f"{s['mode']}, {s['launch']}, {s['batch']} x {s['tokens']} tokens, {adapters}"
    return f"{s['mode']}, {s['in_features']} -> {s['out_features']}, {s['tokens']} tokens, {adapters}"
