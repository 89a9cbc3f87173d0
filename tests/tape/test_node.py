from __future__ import annotations

import ast
import copy
import functools
import gc
import inspect
import pickle
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from cubin.tape import Node, gradients, node


def scaled(x: Node, factor: float, calls: list[float] | None = None) -> Node:
    """factor * x, which notes its pull-backs in `calls`."""

    def pull_back(g):
        if calls is not None:
            calls.append(factor)
        return factor * g

    return Node(factor * x.value, ((x, pull_back),))


def joined(*parents: Node) -> Node:
    """The sum of nodes of one shape."""
    value = np.sum([parent.value for parent in parents], axis=0)
    return Node(value, tuple((parent, lambda g: g) for parent in parents))


def leaf(*values: float) -> Node:
    return Node(np.array(values))


def test_module_knows_nothing_of_the_package():
    tree = ast.parse(inspect.getsource(node))
    imported = {
        name
        for statement in ast.walk(tree)
        for name in (
            [alias.name for alias in statement.names]
            if isinstance(statement, ast.Import)
            else [statement.module]
            if isinstance(statement, ast.ImportFrom)
            else []
        )
    }
    assert not {name for name in imported if name.startswith(("cubin", "."))}
    assert "numpy" in imported


def test_node_cannot_be_changed():
    x = leaf(1.0)
    with pytest.raises(AttributeError):
        x.value = np.zeros(1)
    with pytest.raises((AttributeError, TypeError)):
        x.gradient = np.zeros(1)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (1.0, "float"),
        ([1.0], "list"),
        (np.arange(3), "int64"),
        (np.array([True]), "bool"),
        (leaf(1.0), "Node"),
        (SimpleNamespace(dtype="torch.float32"), "SimpleNamespace: pass NumPy's or CuPy's"),
    ],
)
def test_value_must_be_an_array_of_floats(value, got):
    with pytest.raises(TypeError, match=f"value must be an array of floats, got {got}"):
        Node(value)


def test_repr_shows_no_element():
    assert repr(Node(np.zeros((2, 3), np.float32))) == "Node(shape=(2, 3), dtype=float32)"


def test_nodes_compare_by_identity():
    value = np.zeros(2)
    assert Node(value) != Node(value)
    assert len({Node(value), Node(value)}) == 2


def test_gradient_sums_over_all_paths():
    x = leaf(1.0, 2.0)
    a, b = scaled(x, 3.0), scaled(x, 5.0)
    c = scaled(joined(a, b), 2.0)
    output = joined(c, a, x)
    gx, ga = gradients(output, [x, a], seed=np.array([1.0, 10.0]))
    # dc/da = 2 and the direct edge 1; dx: (3 + 5) * 2 + 3 + 1.
    np.testing.assert_array_equal(ga, [3.0, 30.0])
    np.testing.assert_array_equal(gx, [20.0, 200.0])


def test_pull_back_is_called_once_with_the_complete_gradient():
    calls: list[float] = []
    x = leaf(1.0)
    shared = scaled(x, 7.0, calls)
    output = joined(*[scaled(shared, 1.0) for _ in range(5)], shared)
    (gx,) = gradients(output, [x])
    assert calls == [7.0]
    np.testing.assert_array_equal(gx, [42.0])


def test_many_paths_take_linear_time():
    x = y = leaf(1.0)
    for _ in range(60):
        y = joined(y, y)
    np.testing.assert_array_equal(gradients(y, [x])[0], [2.0**60])


def test_branch_that_leads_to_nothing_wanted_is_not_walked():
    calls: list[float] = []
    x, other = leaf(1.0), leaf(1.0)
    output = joined(scaled(x, 2.0, calls), scaled(other, 3.0, calls))
    gradients(output, [x])
    assert calls == [2.0]


