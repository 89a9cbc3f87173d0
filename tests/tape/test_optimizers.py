from __future__ import annotations

import io
import math

import numpy as np
import pytest
from ml_dtypes import bfloat16, finfo

from cubin.tape import Node, adam, gradients, sgd, sum

PARAMETERS = {"w": np.array([[1.0, -2.0], [0.5, 0.0]]), "b": np.array(3.0)}


def gradient_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal(p.shape) for name, p in PARAMETERS.items()}


def run(optimizer, steps, parameters=PARAMETERS, state=None, first=0, **options):
    state = {} if state is None else state
    for step in range(first, first + steps):
        parameters, state = optimizer(parameters, gradient_at(step), state, **options)
    return parameters, state


OPTIMIZERS = [(sgd, {"learning_rate": 0.1, "momentum": 0.9}), (adam, {"learning_rate": 0.01})]


def test_sgd_follows_its_formula():
    parameters, _ = run(sgd, 5, learning_rate=0.1, momentum=0.9)
    p, velocity = float(PARAMETERS["b"]), 0.0
    for step in range(5):
        velocity = 0.9 * velocity + float(gradient_at(step)["b"])
        p -= 0.1 * velocity
    assert parameters["b"] == pytest.approx(p, rel=1e-14)


def test_sgd_without_momentum_is_gradient_descent():
    parameters, _ = run(sgd, 1, learning_rate=0.5)
    np.testing.assert_allclose(parameters["w"], PARAMETERS["w"] - 0.5 * gradient_at(0)["w"])


def test_adam_follows_its_formula():
    parameters, state = run(adam, 5, learning_rate=0.1, betas=(0.8, 0.95), epsilon=1e-3)
    p, first, second = float(PARAMETERS["b"]), 0.0, 0.0
    for step in range(1, 6):
        g = float(gradient_at(step - 1)["b"])
        first = 0.8 * first + 0.2 * g
        second = 0.95 * second + 0.05 * g * g
        root = math.sqrt(second / (1 - 0.95**step))
        p -= 0.1 * first / (1 - 0.8**step) / (root + 1e-3)
    assert parameters["b"] == pytest.approx(p, rel=1e-12)
    assert state["step"] == 5


