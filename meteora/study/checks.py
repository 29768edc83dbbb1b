"""What the settings of a profile are checked with; every message names the key and what it may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


def at_least(minimum: float, **values: float | None) -> None:
    """Raise ``ValueError`` naming the first of ``values`` that is less; ``None`` passes."""
    for name, value in values.items():
        if value is not None and not value >= minimum:  # as is NaN
            raise ValueError(f"{name} must be at least {minimum}, not {value!r}")


def named(**values: str) -> None:
    """Raise ``ValueError`` for the first of ``values`` that is blank."""
    for name, value in values.items():
        if not value.strip():
            raise ValueError(f"{name} must not be empty")


def one_of(known: Iterable, **values: Any) -> None:
    """Raise ``ValueError`` naming the first of ``values``, or an entry of a tuple among them, that is not known."""
    known = tuple(known)
    for name, value in values.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item not in known:
                raise ValueError(f"{name} has no choice {item!r}; known are {', '.join(map(str, known))}")


def distinct(**values: tuple) -> None:
    """Raise ``ValueError`` naming the first of ``values`` that is empty or holds an entry twice."""
    for name, value in values.items():
        if not value:
            raise ValueError(f"{name} must name at least one")
        if len(set(value)) < len(value):
            raise ValueError(f"{name} names one twice: {', '.join(map(str, value))}")


def training_config(cls: type, key: str, options: dict[str, Any], **common: Any) -> Any:
    """``cls(**common, **options)``, with an unknown option named instead of a TypeError."""
    known = [f.name for f in dataclasses.fields(cls) if f.name not in common or f.name == "seed"]
    for option in options:
        if option not in known:
            raise ValueError(f"{key} has no option {option!r}; known are {', '.join(known)}")
    return cls(**{**common, **options})
