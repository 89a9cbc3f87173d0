from __future__ import annotations

import re

import numpy as np
import pytest

from cubin.tape import Node, check_gradient, exp


def product(x: Node, y: Node, factor: float = 1.0, share: float = 1.0) -> Node:
    """x * y, the gradient of y wrong by `factor`; `share` of x's elements get a gradient."""
    a, b = x.value, y.value
    kept = np.arange(a.size).reshape(a.shape) < share * a.size
    return Node(a * b, ((x, lambda g: g * b * kept), (y, lambda g: factor * g * a)))


X, Y = np.linspace(-1, 2, 12).reshape(3, 4), np.linspace(3, 1, 12).reshape(3, 4)


def test_right_gradient_passes():
    assert check_gradient(product, X, Y) < 1e-8


@pytest.mark.parametrize("factor", [0.0, -1.0, 1 + 1e-5, np.nan, np.inf])
def test_wrong_gradient_is_found_and_named(factor):
    with pytest.raises(AssertionError, match=r"the gradient of input 1 gives .* relative error"):
        check_gradient(lambda x, y: product(x, y, factor), X, Y)


def test_small_factor_is_found_where_the_products_would_cancel():
    x, y = np.random.default_rng(0).standard_normal((2, 100, 100))
    with pytest.raises(AssertionError, match="relative error 1e-05"):
        check_gradient(lambda x, y: product(x, y, 1 + 1e-5), x, y)


def test_gradient_of_another_shape_is_found():
    def total(x: Node) -> Node:
        return Node(x.value.sum(), ((x, lambda g: g),))

    with pytest.raises(AssertionError, match=r"input 0 has shape \(\), the input \(3, 4\)"):
        check_gradient(total, X)


def test_single_wrong_element_is_found():
    with pytest.raises(AssertionError, match="input 0"):
        check_gradient(lambda x, y: product(x, y, share=11 / 12), X, Y)


def test_message_holds_both_numbers():
    with pytest.raises(AssertionError) as caught:
        check_gradient(lambda x, y: product(x, y, 2.0), X, Y)
    gradient, difference = re.findall(r"gives (\S+)", str(caught.value))
    assert float(gradient) == pytest.approx(2 * float(difference.rstrip(":")), rel=1e-8)


def test_gradient_of_what_does_not_depend_on_the_input_passes():
    assert check_gradient(lambda x: Node(np.ones(3)), X) == 0.0


def test_missing_gradient_is_found():
    with pytest.raises(AssertionError, match="relative error 1 "):
        check_gradient(lambda x: Node(np.exp(x.value)), X)


def test_tolerance_is_what_passes():
    def f(x, y):
        return product(x, y, 1.01)

    assert 1e-4 < check_gradient(f, X, Y, tolerance=0.1) <= 0.0101
    with pytest.raises(AssertionError):
        check_gradient(f, X, Y, tolerance=1e-4)


def test_inputs_are_taken_in_float64():
    dtypes = set()

    def f(x):
        dtypes.add(x.value.dtype)
        return exp(x)

    check_gradient(f, X.astype(np.float16))
    assert dtypes == {np.dtype(np.float64)}


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_large_and_small_inputs(scale):
    check_gradient(lambda x: x * x, scale * X)


def test_empty_input():
    assert check_gradient(lambda x: x * 2, np.zeros((0, 3))) == 0.0


def test_bad_types_are_refused():
    with pytest.raises(
        TypeError, match=r"inputs\[1\] must be float16, bfloat16, float32 or float64"
    ):
        check_gradient(product, X, np.arange(12).reshape(3, 4))
    with pytest.raises(TypeError, match="f must return a Node, got ndarray"):
        check_gradient(lambda x: x.value, X)
