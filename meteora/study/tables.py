"""Tables 1 and 2 from the tidy files of ``results/<profile>/metrics``, as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from data_prep.tasks import TASKS
from meteora.study.artifacts import write_text
from meteora.study.statistics import mean_over_tasks

METHOD_LABELS = {
    "base": "Base model",
    "peft": "PEFT (told the task)",
    "meteora_top1": "MeteoRA top-1",
    "meteora_top2": "MeteoRA top-2",
    "lora_f": "LoRA-F",
    "lora_b": "LoRA-B",
    "linear": "Linear merge",
    "ties": "TIES merge",
    "dare": "DARE merge",
    "arrow": "Arrow",
    "xlora": "X-LoRA",
    "lorahub": "LoRAHub (told the task)",
    "chance": "A choice at random",
    "majority": "Always the most frequent answer",
}
METRIC_LABELS = {
    "accuracy": "accuracy", "bleu": "BLEU", "bleu_published": "BLEU as published", "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "attempted": "attempted", "correct": "correct",
}  # fmt: skip
INDEPENDENT_COLUMNS = ("task", "method", "metric", "value", "low", "high", "n")
COMPOSITE_COLUMNS = (
    "composite", "protocol", "shots", "temperature", "subtask", "method", "metric", "value", "low", "high", "n",
)  # fmt: skip
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
})  # fmt: skip


def coverage(tasks: Iterable[str]) -> str:
    """How much of the paper's benchmark the results cover, for captions: "22 of the paper's 28 tasks"."""
    tasks = set(tasks)
    known = len(tasks & set(TASKS))
    if known == len(tasks):
        return f"{known} of the paper's {len(TASKS)} tasks"
    return f"{known} of the paper's {len(TASKS)} tasks and {len(tasks) - known} others"


def method_means(independent: pd.DataFrame) -> pd.DataFrame:
    """Mean of every metric over the tasks that have it, each task counting the same.

    An accuracy's interval is the bootstrap within tasks: k right of n samples are known from a task's row, so nothing
    beyond the table is needed. The other metrics have no interval here (``low`` and ``high`` are missing), nor has what
    has none on single tasks, such as the expectation of a guess.

    Returns:
        ``method, metric, value, low, high, tasks, n``; ``n`` samples in all; methods in the order of METHOD_LABELS.

    Raises:
        ValueError: if two methods were not measured on the same tasks, or a column is missing.
    """
    require_columns(independent, INDEPENDENT_COLUMNS, "independent.csv")
    rows = []
    for metric, frame in independent.groupby("metric", sort=False):
        by_method = {method: part.set_index("task") for method, part in frame.groupby("method", sort=False)}
        _check_same_tasks(metric, by_method)
        for method in in_order(by_method):
            part = by_method[method]
            value, low, high = part["value"].mean(), None, None
            if metric == "accuracy" and part["low"].notna().all():
                _, low, high = mean_over_tasks({task: _outcomes(row) for task, row in part.iterrows()})
            rows.append((method, metric, value, low, high, len(part), int(part["n"].sum())))
    return pd.DataFrame(rows, columns=["method", "metric", "value", "low", "high", "tasks", "n"])


def table1(independent: pd.DataFrame) -> pd.DataFrame:
    """Table 1: averages of every method over the tasks, one row a method, intervals in brackets."""
    means = method_means(independent)
    table = pd.DataFrame({"method": [label(m) for m in in_order(means["method"])]})
    for metric in _metrics(means["metric"]):
        part = means[means["metric"] == metric]
        cells = {label(row.method): interval_text(row.value, row.low, row.high, metric) for row in part.itertuples()}
        count = part["tasks"].iloc[0]
        heading = f"{METRIC_LABELS.get(metric, metric)} ({count} task{'' if count == 1 else 's'})"
        table[heading] = table["method"].map(cells)
    return table.fillna("")


