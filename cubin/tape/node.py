"""The tape: values that remember what they were computed from, and the backward pass.

This module knows no operation. A node holds pairs of a parent and a pull-back, the function that
takes the gradient at the node to its share of the gradient at the parent; whoever makes a node
supplies them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = Any
PullBack = Callable[[Array], Array]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Node:
    """An immutable value on the tape.

    Parameters
    ----------
    value : array of floats
        A NumPy or CuPy array, or a NumPy scalar. It is not copied: whoever changes it in place
        changes what the pull-backs see.
    parents : tuple of (Node, pull-back), optional
        The nodes that `value` was computed from, each with the function that maps the gradient
        at this node to the part of the parent's gradient that comes through here, an array of the
        parent's shape and dtype. None for a leaf.

    Raises
    ------
    TypeError
        If `value` is no array of floats.

    Notes
    -----
    The operators ``+ - * / @``, the sign and the subscript are declared here for type checkers,
    and defined by `cubin.tape.operations`.

    `copy.deepcopy` copies the graph behind a node, too, of any depth: gradients of the copy are
    taken with respect to copies of the leaves, which the same call made. The pull-backs are
    functions and not copied; they keep to the arrays of the first graph. To leave the graph
    behind, copy ``Node(node.value)``. A leaf can be pickled, a node with parents cannot, since
    its pull-backs are no module's functions.
    """

    value: Array
    parents: tuple[tuple[Node, PullBack], ...] = ()

    # NumPy and CuPy arrays leave an operator to the node on its right, rather than apply it to
    # each of their elements.
    __array_ufunc__: ClassVar[None] = None

    __add__: ClassVar[Callable[[Node, Any], Node]]
    __radd__: ClassVar[Callable[[Node, Any], Node]]
    __sub__: ClassVar[Callable[[Node, Any], Node]]
    __rsub__: ClassVar[Callable[[Node, Any], Node]]
    __mul__: ClassVar[Callable[[Node, Any], Node]]
    __rmul__: ClassVar[Callable[[Node, Any], Node]]
    __truediv__: ClassVar[Callable[[Node, Any], Node]]
    __rtruediv__: ClassVar[Callable[[Node, Any], Node]]
    __matmul__: ClassVar[Callable[[Node, Any], Node]]
    __rmatmul__: ClassVar[Callable[[Node, Any], Node]]
    __neg__: ClassVar[Callable[[Node], Node]]
    __getitem__: ClassVar[Callable[[Node, Any], Node]]

    def __post_init__(self) -> None:
        dtype = getattr(self.value, "dtype", None)
        if not isinstance(dtype, np.dtype):
            got = type(self.value).__qualname__
            raise TypeError(f"value must be an array of floats, got {got}: pass NumPy's or CuPy's")
        if not (dtype.kind == "f" or dtype.name == "bfloat16"):
            raise TypeError(f"value must be an array of floats, got {dtype}")

    def __copy__(self) -> Node:
        return Node(self.value, self.parents)

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        # Parents first, so that nothing recurses into them.
        for node in _parents_first(self, known=memo):
            parents = tuple(
                (memo[id(parent)], copy.deepcopy(pull_back, memo))
                for parent, pull_back in node.parents
            )
            memo[id(node)] = Node(copy.deepcopy(node.value, memo), parents)
        return memo[id(self)]

    def __reduce__(self) -> tuple[type[Node], tuple[Array]]:
        if self.parents:
            raise TypeError(
                "a Node with parents cannot be pickled, since its pull-backs are functions: "
                "pickle Node(node.value), without the graph behind it"
            )
        return Node, (self.value,)

    def __repr__(self) -> str:
        return f"Node(shape={self.value.shape}, dtype={self.value.dtype})"


def gradients(output: Node, wrt: Iterable[Node], *, seed: Array | None = None) -> list[Array]:
    """The gradients of ``sum(seed * output)`` with respect to nodes.

    Parameters
    ----------
    output : Node
        Where the walk starts.
    wrt : iterable of Node
        The nodes whose gradients are wanted, leaves or not.
    seed : array, optional
        The gradient at `output`, of its shape; 1 where `output` has a single element.

    Returns
    -------
    list of array
        One gradient for each of `wrt`, of its shape and dtype; zeros for a node that `output` was
        not computed from. They may share memory with each other and with `seed`, and may be
        read-only.

    Raises
    ------
    TypeError
        If `output` or one of `wrt` is no node.
    ValueError
        If `seed` has another shape than `output`, or is missing where `output` has not exactly
        one element.

    Notes
    -----
    Reverse accumulation: with the nodes ordered such that each comes after its parents, the
    gradient at a node is complete once all nodes behind it are done. Nothing is stored in the
    nodes, so a graph can be walked any number of times. The gradient at a node is dropped as soon
    as it is passed on, and no pull-back is called that leads to none of `wrt`. What comes to a node
    on many paths is added in pairs, float16 and bfloat16 in float32, so that no share is lost
    beside the sum of the others.
    """
    wrt = _nodes(output, wrt)
    pending = {output: _Sum(_start(output.value, seed))}
    order = _parents_first(output)
    wanted = set(wrt)
    leading = _descendants(order, wanted)
    by_node: dict[Node, Array] = {}
    for node in reversed(order):
        if node not in leading:
            continue
        gradient = pending.pop(node).rounded(node.value.dtype)
        if node in wanted:
            by_node[node] = gradient
        for parent, pull_back in node.parents:
            if parent in leading:
                share = pull_back(gradient)
                if parent in pending:
                    pending[parent].add(share)
                else:
                    pending[parent] = _Sum(share)
    return [by_node[node] if node in by_node else np.zeros_like(node.value) for node in wrt]


class _Sum:
    """A sum of arrays that come one at a time, added in pairs like a binary counter.

    Of n addends each goes through about log2(n) additions. `parts` are sums of 2^i addends, the
    largest first.
    """

    def __init__(self, addend: Array) -> None:
        self.parts = [(1, addend)]

    def add(self, addend: Array) -> None:
        count = 1
        while self.parts and self.parts[-1][0] == count:
            addend = _wide_sum(self.parts.pop()[1], addend)
            count *= 2
        self.parts.append((count, addend))

    def rounded(self, dtype: np.dtype) -> Array:
        """The sum, rounded to `dtype`. The parts are used up."""
        _, result = self.parts.pop()
        while self.parts:
            result = _wide_sum(self.parts.pop()[1], result)
        return result.astype(dtype, copy=False)


def _wide_sum(a: Array, b: Array) -> Array:
    return a.astype(np.result_type(a.dtype, np.float32), copy=False) + b


def _nodes(output: Node, wrt: Iterable[Node]) -> list[Node]:
    if not isinstance(output, Node):
        raise TypeError(f"output must be a Node, got {type(output).__qualname__}")
    if isinstance(wrt, Node):
        raise TypeError("wrt must be an iterable of Nodes, got a single Node: pass [node]")
    nodes = list(wrt)
    for node in nodes:
        if not isinstance(node, Node):
            raise TypeError(f"wrt must hold Nodes, got {type(node).__qualname__}")
    return nodes


def _start(value: Array, seed: Array | None) -> Array:
    if seed is None:
        if value.size != 1:
            raise ValueError(
                f"output has shape {value.shape}: give a seed of that shape, or reduce it to one "
                "element"
            )
        return np.ones_like(value)
    shape = getattr(seed, "shape", None)
    if shape != value.shape:
        got = type(seed).__qualname__ if shape is None else f"shape {shape}"
        raise ValueError(f"seed must be an array of output's shape {value.shape}, got {got}")
    return seed.astype(value.dtype, copy=False)


def _parents_first(output: Node, known: Container[int] = ()) -> list[Node]:
    """All nodes that `output` was computed from, and itself, each after its parents.

    Those whose id is in `known` are left out, and so is what only they were computed from.
    """
    order = []
    seen = set()
    stack = [(output, False)]
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.append(node)
        elif node not in seen and id(node) not in known:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.parents)
    return order


def _descendants(order: list[Node], wanted: set[Node]) -> set[Node]:
    """The nodes of `order` that were computed from one of `wanted`, or are one."""
    descendants: set[Node] = set()
    for node in order:
        if node in wanted or any(parent in descendants for parent, _ in node.parents):
            descendants.add(node)
    return descendants
