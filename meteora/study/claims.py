"""The paper's claims beside what a run measured: one row a claim, "not measured" where the run has no data for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pandas as pd

from meteora.study.benchmark_results import aims_table
from meteora.study.tables import interval_text, label, method_means, require_columns, run_label

COLUMNS = ["claim", "paper", "measured here", "n", "command"]
_CELL = [
    "workload", "mode", "launch", "routing", "batch", "tokens", "adapters", "rank", "top_k", "in_features",
    "out_features", "dtype",
]  # fmt: skip
_SETTING = ["composite", "protocol", "shots", "temperature"]


class Finding(NamedTuple):
    """What a run says to a claim: a sentence, and the number of measurements behind it, in words where it varies."""

    text: str
    n: int | str


def claims_table(metrics: Mapping[str, pd.DataFrame], profile: str) -> pd.DataFrame:
    """The paper's claims (arXiv 2405.13053), each with what ``metrics`` say to it; then this project's own aims.

    Args:
        metrics: file name without ``.csv`` -> its rows; of ``independent``, ``independent_paired``, ``composite``,
            ``composite_paired``, ``switching_totals``, ``routing`` and ``benchmark``. Missing ones leave their claims
            "not measured".
        profile: for the command that measures them.

    Returns:
        ``claim, paper, measured here, n, command``.
    """
    found: list[tuple[str, str, str, Finding | None]] = []
    for claim, paper, notebook, measure in (
        ("Per-token loop against the other strategies", "up to 10x the time", "05", _loop_against_rest),
        ("bmm-torch against the loop", "about 4x faster on average", "05", _bmm_against_loop),
        ("bmm-torch against its bound, a single LoRA", "only 2.5x slower", "05", _bmm_against_bound),
        ("Triton operator against bmm-torch", "about 80% of its speed, at the loop's memory", "05", _triton),
        ("MeteoRA against PEFT with the adapter chosen by hand", "comparable on 28 tasks", "03", _against_peft),
        ("The gates choose the adapter of the task at hand", "they do", "03", _routing),
        ("The gates switch adapters where two tasks meet", "they do (Figure 4)", "04", _switching),
    ):
        found.append((claim, paper, notebook, measure(metrics)))
    ours = _ours(metrics)
    against = f"{'MeteoRA' if ours is None else label(ours)} against LoRA-B"
    composites = [
        (claim, paper, measure(metrics))
        for claim, paper, measure in (
            ("answers attempted", "+35% on composite-10", _attempted),
            ("correct answers", "+27% on composite-10", _correct),
            ("sub-tasks won", "almost every one", _subtasks_won),
        )
    ]
    # The largest first, as it is what the paper's figures are of.
    for size in sorted({size for _, _, by_size in composites for size in by_size}, reverse=True) or ["n"]:
        found += [
            (f"Composite-{size}, {claim}: {against}", paper, "04", by_size.get(size))
            for claim, paper, by_size in composites
        ]
    found += _aims(metrics)
    rows = []
    for claim, paper, notebook, finding in found:
        text, n = finding or (f"not measured: notebook {notebook} has left nothing on it", "")
        rows.append((claim, paper, text, n, f"./run_all.sh --profile {profile} --only {notebook}"))
    return pd.DataFrame(rows, columns=COLUMNS)


def backend_ratios(
    benchmark: pd.DataFrame, slower: str, faster: str, metric: str = "time_us", *, workload: str = "layer"
) -> pd.Series:
    """``metric`` of one backend over another's in a forward pass, one value for each cell that has both.

    ``workload``: of one ``layer``, launched alike; or ``tasks``: each task's prompts, through each size of a layer.
    """
    require_columns(benchmark, [*_CELL, "backend", "metric", "value"], "benchmark.csv")
    frame = benchmark[
        (benchmark["metric"] == metric) & (benchmark["workload"] == workload) & (benchmark["mode"] == "forward")
    ].dropna(subset="value")
    # Two tasks may have prompts of as many tokens; they are told apart by their order.
    frame = frame.assign(nth=frame.groupby([*_CELL, "backend"]).cumcount())
    wide = frame.pivot(index=[*_CELL, "nth"], columns="backend", values="value")
    if not {slower, faster} <= set(wide.columns):
        return pd.Series(dtype=float)
    wide = wide[wide[faster] > 0]
    return (wide[slower] / wide[faster]).dropna()


def _time_ratios(metrics: Mapping[str, pd.DataFrame], slower: str, faster: str) -> pd.Series:
    """As the paper's Figure 5 does it, over the tasks' prompts, if they were measured."""
    if "benchmark" not in metrics:
        return pd.Series(dtype=float)
    return backend_ratios(metrics["benchmark"], slower, faster, workload=_workload(metrics["benchmark"]))


def _workload(benchmark: pd.DataFrame) -> str:
    return "tasks" if (benchmark["workload"] == "tasks").any() else "layer"


def _where(metrics: Mapping[str, pd.DataFrame]) -> str:
    return {"tasks": "the tasks' prompts, without CUDA graphs", "layer": "one layer"}[_workload(metrics["benchmark"])]


def _loop_against_rest(metrics: Mapping[str, pd.DataFrame]) -> Finding | None:
    parts = {name: _time_ratios(metrics, "loop", name) for name in ("bmm", "dense", "triton")}
    parts = {name: ratios for name, ratios in parts.items() if len(ratios)}
    if not parts:
        return None
    name = max(parts, key=lambda name: parts[name].max())
    return Finding(f"up to {parts[name].max():.1f}x ({name}), {_where(metrics)}", sum(map(len, parts.values())))


def _bmm_against_loop(metrics: Mapping[str, pd.DataFrame]) -> Finding | None:
    return _mean_ratio(metrics, "loop", "bmm", ("faster", "slower"))


def _bmm_against_bound(metrics: Mapping[str, pd.DataFrame]) -> Finding | None:
    return _mean_ratio(metrics, "bmm", "single_lora", ("slower", "faster"))


def _mean_ratio(
    metrics: Mapping[str, pd.DataFrame], slower: str, faster: str, words: tuple[str, str]
) -> Finding | None:
    """The mean ratio in words: the first if ``slower`` is what it is called, else the second."""
    ratios = _time_ratios(metrics, slower, faster)
    if ratios.empty:
        return None
    word = words[0]
    if ratios.mean() < 1:
        ratios, word = 1 / ratios, words[1]
    text = f"{ratios.mean():.1f}x {word} on average ({ratios.min():.1f}x to {ratios.max():.1f}x)"
    return Finding(f"{text}, {_where(metrics)}", len(ratios))


def _triton(metrics: Mapping[str, pd.DataFrame]) -> Finding | None:
    speed = _time_ratios(metrics, "bmm", "triton")
    if speed.empty:
        return None
    low, mean, high = (f"{100 * value:.0f}%" for value in (speed.min(), speed.mean(), speed.max()))
    text = f"{mean} of bmm's speed on average ({low} to {high}), {_where(metrics)}"
    memory = backend_ratios(metrics["benchmark"], "triton", "loop", "peak_bytes")
    if len(memory):
        text += (
            f"; {memory.median():.2f}x the loop's memory in the median of {len(memory)} settings of a layer, at worst "
            f"{memory.max():.1f}x"
        )
    return Finding(text, len(speed))


def _aims(metrics: Mapping[str, pd.DataFrame]) -> list[tuple[str, str, str, Finding]]:
    """What this project aims at beyond the paper, where its own backends were measured at a layer."""
    if "benchmark" not in metrics:
        return []
    found = []
    for row in aims_table(metrics["benchmark"]).itertuples():
        reached = "reached" if row.reached == "yes" else f"not reached in {row.settings - row.within} of {row.settings}"
        text = f"{reached}: median {row.median:.2f}x, at worst {row.worst:.2f}x ({row.worst_at})"
        found.append((f"Backend {row.backend}, {row.case}", f"our aim: {row.aim}", "05", Finding(text, row.settings)))
    return found


def _against_peft(metrics: Mapping[str, pd.DataFrame]) -> Finding | None:
    if "independent" not in metrics:
        return None
    means = method_means(metrics["independent"])
    means = means[means["metric"] == "accuracy"].set_index("method")
    ours = [method for method in ("meteora_top1", "meteora_top2") if method in means.index]
    if not ours or "peft" not in means.index:
        return None
    paired = metrics.get("independent_paired")
    parts = []
    for method in ours:
        text = f"{label(method)} {means.loc[method, 'value']:.3f}"
        if paired is not None:
            found = paired[(paired["method"] == method) & (paired["other"] == "peft")]
            if len(found):
                difference = found.iloc[0]
                text += f" (difference {interval_text(difference['value'], difference['low'], difference['high'])})"
        parts.append(text)
    text = f"PEFT {means.loc['peft', 'value']:.3f}; {'; '.join(parts)}; {means.loc['peft', 'tasks']} tasks"
    return Finding(text, int(means.loc["peft", "n"]))


def _attempted(metrics: Mapping[str, pd.DataFrame]) -> dict[int, Finding]:
    return _against_lora_b(metrics, "attempted")


def _correct(metrics: Mapping[str, pd.DataFrame]) -> dict[int, Finding]:
    return _against_lora_b(metrics, "correct")


def _against_lora_b(metrics: Mapping[str, pd.DataFrame], metric: str) -> dict[int, Finding]:
    """Means side by side, the ratio, and the difference item by item where ``composite_paired`` has its interval."""
    wide = _ours_and_lora_b(metrics, metric, lambda subtask: subtask == "ALL")
    paired = metrics.get("composite_paired", pd.DataFrame(columns=[*_SETTING, "method", "other", "metric"]))
    paired = paired[(paired["other"] == "lora_b") & (paired["metric"] == metric)].set_index([*_SETTING, "method"])

    def in_words(part: pd.DataFrame) -> str:
        ours, other = part["meteora"].iloc[0], part["lora_b"].iloc[0]
        more = [f"{100 * (ours / other - 1):+.0f}%"] if other > 0 else []
        difference = paired.reindex([(*part.index[0], part["method"].iloc[0])])
        if len(paired) and difference["value"].notna().all():
            more.append("difference " + interval_text(*difference[["value", "low", "high"]].iloc[0], "correct"))
        return f"{ours:.2f} against {other:.2f}" + (f" ({', '.join(more)})" if more else "")

    return _by_size(wide, in_words)


def _subtasks_won(metrics: Mapping[str, pd.DataFrame]) -> dict[int, Finding]:
    def in_words(part: pd.DataFrame) -> str:
        won, lost = int((part["meteora"] > part["lora_b"]).sum()), int((part["meteora"] < part["lora_b"]).sum())
        return f"{won} won, {len(part) - won - lost} equal, {lost} lost"

    return _by_size(_ours_and_lora_b(metrics, "accuracy", lambda subtask: subtask != "ALL"), in_words)


def _by_size(wide: pd.DataFrame | None, in_words: Callable[[pd.DataFrame], str]) -> dict[int, Finding]:
    """Size of the composites -> what their protocols and temperatures say, one after another."""
    if wide is None:
        return {}
    findings = {}
    for size, of_size in wide.groupby(level="composite", sort=False):
        parts = [
            f"{run_label(protocol, shots)}, T={temperature:g}: {in_words(part)}"
            for (_, protocol, shots, temperature), part in of_size.groupby(level=_SETTING, sort=False)
        ]
        low, high = int(of_size["n"].min()), int(of_size["n"].max())
        findings[size] = Finding("; ".join(parts), low if low == high else f"{low} to {high}")
    return findings


def _ours(metrics: Mapping[str, pd.DataFrame]) -> str | None:
    """The method that is held against LoRA-B in composites."""
    methods = set(metrics["composite"]["method"]) if "composite" in metrics else set()
    return next((method for method in ("meteora_top2", "meteora_top1") if method in methods), None)


def _ours_and_lora_b(
    metrics: Mapping[str, pd.DataFrame], metric: str, wanted: Callable[[str], bool]
) -> pd.DataFrame | None:
    """MeteoRA's and LoRA-B's values side by side, by composite, protocol, shots and temperature (and sub-task)."""
    ours = _ours(metrics)
    if ours is None:
        return None
    frame = metrics["composite"]
    frame = frame[(frame["metric"] == metric) & frame["subtask"].map(wanted)]
    if not {ours, "lora_b"} <= set(frame["method"]):
        return None
    wide = frame.pivot_table(index=[*_SETTING, "subtask"], columns="method", values="value", sort=False)
    wide = wide[[ours, "lora_b"]].dropna().set_axis(["meteora", "lora_b"], axis=1).assign(method=ours)
    wide["n"] = frame.groupby([*_SETTING, "subtask"], sort=False)["n"].max()
    return wide.droplevel("subtask") if len(wide) else None


def _routing(metrics: Mapping[str, pd.DataFrame]) -> Finding | None:
    """The routing weight that a task's own adapter gets, averaged over layers, modules and tasks."""
    if "routing" not in metrics:
        return None
    frame = metrics["routing"]
    own = frame[frame["task"] == frame["adapter"]]
    if own.empty:
        return None
    by_task = own.groupby("task")["share"].mean()
    adapters = frame["adapter"].nunique()
    spread = f"by task {by_task.min():.2f} to {by_task.max():.2f}"
    text = f"own adapter's share {by_task.mean():.2f} ({spread}), {1 / adapters:.2f} by chance"
    return Finding(text, f"{len(by_task)} tasks")


