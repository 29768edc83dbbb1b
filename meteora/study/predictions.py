"""Predictions on disk: reused as long as everything that decides them is the same, and resumed after an interruption.

A file is JSON lines. The first line names what the predictions belong to and carries their fingerprint; every other
line is `{"id": ..., "prediction": ...}`. It is rewritten as a whole, and atomically, after every batch, so a reader
finds either the state before a batch or the one after it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from meteora import MeteoraLinear
from meteora.study.artifacts import write_text

logger = logging.getLogger(__name__)

PARTS = ("base", "adapters", "gates")
WHOLE = 1 << 22  # elements; a larger tensor is hashed by its shape and an evenly spaced sample of at most this many


def fingerprint(value: Any) -> str:
    """Hex digest of a JSON-serialisable value, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def model_fingerprints(model: torch.nn.Module) -> dict[str, str]:
    """Digests of a model's weights, one each for the base model, the adapters and the gates.

    They are separate so that new gates do not invalidate what does not depend on gates, such as the base model's
    answers. Tensors of more than `WHOLE` elements (4 Mi) count with a sample: a fine-tuned matrix differs everywhere.
    """
    owner: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, MeteoraLinear):
            owner[name] = "adapters"
            owner[f"{name}.base_layer"] = "base"
            owner[f"{name}.gate"] = "gates"
    digests = {part: hashlib.blake2b(digest_size=16) for part in PARTS}
    digests["adapters"].update(json.dumps(getattr(model, "adapter_names", [])).encode())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in sorted(tensors):
        path = name
        while path and path not in owner:
            path = path.rpartition(".")[0]
        digest = digests[owner.get(path, "base")]
        tensor = tensors[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        if flat.numel() > WHOLE:
            flat = flat[:: -(-flat.numel() // WHOLE)]
        digest.update(flat.contiguous().cpu().view(torch.uint8).numpy())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def file_name(*parts: str) -> Path:
    """A relative path with one component per part, whatever characters the names contain."""
    *folders, name = (quote(part, safe="") for part in parts)
    return Path(*folders, f"{name}.jsonl")


class PredictionFile:
    """The predictions for some examples: what `path` holds of them already, and what is added.

    Args:
        path: a `.jsonl` file, absent at first.
        header: everything that decides the predictions, JSON-serialisable; another one discards what `path` holds.
        ids: distinct names of the examples.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], ids: Sequence[str]) -> None:
        self.path, self.ids = Path(path), list(ids)
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"The examples for {self.path.name} do not have distinct ids; prepare the data again.")
        mark = fingerprint(header)
        self._header = {"fingerprint": mark, **header}
        self._known = _read(self.path, mark)
        if not self.missing():
            logger.info("%s: all %d predictions are up to date", self.path, len(self.ids))

    def missing(self) -> list[int]:
        """The positions in `ids` for which there is no prediction yet."""
        return [i for i, name in enumerate(self.ids) if name not in self._known]

    def add(self, batch: Mapping[int, Any]) -> None:
        """Store predictions as position -> JSON-serialisable prediction."""
        self._known |= {self.ids[i]: prediction for i, prediction in batch.items()}
        _write(self.path, self._header, {name: self._known[name] for name in self.ids if name in self._known})

    def all(self) -> list[Any]:
        """One prediction per id."""
        lost = [self.ids[i] for i in self.missing()]
        if lost:
            raise RuntimeError(
                f"No prediction was produced for {lost[0]!r} and {len(lost) - 1} other examples of {self.path}."
            )
        return [self._known[name] for name in self.ids]


def reuse_or_produce(
    path: Path,
    header: Mapping[str, Any],
    ids: Sequence[str],
    produce: Callable[[list[int]], Iterable[Mapping[int, Any]]],
) -> list[Any]:
    """The predictions for `ids`, taken from `path` where it has them and produced and stored where not.

    Args:
        path, header, ids: as of `PredictionFile`.
        produce: given the positions in `ids` that are missing, yields one batch after another as position ->
            prediction.
    """
    file = PredictionFile(path, header, ids)
    missing = file.missing()
    for batch in produce(missing) if missing else ():
        file.add(batch)
    return file.all()


def _read(path: Path, mark: str) -> dict[str, Any]:
    """What `path` holds under this fingerprint; nothing if it is absent, of another fingerprint, or unreadable."""
    if not path.exists():
        return {}
    try:
        header, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if header["fingerprint"] != mark:
            logger.info("%s: made with other weights, examples or settings; predicting again", path)
            return {}
        return {row["id"]: row["prediction"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: not readable (%s); predicting again", path, error)
        return {}


def _write(path: Path, header: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    rows = [header, *({"id": name, "prediction": prediction} for name, prediction in predictions.items())]
    # JSON escapes everything beyond ASCII here: U+2028 and its like would end a line for str.splitlines
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