def table1_tasks(independent: pd.DataFrame, metric: str = "accuracy", *, intervals: bool = True) -> pd.DataFrame:
    """The table behind Table 1: one row a task, one column a method, and n; intervals, if wanted, in brackets."""
    require_columns(independent, INDEPENDENT_COLUMNS, "independent.csv")
    frame = independent[independent["metric"] == metric]
    if frame.empty:
        known = ", ".join(independent["metric"].unique())
        raise ValueError(f"independent.csv has no metric {metric!r}; it has {known}.")
    if not intervals:
        frame = frame.assign(low=None, high=None)
    rows = []
    for task, part in frame.groupby("task"):
        cells = {row.method: interval_text(row.value, row.low, row.high, metric) for row in part.itertuples()}
        rows.append({"task": task, "n": int(part["n"].max())} | cells)
    table = pd.DataFrame(rows)[["task", "n", *in_order(frame["method"])]]
    return table.rename(columns=label).fillna("")


def table2(composite: pd.DataFrame, *, first: Sequence[str] = ("meteora_top2", "lora_b")) -> pd.DataFrame:
    """Table 2: composites per sub-task, MeteoRA beside LoRA-B, then the other methods.

    One row for each composite, protocol, shots, temperature, sub-task and metric. Sub-task ALL holds the attempted and
    the correct answers per item; a sub-task without an accuracy has no correct ones. ``n`` is the number of items.
    """
    require_columns(composite, COMPOSITE_COLUMNS, "composite.csv")
    methods = [m for m in first if m in set(composite["method"])]
    methods += [m for m in in_order(composite["method"]) if m not in methods]
    keys = ["composite", "protocol", "shots", "temperature", "subtask", "metric"]
    scored = scored_tasks(composite)
    rows = []
    for key, part in composite.groupby(keys, sort=False):
        setting = dict(zip(keys, key))
        cells = {
            row.method: interval_text(row.value, row.low, row.high, setting["metric"]) for row in part.itertuples()
        }
        size = setting["composite"]
        total = len(scored.get(size, range(size))) if setting["metric"] == "correct" else size
        metric = METRIC_LABELS.get(setting["metric"], setting["metric"])
        rows.append(
            {
                "composite": f"composite-{size}",
                "protocol": setting["protocol"],
                "shots": setting["shots"],
                "T": f"{setting['temperature']:g}",
                "sub-task": setting["subtask"],
                "metric": f"{metric} (of {total})" if setting["subtask"] == "ALL" else metric,
                **cells,
                "n": int(part["n"].max()),
            }
        )
    table = pd.DataFrame(rows)[["composite", "protocol", "shots", "T", "sub-task", "metric", *methods, "n"]]
    return table.rename(columns=label).fillna("")


def scored_tasks(composite: pd.DataFrame) -> dict[int, list[str]]:
    """Size of a composite -> those of its sub-tasks that have an accuracy, so that their answers can be correct."""
    rows = composite[composite["metric"] == "accuracy"]
    return {size: list(dict.fromkeys(tasks)) for size, tasks in rows.groupby("composite")["subtask"]}


def table1_caption(independent: pd.DataFrame) -> str:
    """What Table 1 covers, from its own data."""
    samples = independent[independent["metric"] == "accuracy"].groupby("task")["n"].max()
    others = sorted(set(independent["task"]) - set(samples.index))
    beside = f" (not {' and '.join(others)}, which BLEU or ROUGE measure)" if others else ""
    return (
        f"Table 1. Averages over {coverage(samples.index)}{beside}, each task counting the same, with 95% bootstrap "
        f"intervals over {int(samples.sum())} test samples in all. Accuracy is strict: whole answers or whole words."
    )


def table2_caption(composite: pd.DataFrame) -> str:
    """What Table 2 covers, and how to read it."""
    tasks = set(composite["subtask"]) - {"ALL"}
    sizes = ", ".join(f"composite-{size}" for size in sorted(composite["composite"].unique()))
    of = f" of {coverage(tasks)}, per sub-task" if tasks else ""
    return (
        f"Table 2. {sizes}{of}, with 95% bootstrap intervals. attempted and correct are "
        "answers per item; T is the gates' temperature, which matters to MeteoRA alone. numbered: the paper's prompts; "
        "guided: the same, the numbers being written for the model; sequential: problem, own answer, next problem in "
        "one context, where PEFT is told the task of each problem."
    )