def _switching(metrics: Mapping[str, pd.DataFrame]) -> Finding | None:
    """The share of tokens after a junction whose dominant adapter is the new task's, in sequential composites."""
    if "switching_totals" not in metrics:
        return None
    frame = metrics["switching_totals"]
    parts = [
        f"composite-{size}: "
        + ", ".join(f"{interval_text(r.value, r.low, r.high)} of the {r.part}'s tokens" for r in rows.itertuples())
        for size, rows in frame.groupby("composite", sort=False)
    ]
    return Finding("own adapter dominant after a junction; " + "; ".join(parts), int(frame["n"].max()))


def published_composite10() -> pd.DataFrame:
    """The authors' own figures for composite-10 (README of github.com/NJUDeepEngine/meteora): accuracies and sums.

    The base model and k are not stated there. Every accuracy is a multiple of 1/128. The accuracies are by the authors'
    metrics. Tables 1 and 2 of the paper are not repeated here, as only this one was at hand.
    """
    rows = [
        ("logical_deduction", 0.500, 0.453),
        ("question_selection", 0.703, 0.688),
        ("abstract_narrative_understanding", 0.625, 0.672),
        ("goal_step_wikihow", 0.773, 0.727),
        ("winowhy", 0.422, 0.078),
        ("strategyqa", 0.461, 0.211),
        ("disfl_qa", 0.266, 0.117),
        ("correct of 10, on average", 3.75, 2.95),
    ]
    return pd.DataFrame(rows, columns=["sub-task", "MeteoRA", "LoRA-B"])
