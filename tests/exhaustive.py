"""Tests that are left out unless CUBIN_TEST_EXHAUSTIVE=1: what takes long and repeats the rest.

A test or a parameter marked ``exhaustive`` is one of many of its kind: further sizes, dtypes and
levels of what a plain run tests with a few, and the interpreter's own tests. `.ci/run` runs all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

EXHAUSTIVE = os.environ.get("CUBIN_TEST_EXHAUSTIVE", "") not in ("", "0")

_LEFT_OUT = pytest.StashKey[int]()


def few(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Values to parametrize a test with, of which a plain run takes the `quick` ones alone."""
    listed = list(values)
    assert all(any(value is one or value == one for value in listed) for one in quick)
    return [
        value
        if any(value is one or value == one for one in quick)
        else pytest.param(value, marks=pytest.mark.exhaustive)
        for value in listed
    ]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the marked tests out, after ``-k`` and ``-m`` have chosen."""
    if EXHAUSTIVE:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that started this one (pytest -n) how many were left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All processes leave the same tests out."""
    if count := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[_LEFT_OUT] = count


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say in one line what was left out."""
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.line(
            f"{count} exhaustive tests left out: CUBIN_TEST_EXHAUSTIVE=1 runs them"
        )
