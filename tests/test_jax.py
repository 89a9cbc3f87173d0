"""cubin.jax: the values and gradients of NumPy's, to the bit, under jit, grad and vmap."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cubin
from tests.exhaustive import few
from tests.required import require

jax = require("jax")
from jax import numpy as jnp  # noqa: E402

import cubin.jax  # noqa: E402

same = np.testing.assert_array_equal


@pytest.fixture
def values(rng):
    return rng.normal(size=(3, 4, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("surrogate", "parameters"), [("ste", {}), ("tanh", {"t": 2.0}), ("approx_sign", {})]
)
def test_sign(values, surrogate, parameters):
    def sign(x):
        return cubin.jax.sign(x, surrogate=surrogate, **parameters)

    x = jnp.asarray(values)
    for function in (sign, jax.jit(sign), jax.vmap(sign), jax.jit(jax.vmap(jax.vmap(sign)))):
        same(function(x), cubin.sign(values))
    expected = cubin.sign_grad(values, 2 * np.ones_like(values), surrogate=surrogate, **parameters)
    gradient = jax.grad(lambda x: 2 * sign(x).sum())
    for function in (gradient, jax.jit(gradient), jax.vmap(gradient)):
        same(function(x), expected)


@pytest.mark.parametrize("layout", [{}, {"channel_axis": -1}, {"channel_axis": (0, 1)},
                                    {"group_size": 3}, {"group_size": 4}])  # fmt: skip
@pytest.mark.parametrize("solver", few(["greedy", "alternating", "optimal"], "greedy"))
@pytest.mark.parametrize("rule", ["bits_clip", "scaled_clip", "scale_aware"])
@pytest.mark.parametrize("mapped", [False, True])
def test_multibit(values, rng, layout, solver, rule, mapped):
    bits = rng.integers(0, 4, (4, 6)) if mapped else 2
    weights = None if solver == "greedy" else values[0] ** 2
    traced_map = jnp.asarray(bits) if mapped else bits

    def binarized(x, bits=traced_map):
        importance = None if weights is None else jnp.asarray(weights)
        return cubin.jax.multibit(x, bits, solver=solver, importance=importance, surrogate=rule,
                                  **layout)  # fmt: skip

    x = jnp.asarray(values)
    expected = np.stack([
        cubin.multibit(v, bits, solver=solver, importance=weights, **layout) for v in values
    ])  # fmt: skip
    for function in (binarized, jax.jit(binarized)):
        same(function(x[0]), expected[0])
        same(jax.vmap(function)(x), expected)
    pulled = np.stack([
        cubin.multibit_grad(v, bits, np.ones_like(v), surrogate=rule, **layout) for v in values
    ])  # fmt: skip
    gradient = jax.grad(lambda x: binarized(x).sum())
    for function in (gradient, jax.jit(gradient)):
        same(function(x[0]), pulled[0])
        same(jax.vmap(function)(x), pulled)
    same(binarized(x[0], bits), expected[0])  # a map of NumPy


def test_a_map_for_each_of_a_batch(values, rng):
    bits = rng.integers(0, 4, values.shape)
    found = jax.jit(jax.vmap(lambda x, b: cubin.jax.multibit(x, b, channel_axis=0)))(values, bits)
    expected = [cubin.multibit(v, b, channel_axis=0) for v, b in zip(values, bits, strict=True)]
    same(found, np.stack(expected))
    same(jax.jit(cubin.jax.multibit)(values, 2), cubin.multibit(values, 2))  # a traced number


def test_nothing_is_copied_on_the_way_in(values):
    x = jnp.asarray(values)
    view = cubin.core.libraries.JAX.view("x", x)
    assert view.__array_interface__["data"][0] == x.unsafe_buffer_pointer()
    with pytest.raises(ValueError, match="read-only"):
        view[...] = 0


def test_errors_are_in_32_bits_unless_jax_has_64(values):
    x = jnp.asarray(values)
    assert cubin.errors.relative_mse(x, x).dtype == np.float32
    with jax.enable_x64(True):
        assert cubin.errors.relative_mse(x, x).dtype == np.float64


def test_what_is_refused_says_what_to_do(values):
    x = jnp.asarray(values)
    for call in (
        lambda: jax.jit(cubin.sign)(x),
        lambda: jax.vmap(cubin.sign)(x),
        lambda: jax.grad(lambda x: cubin.multibit(x, 2).sum())(x),
        lambda: jax.jit(lambda x: cubin.errors.relative_mse(x, x))(x),
    ):
        with pytest.raises(TypeError, match=r"use cubin\.jax\.sign or cubin\.jax\.multibit"):
            call()
    with pytest.raises(TypeError, match="out cannot be a JAX array"):
        cubin.sign(x, out=x)
    for function in (cubin.jax.sign, lambda x: cubin.jax.multibit(x, 2)):
        with pytest.raises(TypeError, match="x must be a JAX array, got ndarray"):
            function(values)
        with pytest.raises(TypeError, match=r"x must be floating point.*x\.astype"):
            function(jnp.arange(3))
    for options, error in [
        ({"bits": 17}, ValueError),
        ({"bits": 9, "solver": "optimal"}, ValueError),
        ({"bits": 1.5}, TypeError),
        ({"bits": 2, "channel_axis": 3}, ValueError),
        ({"bits": 2, "surrogate": "none"}, ValueError),
        ({"bits": 2, "solver": "none"}, ValueError),
    ]:
        with pytest.raises(error):
            jax.jit(lambda x, options=options: cubin.jax.multibit(x, **options))(x)
    with pytest.raises(ValueError, match="surrogate must be one of"):
        cubin.jax.sign(x, surrogate="none")


def test_a_step_of_training_under_jit(rng):
    w = jnp.asarray(rng.normal(size=(4, 6)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(32, 6)).astype(np.float32))

    @jax.jit
    def step(w):
        def loss(w):
            y = x @ cubin.jax.multibit(w, 2, channel_axis=0).T
            return ((y - x[:, :4]) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(w)
        return value, w - 0.2 * gradient

    losses = []
    for _ in range(40):
        loss, w = step(w)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16(values):
    dtype = ml_dtypes.bfloat16
    x = jnp.asarray(values, dtype)
    same(jax.jit(cubin.jax.sign)(x), cubin.sign(np.asarray(x)))
    gradient = jax.jit(jax.grad(lambda x: cubin.jax.multibit(x, 2).sum()))(x)
    assert gradient.dtype == dtype
