"""Optimizers: functions from parameters, gradients and state to new parameters and new state.

Parameters, gradients and state are dicts of arrays by name. No argument is changed. The state is
empty before the first step; saved as arrays and loaded again, it resumes the run bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import TypeAlias

import numpy as np

from cubin.arrays import Array, as_floats, as_real_below, library, like

Arrays: TypeAlias = Mapping[str, Array]


def sgd(
    parameters: Arrays,
    gradients: Arrays,
    state: Arrays,
    learning_rate: float,
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
        ``velocity.<name>`` for each parameter.

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
    gradients = _matching(parameters, gradients)
    old = _moments(state, parameters, ("velocity",))
    rate = as_real_below("learning_rate", learning_rate, math.inf)
    momentum = as_real_below("momentum", momentum, 1)
    velocity = {name: momentum * old["velocity", name] + g for name, g in gradients.items()}
    moved = {name: p - rate * velocity[name] for name, p in parameters.items()}
    return moved, {f"velocity.{name}": value for name, value in velocity.items()}


def adam(
    parameters: Arrays,
    gradients: Arrays,
    state: Arrays,
    learning_rate: float = 1e-3,
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
        Added to the root of the second moment, at least 0.

    Returns
    -------
    parameters : dict of array
    state : dict of array
        ``first.<name>`` and ``second.<name>`` for each parameter, and ``step``, a NumPy integer
        array of shape (), on CuPy too, so that reading it does not wait for the GPU.

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
    gradients = _matching(parameters, gradients)
    old = _moments(state, parameters, ("first", "second"), counters=("step",))
    step = int(state["step"]) + 1 if state else 1
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    beta_1, beta_2 = (as_real_below("beta", beta, 1) for beta in betas)
    epsilon = as_real_below("epsilon", epsilon, math.inf)
    rate = as_real_below("learning_rate", learning_rate, math.inf) / (1 - beta_1**step)
    moved = {}
    new_state = {"step": np.array(step)}
    for name, p in parameters.items():
        g = gradients[name]
        first = beta_1 * old["first", name] + (1 - beta_1) * g
        second = beta_2 * old["second", name] + (1 - beta_2) * (g * g)
        moved[name] = p - rate * first / ((second / (1 - beta_2**step)) ** 0.5 + epsilon)
        new_state[f"first.{name}"], new_state[f"second.{name}"] = first, second
    return moved, new_state


def _matching(parameters: Arrays, gradients: Arrays) -> dict[str, Array]:
    """The gradients in the parameters' order and dtypes, once both are known to agree."""
    _check_names("gradients", gradients, parameters.keys())
    for name, p in parameters.items():
        as_floats(f"parameters[{name!r}]", p)
    return {
        name: like(f"gradients[{name!r}]", gradients[name], p, f"parameters[{name!r}]")
        for name, p in parameters.items()
    }


def _moments(
    state: Arrays, parameters: Arrays, kinds: tuple[str, ...], counters: tuple[str, ...] = ()
) -> dict[tuple[str, str], Array]:
    """The running moments of each kind for each parameter: zeros where `state` is empty."""
    pairs = [(kind, name) for kind in kinds for name in parameters]
    if not state:
        return {
            (kind, name): library(parameters[name]).zeros_like(parameters[name])
            for kind, name in pairs
        }
    _check_names("state", state, {".".join(pair) for pair in pairs}.union(counters))
    return {
        (kind, name): like(
            f"state['{kind}.{name}']",
            state[f"{kind}.{name}"],
            parameters[name],
            f"parameters[{name!r}]",
        )
        for kind, name in pairs
    }


def _check_names(what: str, given: Arrays, wanted: Set[str]) -> None:
    if given.keys() != wanted:
        raise ValueError(
            f"{what} must have the names that the parameters call for: "
            f"missing {sorted(wanted - given.keys())}, unknown {sorted(given.keys() - wanted)}"
        )