def test_first_step_of_adam_has_the_length_of_the_learning_rate():
    parameters, _ = run(adam, 1, learning_rate=0.25)
    np.testing.assert_allclose(
        parameters["w"], PARAMETERS["w"] - 0.25 * np.sign(gradient_at(0)["w"]), rtol=1e-6
    )


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_saved_state_resumes_bit_for_bit(optimizer, options):
    straight, straight_state = run(optimizer, 7, **options)
    parameters, state = run(optimizer, 3, **options)

    def stored(arrays):
        file = io.BytesIO()
        np.savez(file, **arrays)
        file.seek(0)
        return dict(np.load(file, allow_pickle=False))

    parameters, state = run(optimizer, 4, stored(parameters), stored(state), first=3, **options)
    for found, expected in ((parameters, straight), (state, straight_state)):
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].tobytes() == expected[name].tobytes()
            assert found[name].dtype == expected[name].dtype


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_arguments_are_not_changed(optimizer, options):
    parameters, state = run(optimizer, 2, **options)
    gradient = gradient_at(2)
    before = [{k: v.copy() for k, v in d.items()} for d in (parameters, gradient, state)]
    optimizer(parameters, gradient, state, **options)
    for now, then in zip((parameters, gradient, state), before, strict=True):
        assert now.keys() == then.keys()
        for name in then:
            np.testing.assert_array_equal(now[name], then[name])


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_steps_are_the_same_on_both_libraries(xp, host, optimizer, options):
    expected, _ = run(optimizer, 4, **options)
    parameters, state = {name: xp.asarray(p) for name, p in PARAMETERS.items()}, {}
    for step in range(4):
        gradient = {name: xp.asarray(g) for name, g in gradient_at(step).items()}
        parameters, state = optimizer(parameters, gradient, state, **options)
    for name, value in expected.items():
        np.testing.assert_allclose(host(parameters[name]), value, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_parameters_and_moments_keep_their_dtype(optimizer, dtype):
    parameters = {name: p.astype(dtype) for name, p in PARAMETERS.items()}
    parameters, state = run(optimizer, 3, parameters, learning_rate=np.float64(0.1))
    assert {p.dtype for p in parameters.values()} == {np.dtype(dtype)}
    assert {v.dtype for name, v in state.items() if name != "step"} == {np.dtype(np.float32)}
    masters = {"master.w", "master.b"} if dtype != np.float32 else set()
    assert {name for name in state if name.startswith("master.")} == masters


@pytest.mark.parametrize("gradient", [0.0, 1e-7, 1e-4, 300.0, 60_000.0])
def test_adam_moves_float16_by_the_learning_rate(xp, host, gradient):
    parameters = {"w": xp.ones(2, np.float16)}
    gradients = {"w": xp.asarray(np.array([gradient, -1], np.float16))}
    moved, state = adam(parameters, gradients, {}, learning_rate=2.0**-6)
    g = float(host(gradients["w"])[0])
    exact = 1 - 2.0**-6 * g / (abs(g) + 1e-8)
    np.testing.assert_allclose(host(moved["w"]), [exact, 1 + 2.0**-6], rtol=5e-4)
    for value in host(state["first.w"]), host(state["second.w"]):
        assert np.isfinite(value).all()


def test_gradient_of_float32_is_not_rounded_to_a_parameter_of_float16():
    parameters = {"w": np.ones(1, np.float16)}
    moved, _ = sgd(parameters, {"w": np.array([1e6], np.float32)}, {}, learning_rate=1e-6)
    np.testing.assert_allclose(moved["w"], 0, atol=1e-6)
    moved, _ = sgd(parameters, {"w": np.array([1e-9], np.float32)}, {}, learning_rate=1e8)
    np.testing.assert_allclose(moved["w"], 0.9, rtol=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_steps_too_small_for_the_dtype_add_up(optimizer, options, dtype):
    """A hundredth of the spacing of numbers from 1 on, a thousand times."""
    spacing = float(finfo(dtype).eps)
    rate = spacing / 100 * (1 - options.get("momentum", 0))
    parameters, state = {"w": np.ones(3, dtype)}, {}
    for _ in range(1000):
        gradient = {"w": np.ones(3, dtype)}
        parameters, state = optimizer(
            parameters, gradient, state, **{**options, "learning_rate": rate}
        )
    found = parameters["w"].astype(float)
    np.testing.assert_allclose(found, 1 - 10 * spacing, atol=spacing)


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_float16_that_was_changed_between_steps_is_taken_as_it_is(xp, host, optimizer, options):
    parameters, state = {"w": xp.asarray(np.array([1, 2, 3], np.float16))}, {}
    still = {"w": xp.zeros(3, np.float16)}
    parameters, state = optimizer(parameters, still, state, **options)
    state = {name: v + 1e-5 if name == "master.w" else v for name, v in state.items()}
    changed = {"w": parameters["w"].clip(0, 2.5)}
    parameters, state = optimizer(changed, still, state, **options)
    np.testing.assert_array_equal(host(parameters["w"]), [1, 2, 2.5])
    np.testing.assert_allclose(host(state["master.w"]), [1 + 1e-5, 2 + 1e-5, 2.5], rtol=2e-7)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_narrow_floats_resume_bit_for_bit(optimizer, dtype):
    start = {name: p.astype(dtype) for name, p in PARAMETERS.items()}
    straight, straight_state = run(optimizer, 7, start, learning_rate=1e-3)
    parameters, state = run(optimizer, 3, start, learning_rate=1e-3)
    parameters, state = run(optimizer, 4, parameters, state, first=3, learning_rate=1e-3)
    for found, expected in ((parameters, straight), (state, straight_state)):
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_adam_without_epsilon_leaves_what_has_no_gradient(dtype):
    parameters = {"w": np.ones(2, dtype)}
    moved, _ = adam(parameters, {"w": np.array([0, 1], dtype)}, {}, 0.25, epsilon=0)
    np.testing.assert_allclose(moved["w"], [1, 0.75])


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_parabola_is_minimised(optimizer, options):
    target = np.array([1.0, -0.5, 2.0])
    parameters, state = {"x": np.zeros(3)}, {}
    for _ in range(1000):
        x = Node(parameters["x"])
        loss = sum((x - target) * (x - target))
        (g,) = gradients(loss, [x])
        parameters, state = optimizer(parameters, {"x": g}, state, **options)
    np.testing.assert_allclose(parameters["x"], target, atol=1e-6)


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_what_does_not_agree_is_refused(optimizer, options):
    gradient = gradient_at(0)
    _, state = optimizer(PARAMETERS, gradient, {}, **options)

    def step(parameters=PARAMETERS, gradient=gradient, state=state):
        return optimizer(parameters, gradient, state, **options)

    with pytest.raises(ValueError, match=r"gradients must .* missing \['b'\], unknown \['c'\]"):
        step(gradient={"w": gradient["w"], "c": gradient["b"]})
    with pytest.raises(ValueError, match=r"gradients\['w'\] has shape \(2,\), .*'w'\] has shape"):
        step(gradient={**gradient, "w": np.zeros(2)})
    with pytest.raises(ValueError, match=r"state must have .* missing \['\w+\.w'"):
        step(state={name: value for name, value in state.items() if not name.endswith(".w")})
    with pytest.raises(ValueError, match=r"state\['\w+\.w'\] has shape \(3,\)"):
        step(state={k: np.zeros(3) if k.endswith(".w") else v for k, v in state.items()})
    halves = {name: p.astype(np.float16) for name, p in PARAMETERS.items()}
    with pytest.raises(ValueError, match=r"missing \['master.b', 'master.w'\]"):
        step(parameters=halves)
    with pytest.raises(
        TypeError, match=r"parameters\['w'\] must be float16, bfloat16, float32 or float64"
    ):
        step(parameters={**PARAMETERS, "w": np.arange(4).reshape(2, 2)})


def test_adam_state_without_its_step_is_refused():
    _, state = run(adam, 1)
    del state["step"]
    with pytest.raises(ValueError, match=r"missing \['step'\]"):
        adam(PARAMETERS, gradient_at(1), state)


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "message"),
    [
        (sgd, {"learning_rate": math.nan}, ValueError, "learning_rate must lie in .* got nan"),
        (sgd, {"learning_rate": "x"}, TypeError, "learning_rate must be a real number, got str"),
        (sgd, {"learning_rate": 1, "momentum": 1}, ValueError, "momentum must lie in .* got 1"),
        (adam, {"learning_rate": -1}, ValueError, "learning_rate must lie in .* got -1"),
        (adam, {"betas": (1.0, 0.9)}, ValueError, "beta must lie in 0 <= beta < 1, got 1.0"),
        (adam, {"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
        (adam, {"epsilon": -1e-8}, ValueError, "epsilon must lie in .* got -1e-08"),
    ],
)
def test_numbers_out_of_range_are_refused(optimizer, options, error, message):
    with pytest.raises(error, match=message):
        run(optimizer, 1, **options)
