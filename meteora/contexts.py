"""Contexts that say so when somebody takes them for calls."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class _Entered(AbstractContextManager):
    """A context of one use, which warns if it is thrown away without any."""

    def __init__(self, context: AbstractContextManager, name: str) -> None:
        self._context, self._name, self._entered = context, name, False

    def __enter__(self):
        self._entered = True
        return self._context.__enter__()

    def __exit__(self, *error):
        return self._context.__exit__(*error)

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(f"{self._name}() alone changes nothing; write `with model.{self._name}(...):`.", stacklevel=2)


def to_be_entered(function: Callable[..., Iterator]) -> Callable[..., AbstractContextManager]:
    """`contextlib.contextmanager`, for methods whose names read as if a call of them had an effect.

    transformers' own ``disable_adapters`` is such a call.
    """
    made = contextmanager(function)

    @functools.wraps(function)
    def make(*args, **kwargs) -> _Entered:
        return _Entered(made(*args, **kwargs), function.__name__)

    return make
