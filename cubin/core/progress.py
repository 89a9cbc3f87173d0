"""Progress bars on stderr, for what takes more than 5 seconds at a terminal."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

DELAY = 5
"""Seconds until a bar appears."""


def over(steps: Iterable[Any], name: str, unit: str, total: int | None = None) -> Any:
    """The steps, with a bar while they are gone through."""
    return _bar(steps, name, unit, total)


def counted(task: Callable[..., None], name: str, unit: str, total: int) -> Any:
    """A context in which ``task`` can be called from any thread, with a bar of its calls."""
    return _Counted(task, _bar(None, name, unit, total))


class _Counted:
    def __init__(self, task: Callable[..., None], bar: Any) -> None:
        self._task = task
        self._bar = bar
        self._lock = threading.Lock()

    def __enter__(self) -> Callable[..., None]:
        return self._run

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def _run(self, *arguments: Any) -> None:
        self._task(*arguments)
        with self._lock:
            self._bar.update()


def _bar(steps: Iterable[Any] | None, name: str, unit: str, total: int | None) -> Any:
    with warnings.catch_warnings():
        # Without ipywidgets a notebook has no bar, which is no reason for a warning.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm  # here, since it takes long to import
    return tqdm(steps, name, total, unit=unit, delay=DELAY, leave=False, disable=None)
