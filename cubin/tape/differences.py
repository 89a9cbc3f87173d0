"""The check of a gradient against finite differences."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np

from cubin.core.arrays import as_floats
from cubin.core.libraries import Array, library
from cubin.tape.node import Node, gradients


def check_gradient(f: Callable[..., Node], *inputs: Array, tolerance: float = 1e-6) -> float:
    """Compare the pull-back of a function with its central difference, in float64.

    For each input in turn, with a random direction v of its shape and a random direction u of the
    output's, both standard normal and the same in every call::

        <v, pull-back(u)>   against   <u, f(x + h v) - f(x - h v)> / (2 h)

    where h is the cube root of the machine epsilon, times max |x| where this exceeds 1. The signs
    of v are those of pull-back(u), so that the products add up, and an error is not measured
    against a sum that hides it.

    Parameters
    ----------
    f : callable
        Takes as many nodes as there are inputs and returns one; smooth within h of the inputs.
    *inputs : array of floats
        NumPy or CuPy arrays; they are converted to float64.
    tolerance : float
        The largest relative error that passes.

    Returns
    -------
    float
        The largest relative error over the inputs, each relative to the larger of the two numbers.

    Raises
    ------
    AssertionError
        If a relative error exceeds `tolerance` or is NaN: the message holds both numbers. If a
        gradient has another shape than its input.
    TypeError
        If an input is no array of floats, or `f` returns no node.
    """
    xp = library(*inputs)
    rng = np.random.default_rng(0)
    points = [
        as_floats(f"inputs[{number}]", x).astype(np.float64) for number, x in enumerate(inputs)
    ]
    nodes = [Node(x) for x in points]
    output = f(*nodes)
    if not isinstance(output, Node):
        raise TypeError(f"f must return a Node, got {type(output).__qualname__}")
    u = xp.asarray(rng.standard_normal(output.value.shape))
    worst = 0.0
    for number, (x, pulled) in enumerate(
        zip(points, gradients(output, nodes, seed=u), strict=True)
    ):
        if pulled.shape != x.shape:
            raise AssertionError(
                f"the gradient of input {number} has shape {pulled.shape}, the input {x.shape}"
            )
        magnitude = xp.asarray(abs(rng.standard_normal(x.shape)))
        v = xp.where(pulled < 0, -magnitude, magnitude)
        step = math.cbrt(sys.float_info.epsilon) * max(1.0, float(abs(x).max()) if x.size else 0.0)
        ahead, behind = (
            f(*nodes[:number], Node(x + side * step * v), *nodes[number + 1 :]).value
            for side in (1, -1)
        )
        difference = float((u * (ahead - behind)).sum()) / (2 * step)
        with np.errstate(invalid="ignore"):
            gradient = float((v * pulled).sum())
            scale = max(abs(difference), abs(gradient))
            error = abs(gradient - difference) / scale if scale else 0.0
        if not error <= tolerance:
            raise AssertionError(
                f"the gradient of input {number} gives {gradient!r} where the central difference "
                f"gives {difference!r}: relative error {error:.3g} exceeds {tolerance:.3g}"
            )
        worst = max(worst, error)
    return worst
