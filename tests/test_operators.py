from __future__ import annotations

import copy

import numpy as np
import pytest

import cubin
from cubin.operators import Multibit, MultibitKernel, Sign


@pytest.fixture
def x(rng):
    return rng.normal(0, 2, (3, 4, 5))


MAP = np.arange(60).reshape(3, 4, 5) % 4


@pytest.mark.parametrize(
    ("operator", "forward", "backward"),
    [
        (Sign(), cubin.sign, cubin.sign_grad),
        (Multibit(2), lambda x: cubin.multibit(x, 2), lambda x, g: cubin.multibit_grad(x, 2, g)),
        (
            Multibit(MAP, channel_axis=(1, 2)),
            lambda x: cubin.multibit(x, MAP, channel_axis=(1, 2)),
            lambda x, g: cubin.multibit_grad(x, MAP, g),
        ),
        (
            MultibitKernel(MAP),
            lambda x: cubin.multibit(x, MAP, channel_axis=0),
            lambda x, g: cubin.multibit_grad(x, MAP, g),
        ),
    ],
)
def test_forward_and_backward(xp, host, x, rng, operator, forward, backward):
    gy = rng.normal(size=x.shape)
    y, residuals = operator.forward(xp.asarray(x))
    # A second use before the first gradient does not disturb it.
    operator.forward(xp.asarray(-3 * x))
    gx = operator.backward(residuals, xp.asarray(gy))
    np.testing.assert_array_equal(host(y), host(forward(xp.asarray(x))))
    np.testing.assert_array_equal(host(gx), host(backward(xp.asarray(x), xp.asarray(gy))))


OPERATORS = [Sign(), Multibit(3), Multibit(2, channel_axis=(0, 1)), Multibit(MAP, 1),
             Multibit(3, group_size=5), Multibit(3, solver="refined"),
             Multibit(3, surrogate="scaled_clip"),
             MultibitKernel(2), MultibitKernel(MAP)]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_state_and_copies(operator, x):
    twin = type(operator).from_state_dict(operator.state_dict())
    for other in (twin, copy.copy(operator), copy.deepcopy(operator)):
        assert type(other) is type(operator)
        assert other == operator
        np.testing.assert_array_equal(other.forward(x)[0], operator.forward(x)[0])


def test_copies_do_not_share_their_map():
    operator = Multibit(MAP.copy())
    twin, state = copy.copy(operator), operator.state_dict()
    operator.bits[0, 0, 0] = 3
    assert twin != operator
    np.testing.assert_array_equal(state["bits"], MAP)


def test_an_operator_keeps_a_map_of_its_own(xp, host):
    bits = xp.asarray(MAP.copy())
    operator = Multibit(bits)
    bits[...] = 0
    np.testing.assert_array_equal(host(operator.bits), MAP)


def test_different_operators_differ():
    for number, operator in enumerate(OPERATORS):
        assert [operator == other for other in OPERATORS].index(True) == number
        assert sum(operator == other for other in OPERATORS) == 1


def test_arguments():
    with pytest.raises(TypeError, match="bits"):
        Multibit(1.5)
    with pytest.raises(ValueError, match="bits"):
        MultibitKernel(17)
    with pytest.raises(TypeError, match="channel_axis"):
        Multibit(1, channel_axis="0")
    with pytest.raises(ValueError, match="state must have the keys"):
        Multibit.from_state_dict({"bits": 1})
    with pytest.raises(ValueError, match="broadcast"):
        Multibit(np.ones(3, int)).forward(np.ones(4))


@pytest.mark.parametrize("layout", [{"channel_axis": 1}, {"group_size": 4}])
@pytest.mark.parametrize("solver", ["refined", "alternating"])
def test_options_of_multibit(xp, host, x, layout, solver):
    x = x.reshape(3, 20).astype(np.float32)
    operator = Multibit(2, **layout, solver=solver, surrogate="scaled_clip")
    y, residuals = operator.forward(xp.asarray(x))
    np.testing.assert_array_equal(
        host(y), host(cubin.multibit(xp.asarray(x), 2, **layout, solver=solver))
    )
    gy = xp.asarray(np.ones_like(x))
    gx = cubin.multibit_grad(xp.asarray(x), 2, gy, **layout, surrogate="scaled_clip")
    np.testing.assert_array_equal(host(operator.backward(residuals, gy)), host(gx))
    twin = Multibit.from_state_dict(operator.state_dict())
    assert twin == operator
    assert repr(twin) == repr(operator)
    assert operator != Multibit(2, **layout, solver=solver)


def test_options_of_multibit_are_checked():
    with pytest.raises(ValueError, match="solver must be one of"):
        Multibit(2, solver="magic")
    with pytest.raises(ValueError, match="surrogate must be one of"):
        Multibit(2, surrogate="magic")
    with pytest.raises(ValueError, match="exclude each other"):
        Multibit(2, channel_axis=0, group_size=4)
    with pytest.raises(ValueError, match=r"0 \.\. 8 with solver='optimal', got 9"):
        Multibit(9, solver="optimal")
