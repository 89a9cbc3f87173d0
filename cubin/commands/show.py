"""`python -m cubin show`: what a file of codes holds."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from cubin import errors
from cubin.analysis.table import counted
from cubin.commands.arguments import UsageError
from cubin.commands.error import Chosen
from cubin.weights import Weights
from cubin.weights.codes import StoredCode, stored_codes

HEADS = ("tensor", "shape", "bits", "payload [bit]", "effective [bit]", "bytes", "rel. MSE")


def facts(stored: StoredCode, weights: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of a code; with the weights, its error."""
    code = stored.load()
    known: dict[str, Any] = {
        "name": stored.name,
        "shape": list(stored.shape),
        "bits": "map" if stored.mapped else stored.levels,
        "precisions": None if code.precisions is None else list(code.precisions),
        "payload_bits": code.payload_bits,
        "effective_bits": code.effective_bits,
        "bytes": stored.nbytes,
    }
    if weights is None:
        return known
    if stored.name not in weights:
        raise UsageError(f"--weights: no tensor {stored.name!r} in it; give what was quantized")
    weight = weights[stored.name]
    chosen = Chosen(weight, weight.channel_axis, code.group_size)
    if chosen.shape != stored.shape:
        raise UsageError(
            f"--weights: {stored.name} has the shape {chosen.shape} there, {stored.shape} here"
        )
    measured = errors.measure(chosen.load(), code.dequantize())
    known["relative_mse"] = float(measured.relative_mse())
    known["sums"] = (float(measured.error), float(measured.power))
    return known


def run(arguments: argparse.Namespace) -> int:
    """Print what a file holds; return the exit status."""
    try:
        listed = stored_codes(arguments.file)
        tensors = None
        if arguments.weights is not None:
            tensors = {tensor.name: tensor for tensor in Weights(arguments.weights).tensors}
        known = [facts(stored, tensors) for stored in listed]
    except ValueError as damage:
        raise UsageError(str(damage)) from damage
    size = sum(stored.size for stored in listed)
    nbytes = os.path.getsize(arguments.file)
    total: dict[str, Any] = {
        "tensors": len(listed),
        "weights": size,
        "bytes": nbytes,
        "file_bits": 8 * nbytes / max(size, 1),
        "effective_bits": mean(known, listed, "effective_bits"),
        "payload_bits": mean(known, listed, "payload_bits"),
    }
    if tensors is not None:
        squared, power = (sum(one["sums"][i] for one in known) for i in (0, 1))
        total["relative_mse"] = squared / power if power else 0.0
    for one in known:
        one.pop("sums", None)
    if arguments.json:
        print(json.dumps({"tensors": known, "overall": total}))
        return 0
    shown = HEADS if tensors is not None else HEADS[:-1]
    lines = [list(shown), *(cells(one) for one in known)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(left + right))
    print(
        f"{counted(len(listed), 'tensor')}, {counted(size, 'weight')}: "
        f"{total['payload_bits']:.3f} payload bits, "
        f"{total['effective_bits']:.3f} effective bits, {total['file_bits']:.3f} bits in the file "
        f"of {nbytes:,} bytes"
        + (f"; relative MSE {total['relative_mse']:.3e}" if tensors is not None else "")
    )
    return 0


def mean(known: list[dict[str, Any]], listed: list[StoredCode], name: str) -> float:
    size = sum(stored.size for stored in listed)
    pairs = zip(known, listed, strict=True)
    return sum(one[name] * stored.size for one, stored in pairs) / max(size, 1)


def cells(one: dict[str, Any]) -> list[str]:
    known = [
        one["name"] or "(no name)",
        "x".join(map(str, one["shape"])),
        ",".join(map(str, one["precisions"] or [one["bits"]])),
        f"{one['payload_bits']:.3f}",
        f"{one['effective_bits']:.3f}",
        f"{one['bytes']:,}",
    ]
    return known + ([f"{one['relative_mse']:.3e}"] if "relative_mse" in one else [])
