"""Binarization on the tape: discrete forward, a surrogate gradient backward; and frozen codes."""

from __future__ import annotations

from typing import Any

from cubin import binarize, gradients, products, surrogates
from cubin.codes.binary_code import BinaryCode
from cubin.core.libraries import Array
from cubin.tape.node import Node
from cubin.tape.operations import Operand


def sign(x: Operand, *, surrogate: str = "ste", **parameters: Any) -> Node:
    """+1 where x > 0, else -1, as `cubin.sign`; the gradient is `cubin.sign_grad`'s.

    Parameters
    ----------
    x : Node or array
    surrogate : str
        A name in `cubin.surrogates.SIGN`.
    **parameters : float
        Those of the surrogate.

    Raises
    ------
    TypeError
        If x is no array of floats, or the surrogate has no such parameter.
    ValueError
        If there is no such surrogate, or a parameter is not positive and finite.

    References
    ----------
    M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.
    """
    surrogates.sign_rule(surrogate, parameters)
    return _node(
        x, binarize.sign, lambda v, g: gradients.sign_grad(v, g, surrogate=surrogate, **parameters)
    )


def multibit(
    x: Operand,
    bits: Array,
    *,
    channel_axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    solver: str = "greedy",
    surrogate: str = "bits_clip",
) -> Node:
    """The approximation `cubin.multibit`; the gradient is `cubin.multibit_grad`'s.

    The gradient does not depend on the solver.

    Parameters
    ----------
    x : Node or array
    bits : int or integer array that broadcasts to x's shape
        The number of levels of every element, 0 to 16.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis; the last of them
        may be shorter.
    solver : str
        How codes and scales are found, as for `cubin.multibit`.
    surrogate : str
        A name in `cubin.surrogates.MULTIBIT`.

    Raises
    ------
    TypeError, ValueError
        As `cubin.multibit`, and ValueError if there is no such surrogate.

    References
    ----------
    J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional neural
    networks", NeurIPS 2018, arXiv:1805.10368.
    """
    surrogates.multibit_rule(surrogate)
    layout: Any = {"channel_axis": channel_axis, "group_size": group_size}
    return _node(
        x,
        lambda v: binarize.multibit(v, bits, solver=solver, **layout),
        lambda v, g: gradients.multibit_grad(v, bits, g, surrogate=surrogate, **layout),
    )


def linear(x: Operand, code: BinaryCode) -> Node:
    """The product with a frozen code, `cubin.products.linear`; the gradient is ``g @ code``.

    Neither direction decodes the whole code at once.

    Parameters
    ----------
    x : Node or array, shape (..., n)
    code : BinaryCode of shape (m, n)

    Returns
    -------
    Node, shape (..., m)

    Raises
    ------
    TypeError, ValueError
        As `cubin.products.linear`.
    """
    return _node(x, lambda v: products.linear(v, code), lambda v, g: g @ code)


def _node(x: Operand, forward: Any, backward: Any) -> Node:
    if not isinstance(x, Node):
        return Node(forward(x))
    return Node(forward(x.value), ((x, lambda g: backward(x.value, g)),))