def interval_text(value: float, low: float | None = None, high: float | None = None, metric: str = "accuracy") -> str:
    """``0.360 [0.310, 0.410]``; two digits for BLEU and counts of answers; without an interval the value alone."""
    if pd.isna(value):
        return ""
    digits = 2 if metric in ("bleu", "bleu_published", "attempted", "correct") else 3
    text = f"{value:.{digits}f}"
    return text if pd.isna(low) or pd.isna(high) else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def label(name: str) -> str:
    """A method's name as tables and figures write it; other names unchanged."""
    if name.startswith("meteora_top"):
        return f"MeteoRA top-{name.removeprefix('meteora_top')}"
    return METHOD_LABELS.get(name, name)


def run_label(protocol: str, shots: int) -> str:
    """A protocol's name, and that its prompts hold no examples where they usually do; `sequential` never has any."""
    return f"{protocol}, zero-shot" if shots == 0 and protocol != "sequential" else protocol


def in_order(methods: Iterable[str]) -> list[str]:
    """The distinct methods in the order of METHOD_LABELS, unknown ones behind."""
    found = list(dict.fromkeys(methods))
    known = [method for method in METHOD_LABELS if method in found]
    return known + [method for method in found if method not in known]


def require_columns(frame: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    """Raise ``ValueError`` naming the columns that ``frame`` lacks."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{name} lacks the columns {', '.join(missing)}; run the notebook that writes it again.")


def to_markdown(table: pd.DataFrame, caption: str = "") -> str:
    """A pipe table, the caption in front of it."""
    lines = [[str(column) for column in table.columns], ["---"] * table.shape[1]]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    body = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return (f"{caption}\n\n" if caption else "") + body + "\n"


def to_latex(table: pd.DataFrame, caption: str = "", name: str = "") -> str:
    """A ``table*`` with booktabs rules, every special character escaped; ``name`` becomes its label."""
    lines = [[str(column) for column in table.columns]]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    head, *body = [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in lines]
    begin = [r"\begin{table*}", r"\centering", r"\small"]
    begin += [rf"\caption{{{caption.translate(_LATEX)}}}"] if caption else []
    begin += [rf"\label{{tab:{name}}}"] if name else []
    tabular = [rf"\begin{{tabular}}{{{'l' * table.shape[1]}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*begin, *tabular, r"\end{tabular}", r"\end{table*}"]) + "\n"


def write_table(folder: str | Path, name: str, table: pd.DataFrame, caption: str = "") -> tuple[Path, Path]:
    """Write ``<name>.md`` and ``<name>.tex``, each whole or not at all."""
    folder = Path(folder)
    return (
        write_text(folder / f"{name}.md", to_markdown(table, caption)),
        write_text(folder / f"{name}.tex", to_latex(table, caption, name)),
    )


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).split())


def _metrics(found: Iterable[str]) -> list[str]:
    found = set(found)
    return [metric for metric in METRIC_LABELS if metric in found] + sorted(found - set(METRIC_LABELS))


def _check_same_tasks(metric: str, by_method: dict[str, pd.DataFrame]) -> None:
    """An average over fewer tasks is another quantity, not a worse or better method."""
    every = set().union(*(part.index for part in by_method.values()))
    for method, part in by_method.items():
        if missing := sorted(every - set(part.index)):
            raise ValueError(f"method {method!r} has no {metric} on {', '.join(missing)}; evaluate it there too.")
        if not part.index.is_unique:
            raise ValueError(f"method {method!r} has two rows of {metric} on one task; keep one.")


def _outcomes(row: pd.Series) -> list[float]:
    """The samples behind an accuracy, each right or wrong."""
    right = round(row["value"] * row["n"])
    return [1.0] * right + [0.0] * (int(row["n"]) - right)
