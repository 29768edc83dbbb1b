"""The rows of ``benchmark.csv``, and a file of them that grows while they are measured."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from meteora.study.artifacts import ArtifactError, device_name, write_text

COLUMNS = (
    "workload", "backend", "mode", "launch", "routing", "batch", "tokens", "adapters", "rank", "top_k", "in_features",
    "out_features", "dtype", "metric", "value", "p20", "p80", "unit", "device", "torch", "triton",
)  # fmt: skip
WHERE = ("device", "torch", "triton")
OUT_OF_MEMORY, NOT_CAPTURABLE = "out of memory", "not capturable"  # units of rows that have no value
UNITS = {
    "time_us": "us", "peak_bytes": "bytes", "bytes_per_s": "bytes/s", "flop_per_s": "flop/s", "tokens_per_s": "tokens/s",
}  # fmt: skip


def where_measured(device: torch.device) -> dict[str, str]:
    """The values of the columns WHERE."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"device": device_name(device.type), "torch": torch.__version__, "triton": triton}


def make_row(
    setting: Mapping[str, Any],
    metric: str,
    values: Sequence[float] | None,
    *,
    unit: str | None = None,
) -> dict[str, Any]:
    """One row without WHERE. ``values``: the median, the 20% and the 80% quantile; if ``None``, ``unit`` says why."""
    value, p20, p80 = values or (math.nan, math.nan, math.nan)
    return {**setting, "metric": metric, "value": value, "p20": p20, "p80": p80, "unit": unit or UNITS[metric]}


class RowFile:
    """Rows of one machine in a CSV file that is whole after every ``append``, so that an interrupted run can go on.

    Raises:
        ArtifactError: if the file is none of these, or was measured on another device or with other versions.
    """

    def __init__(self, path: str | Path, where: Mapping[str, str]) -> None:
        self.path, self.where = Path(path), dict(where)
        self._text = self.path.read_text(encoding="utf-8") if self.path.exists() else ",".join(COLUMNS) + "\n"
        self.rows = self._read()

    def _read(self) -> list[dict[str, Any]]:
        try:
            frame = read_rows(io.StringIO(self._text))
        except (pd.errors.EmptyDataError, pd.errors.ParserError):
            frame = pd.DataFrame()
        if tuple(frame.columns) != COLUMNS:
            raise ArtifactError(f"{self.path} is not a benchmark.csv; name another file, or delete it.")
        for column, value in self.where.items():
            for found in set(frame[column]) - {value}:
                raise ArtifactError(
                    f"{self.path} was measured with {column} {found}, and here it is {value}: name another file, or "
                    "delete it."
                )
        return frame.to_dict("records")

    def keys(self, *columns: str) -> set[tuple]:
        """The values that these columns have together in some row."""
        return {tuple(row[column] for column in columns) for row in self.rows}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows (without WHERE), all of them or none."""
        rows = [{**row, **self.where} for row in rows]
        lines = io.StringIO()
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writerows({column: _text(row[column]) for column in COLUMNS} for row in rows)
        self._text += lines.getvalue()
        write_text(self.path, self._text)
        self.rows += rows


def read_rows(file: str | Path | io.StringIO) -> pd.DataFrame:
    """A ``benchmark.csv``; what could not be measured has a value of NaN."""
    empty = {column: [""] for column in ("value", "p20", "p80")}
    return pd.read_csv(file, keep_default_na=False, na_values=empty, dtype=dict.fromkeys(WHERE, str))


def _text(value: Any) -> Any:
    """Six digits of a number that was measured; nothing if it could not be."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
