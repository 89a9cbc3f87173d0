"""Weights in files, read one tensor at a time, and files of their codes."""

from __future__ import annotations

from cubin.weights.checkpoint import Weights
from cubin.weights.tensor import NotFiniteError, Weight, WeightsError, channel_rows

__all__ = ["NotFiniteError", "Weight", "Weights", "WeightsError", "channel_rows"]


def __dir__() -> list[str]:
    return sorted(__all__)
