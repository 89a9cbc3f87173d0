"""The tensors that a run leaves out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cubin.analysis.table import counted
from cubin.weights import NotFiniteError, Weight, Weights, WeightsError

LISTED = 8
"""How many skipped tensors are listed unless all are asked for."""


class Omissions:
    """The tensors that a run leaves out, and why.

    Parameters
    ----------
    weights : Weights
        Those of the files.
    strict : bool
        Whether to refuse weights that cannot be used.

    Attributes
    ----------
    skipped : list of Weight
        Weights that cannot be used. They make the run incomplete: its exit status is 1.
    left_out : list of Weight
        What is no weight, and weights that the run does not ask for.

    Raises
    ------
    WeightsError
        If strict, and there are weights that cannot be read.
    """

    def __init__(self, weights: Weights, strict: bool) -> None:
        self.strict = strict
        self.skipped = list(weights.skipped)
        self.left_out = list(weights.left_out)
        if strict and self.skipped:
            raise WeightsError(
                f"{self.skipped[0].name}: {self.skipped[0].reason} "
                f"(one of {len(self.skipped)} such weights; without --strict they are skipped)"
            )

    def finite(self, weights: Iterable[Weight]) -> Iterator[tuple[Weight, np.ndarray]]:
        """Load weights one by one, and skip those with NaN or infinity.

        Raises
        ------
        WeightsError
            If a tensor cannot be read; if strict, or none is left, at NaN or infinity.
        """
        empty, last = True, None
        for weight in weights:
            try:
                array = weight.load()
            except NotFiniteError as error:
                if self.strict:
                    raise
                self.skipped.append(replace(weight, reason=error.reason))
                last = error
                continue
            empty = False
            yield weight, array
        if empty and last is not None:
            raise last

    @property
    def exit_status(self) -> int:
        """0 if every weight was used, else 1."""
        return 1 if self.skipped else 0

    def text(self, verbose: bool) -> str:
        """Say what is left out: how many tensors for each reason, or every one of them."""
        lines = []
        if self.skipped:
            listed = self.skipped if verbose else self.skipped[:LISTED]
            what = counted(len(self.skipped), "weight tensor")
            lines.append(f"Skipped {what} that cannot be used:")
            lines += [f"  {described(tensor)}" for tensor in listed]
            if len(listed) < len(self.skipped):
                lines.append(f"  and {len(self.skipped) - len(listed)} more (--verbose)")
        if self.left_out:
            lines.append("Left out:")
            if verbose:
                lines += [f"  {described(tensor)}" for tensor in self.left_out]
            else:
                counts = Counter((kind(tensor.dtype), tensor.reason) for tensor in self.left_out)
                lines += [
                    f"  {counted(count, f'other {noun}')}: {reason}"
                    for (noun, reason), count in counts.most_common(LISTED)
                ]
                if len(counts) > LISTED:
                    lines.append("  and others (--verbose)")
        return "\n".join(lines)

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """Describe what is left out, as values that JSON can hold."""
        return {
            name: [
                {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "reason": t.reason}
                for t in tensors
            ]
            for name, tensors in (("skipped", self.skipped), ("left_out", self.left_out))
        }


def kind(dtype: str) -> str:
    if not dtype:
        return "file"
    return f"{'float' if dtype.startswith(('float', 'bfloat')) else dtype} tensor"


def described(tensor: Weight) -> str:
    if not tensor.dtype:  # a file
        return f"{tensor.name}: {tensor.reason}"
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{tensor.name} ({shape}, {tensor.dtype}): {tensor.reason}"
