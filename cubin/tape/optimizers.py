"""Optimizers: functions from parameters, gradients and state to new parameters and new state.

Parameters, gradients and state are dicts of arrays by name. No argument is changed. The state is
empty before the first step; saved as arrays and loaded again, it resumes the run bit for bit.

A parameter of float16 or bfloat16 takes its steps in float32: in either most steps are too small to
move it, and in float16 squares of gradients overflow or vanish, and an epsilon of 1e-8 is 0. Its
moments are float32, and the state holds its value in float32 as ``master.<name>``; the parameter is
this value rounded.
Where somebody changed an element of the parameter between two steps, by clipping it for example,
the next step starts from the element as it is, else from the master's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import TypeAlias

import numpy as np

from cubin.core.arrays import as_floats, as_real_below, like
from cubin.core.floats import work_dtype
from cubin.core.libraries import Array, library

Arrays: TypeAlias = Mapping[str, Array]


def sgd(
    parameters: Arrays,
    gradients: Arrays,
    state: Arrays,
    learning_rate: float,
    *,
    momentum: float = 0.0,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One step of gradient descent with momentum.

    ::

        velocity = momentum * velocity + gradient
        parameter = parameter - learning_rate * velocity

    Parameters
    ----------
    parameters : dict of array
        Floats; the results keep shape and dtype.
    gradients : dict of array
        One for each parameter, of its shape.
    state : dict of array
        The state that the step before returned, or an empty dict.
    learning_rate : float
        At least 0.
    momentum : float
        0 <= momentum < 1.

    Returns
    -------
    parameters : dict of array
    state : dict of array
        ``velocity.<name>`` for each parameter, and ``master.<name>`` for one of float16 or
        bfloat16.

    Raises
    ------
    TypeError
        If an array is none of floats, or a gradient is in another library than its parameter.
    ValueError
        If the names or shapes of parameters, gradients and state do not agree, or a number is out
        of range.

    References
    ----------
    B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """
    values, gradients, old = _matching(parameters, gradients, state, ("velocity",))
    rate = as_real_below("learning_rate", learning_rate, math.inf)
    momentum = as_real_below("momentum", momentum, 1)
    velocity = {name: momentum * old["velocity", name] + g for name, g in gradients.items()}
    moved = {name: p - rate * velocity[name] for name, p in values.items()}
    rounded, masters = _rounded(moved, parameters)
    return rounded, {f"velocity.{name}": value for name, value in velocity.items()} | masters


def adam(
    parameters: Arrays,
    gradients: Arrays,
    state: Arrays,
    learning_rate: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One step of Adam.

    At step t, from 1::

        first = beta_1 * first + (1 - beta_1) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient^2
        parameter = parameter - learning_rate * (first / (1 - beta_1^t))
                                / (sqrt(second / (1 - beta_2^t)) + epsilon)

    Parameters
    ----------
    parameters : dict of array
        Floats; the results keep shape and dtype.
    gradients : dict of array
        One for each parameter, of its shape.
    state : dict of array
        The state that the step before returned, or an empty dict.
    learning_rate : float
        At least 0.
    betas : (float, float)
        The decay rates of the two moments, 0 <= beta < 1.
    epsilon : float
        Added to the root of the second moment, at least 0. Where both are 0, nothing moves.

    Returns
    -------
    parameters : dict of array
    state : dict of array
        ``first.<name>`` and ``second.<name>`` for each parameter, ``master.<name>`` for one of
        float16 or bfloat16, and ``step``, a NumPy integer array of shape (), on CuPy too, so that
        reading it does not wait for the GPU.

    Raises
    ------
    TypeError
        If an array is none of floats, or a gradient is in another library than its parameter.
    ValueError
        If the names or shapes of parameters, gradients and state do not agree, or a number is out
        of range.

    References
    ----------
    D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015,
    arXiv:1412.6980.
    """
    values, gradients, old = _matching(
        parameters, gradients, state, ("first", "second"), counters=("step",)
    )
    step = int(state["step"]) + 1 if state else 1
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    beta_1, beta_2 = (as_real_below("beta", beta, 1) for beta in betas)
    epsilon = as_real_below("epsilon", epsilon, math.inf)
    rate = as_real_below("learning_rate", learning_rate, math.inf) / (1 - beta_1**step)
    moved = {}
    new_state = {"step": np.array(step)}
    for name, p in values.items():
        g = gradients[name]
        first = beta_1 * old["first", name]
        first += (1 - beta_1) * g
        second = beta_2 * old["second", name]
        square = g * g
        square *= 1 - beta_2
        second += square
        scale = second / (1 - beta_2**step)
        scale **= 0.5
        scale += epsilon
        scale += scale == 0
        change = rate * first
        change /= scale
        moved[name] = p - change
        new_state[f"first.{name}"], new_state[f"second.{name}"] = first, second
    rounded, masters = _rounded(moved, parameters)
    return rounded, new_state | masters


def _matching(
    parameters: Arrays,
    gradients: Arrays,
    state: Arrays,
    kinds: tuple[str, ...],
    counters: tuple[str, ...] = (),
) -> tuple[dict[str, Array], dict[str, Array], dict[tuple[str, str], Array]]:
    """The parameters, gradients and moments of each kind, all in the dtypes of the steps.

    Their names, shapes and libraries agree. The moments of an empty state are zeros.
    """
    _check_names("gradients", gradients, parameters.keys())
    values = {}
    for name, p in parameters.items():
        array = as_floats(f"parameters[{name!r}]", p)
        values[name] = array.astype(work_dtype(array.dtype), copy=False)

    def beside(what: str, array: Array, name: str) -> Array:
        return like(what, array, values[name], f"parameters[{name!r}]")

    wide = {name: beside(f"gradients[{name!r}]", gradients[name], name) for name in values}
    pairs = [(kind, name) for kind in kinds for name in values]
    if not state:
        zeros = {(kind, name): library(wide[name]).zeros_like(wide[name]) for kind, name in pairs}
        return values, wide, zeros
    halves = [name for name, value in values.items() if value.dtype != parameters[name].dtype]
    pairs += [("master", name) for name in halves]
    _check_names("state", state, {".".join(pair) for pair in pairs}.union(counters))
    old = {
        (kind, name): beside(f"state['{kind}.{name}']", state[f"{kind}.{name}"], name)
        for kind, name in pairs
    }
    for name in halves:
        master = old["master", name]
        kept = master.astype(parameters[name].dtype) == parameters[name]
        values[name] = library(master).where(kept, master, values[name])
    return values, wide, old


def _rounded(
    moved: dict[str, Array], parameters: Arrays
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The moved parameters in their own dtypes, and the masters of those that this rounds."""
    rounded = {name: p.astype(parameters[name].dtype, copy=False) for name, p in moved.items()}
    masters = {f"master.{name}": p for name, p in moved.items() if p.dtype != rounded[name].dtype}
    return rounded, masters


def _check_names(what: str, arrays: Arrays, wanted: Set[str]) -> None:
    if arrays.keys() != wanted:
        raise ValueError(
            f"{what} must have the names that the parameters call for: "
            f"missing {sorted(wanted - arrays.keys())}, unknown {sorted(arrays.keys() - wanted)}"
        )