def test_unreached_node_gets_zeros(xp, host):
    x = Node(xp.ones((2, 3), np.float32))
    (gx,) = gradients(Node(xp.ones(1)), [x])
    assert type(gx) is type(x.value)
    assert gx.dtype == np.float32
    np.testing.assert_array_equal(host(gx), np.zeros((2, 3)))


def test_node_behind_the_output_gets_zeros():
    x = leaf(1.0)
    behind = scaled(x, 2.0)
    np.testing.assert_array_equal(gradients(x, [behind])[0], [0.0])


def test_output_itself_gets_the_seed():
    x = leaf(1.0, 2.0)
    np.testing.assert_array_equal(gradients(x, [x, x], seed=np.array([3.0, 4.0])), [[3, 4]] * 2)


def test_a_single_element_needs_no_seed():
    x = Node(np.full((1, 1), 5.0, np.float32))
    (gx,) = gradients(scaled(x, 2.0), [x])
    assert gx.shape == (1, 1)
    assert gx.dtype == np.float32
    np.testing.assert_array_equal(gx, [[2.0]])


def test_gradients_can_be_taken_twice():
    x = leaf(1.0, -2.0)
    output = joined(scaled(x, 3.0), x)
    first = gradients(output, [x], seed=np.ones(2))
    second = gradients(output, [x], seed=np.ones(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[0], [4.0, 4.0])


def test_seed_takes_the_dtype_of_the_output():
    x = Node(np.ones(2, np.float32))
    (gx,) = gradients(scaled(x, 2.0), [x], seed=np.ones(2))
    assert gx.dtype == np.float32


def test_seed_is_not_changed():
    x = leaf(1.0, 2.0)
    seed = np.ones(2)
    gradients(joined(x, x, x), [x], seed=seed)
    np.testing.assert_array_equal(seed, [1.0, 1.0])


def test_order_and_kind_of_wrt():
    parameters = {"a": leaf(1.0), "b": leaf(1.0)}
    output = joined(scaled(parameters["a"], 2.0), scaled(parameters["b"], 3.0))
    by_name = dict(zip(parameters, gradients(output, parameters.values()), strict=True))
    assert {name: float(g[0]) for name, g in by_name.items()} == {"a": 2.0, "b": 3.0}
    assert gradients(output, []) == []


@pytest.mark.parametrize(
    ("output", "wrt", "message"),
    [
        (np.ones(1), [leaf(1.0)], "output must be a Node, got ndarray"),
        (leaf(1.0), leaf(1.0), "wrt must be an iterable of Nodes, got a single Node"),
        (leaf(1.0), [np.ones(1)], "wrt must hold Nodes, got ndarray"),
    ],
)
def test_what_is_no_node_is_refused(output, wrt, message):
    with pytest.raises(TypeError, match=message):
        gradients(output, wrt)


def test_bad_seed_is_refused():
    x = leaf(1.0, 2.0)
    with pytest.raises(ValueError, match=r"output has shape \(2,\): give a seed"):
        gradients(x, [x])
    with pytest.raises(ValueError, match=r"output's shape \(2,\), got shape \(3,\)"):
        gradients(x, [x], seed=np.ones(3))
    with pytest.raises(ValueError, match=r"output's shape \(2,\), got float"):
        gradients(x, [x], seed=1.0)


def test_gradients_inside_are_freed_during_the_walk():
    length, held, most = 50, [], []

    def pull_back(g):
        share = np.array(g)
        held.append(weakref.ref(share))
        most.append(sum(reference() is not None for reference in held))
        return share

    x = y = leaf(1.0)
    for _ in range(length):
        y = Node(y.value, ((y, pull_back),))
    gradients(y, [x])
    assert len(held) == length
    assert max(most) <= 2


def test_graph_is_freed_with_its_output_without_the_garbage_collector():
    x = leaf(1.0)
    inside = scaled(x, 2.0)
    array = weakref.ref(inside.value)
    output = scaled(inside, 3.0)
    gradients(output, [x])
    del inside
    assert array() is not None
    gc.disable()
    try:
        del output
        assert array() is None
    finally:
        gc.enable()


def deep_chain_gradient() -> float:
    x = y = leaf(1.0)
    for number in range(100_000):
        y = scaled(y, -1.0) if number % 2 else joined(y)
    (gx,) = gradients(y, [x])
    del y
    gc.collect()
    return float(gx[0])


def test_depth_overflows_neither_in_the_walk_nor_when_freed():
    assert deep_chain_gradient() == 1.0


def test_depth_does_not_overflow_a_small_stack():
    found: list[float] = []
    previous = threading.stack_size(1024 * 1024)
    try:
        thread = threading.Thread(target=lambda: found.append(deep_chain_gradient()))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(previous)
    assert found == [1.0]


def test_deep_chain_in_a_cycle_is_collected():
    def pull_back(g):
        return g

    y = Node(np.ones(1))
    array = weakref.ref(y.value)
    for _ in range(100_000):
        y = Node(y.value, ((y, pull_back),))
    pull_back.owner = y
    del y, pull_back
    gc.collect()
    assert array() is None


# ---------------------------------------------------------------- copies


def chain(x: Node, length: int) -> Node:
    y = x
    for _ in range(length):
        y = scaled(y, -1.0)
    return y


def test_copy_of_a_deep_graph_is_a_graph_of_its_own():
    x = leaf(2.0)
    y = chain(x, 3000)
    other, start = copy.deepcopy([y, x])
    np.testing.assert_array_equal(other.value, y.value)
    assert other is not y
    assert start is not x
    assert not np.may_share_memory(start.value, x.value)
    np.testing.assert_array_equal(gradients(other, [start, x]), [[1.0], [0.0]])
    np.testing.assert_array_equal(gradients(y, [x, start]), [[1.0], [0.0]])


def test_copies_in_one_call_share_what_they_share():
    x = leaf(2.0)
    a, b = scaled(x, 3.0), scaled(x, 5.0)
    held = {"loss": joined(a, b), "a": a, "nested": [b, x]}
    copied = copy.deepcopy(held)
    b2, x2 = copied["nested"]
    found = gradients(copied["loss"], [copied["a"], b2, x2])
    np.testing.assert_array_equal(found, [[1.0], [1.0], [8.0]])
    again = copy.deepcopy([x, x])
    assert again[0] is again[1]


def test_copies_of_all_nodes_of_a_chain_take_linear_time(monkeypatch):
    nodes = [leaf(1.0)]
    for _ in range(3000):
        nodes.append(scaled(nodes[-1], 1.0))
    walked = []
    plain = node._parents_first

    def counting(output, known=()):
        order = plain(output, known)
        walked.append(len(order))
        return order

    monkeypatch.setattr(node, "_parents_first", counting)
    copied = copy.deepcopy(nodes)
    assert np.sum(walked) == len(nodes)
    assert copied[5].parents[0][0] is copied[4]


def test_copied_pull_back_with_arguments_of_its_own():
    def pull_back(g, other):
        return g * other.value

    x = leaf(3.0)
    y = Node(x.value * x.value, ((x, functools.partial(pull_back, other=x)),))
    other, start = copy.deepcopy((y, x))
    assert other.parents[0][1].keywords["other"] is start


def test_shallow_copy_has_the_same_parents():
    x = leaf(2.0)
    y = scaled(x, 3.0)
    other = copy.copy(y)
    assert other is not y
    assert other.value is y.value
    np.testing.assert_array_equal(gradients(other, [x]), [[3.0]])


def test_leaf_can_be_pickled_and_a_graph_cannot():
    x = leaf(1.0, 2.0)
    again = pickle.loads(pickle.dumps(x))
    assert isinstance(again, Node)
    assert again.parents == ()
    np.testing.assert_array_equal(again.value, x.value)
    for length in (1, 3000):
        with pytest.raises(TypeError, match=r"cannot be pickled.*pickle Node\(node.value\)"):
            pickle.dumps(chain(x, length))
