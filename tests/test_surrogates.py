from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ml_dtypes import finfo

import cubin
from cubin import surrogates
from cubin.core import primitives
from tests import reference
from tests.reference import plain

FLOATS = ["float16", "bfloat16", "float32", "float64"]
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 4e-6, "float64": 1e-13}


def logistic(z):
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def swish_sign(x, beta):
    """From the derivative of the logistic function, not from hyperbolic functions."""
    s = logistic(beta * x)
    first = s * (1 - s)
    return 2 * beta * first * (2 + beta * x * (1 - 2 * s))


SLOPES = {
    "ste": lambda x, clip=1.0: float(abs(x) <= clip),
    "identity": lambda x: 1.0,
    "approx_sign": lambda x: 2 - 2 * abs(x) if abs(x) <= 1 else 0.0,
    "swish_sign": lambda x, beta=5.0: swish_sign(x, beta),
    "tanh": lambda x, t=1.0: max(1 / t, 1) * t * (1 - math.tanh(t * x) ** 2),
    "triangle": lambda x, t=1.0: max(1 / t, 1) * max(math.sqrt(2) * t - t * t * abs(x), 0),
}
PARAMETERS = [
    ("ste", {}), ("ste", {"clip": 0.5}), ("ste", {"clip": 3}), ("identity", {}),
    ("approx_sign", {}), ("swish_sign", {}), ("swish_sign", {"beta": 1.5}), ("tanh", {}),
    ("tanh", {"t": 0.125}), ("tanh", {"t": 1.5}), ("tanh", {"t": 10.0}), ("triangle", {}),
    ("triangle", {"t": 0.25}), ("triangle", {"t": 1.5}), ("triangle", {"t": 4.0}),
]  # fmt: skip


@pytest.fixture
def unregistered():
    """Names registered in the test are forgotten after it."""
    before = set(surrogates.SIGN), set(surrogates.MULTIBIT)
    yield
    for name in set(surrogates.SIGN) - before[0]:
        del surrogates.SIGN[name], primitives.REGISTRY[name]
    for name in set(surrogates.MULTIBIT) - before[1]:
        del surrogates.MULTIBIT[name]


def test_every_surrogate_is_compared():
    assert set(SLOPES) == set(surrogates.SIGN) == {name for name, _ in PARAMETERS}


# ---------------------------------------------------------------- of the sign


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "parameters"), PARAMETERS)
def test_slopes(xp, host, rng, name, parameters, dtype):
    x = np.concatenate([np.linspace(-4, 4, 65), rng.normal(0, 2, 60), [0.0, -0.0]]).astype(dtype)
    gy = rng.normal(size=x.shape).astype(dtype)
    gx = cubin.sign_grad(xp.asarray(x), xp.asarray(gy), surrogate=name, **parameters)
    assert gx.dtype == dtype
    expected = [SLOPES[name](float(v), **parameters) * float(g) for v, g in zip(x, gy, strict=True)]
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(host(gx), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", ["ste", "approx_sign", "swish_sign"])
def test_integral_is_the_jump_of_the_sign(xp, host, name):
    ends = np.linspace(-30, 30, 60 * 4096 + 1)
    middles = (ends[1:] + ends[:-1]) / 2
    slope = host(cubin.sign_grad(xp.asarray(middles), xp.ones(middles.shape), surrogate=name))
    assert slope.sum() / 4096 == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_integrals_that_depend_on_the_steepness(t):
    # Of tanh the jump is 2 k, of the triangle its area: 2 k, too.
    x = (np.arange(-4_000_000, 4_000_000) + 0.5) / 20_000
    for name in ("tanh", "triangle"):
        slope = cubin.sign_grad(x, np.ones_like(x), surrogate=name, t=t)
        assert slope.sum() / 20_000 == pytest.approx(2 * max(1 / t, 1), rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "parameters"), PARAMETERS)
def test_special_values(xp, host, name, parameters, dtype):
    info = finfo(dtype)
    x = np.array([np.nan, np.inf, -np.inf, info.max, -info.max], dtype)
    for gradient in (2.0, np.inf, np.nan):
        gy = np.full(x.shape, gradient, dtype)
        gx = host(cubin.sign_grad(xp.asarray(x), xp.asarray(gy), surrogate=name, **parameters))
        expected = plain(gy) if name == "identity" else np.zeros(x.shape)
        np.testing.assert_array_equal(plain(gx), expected)
    inside = np.array([0.0, -0.0, info.smallest_subnormal, -info.tiny], dtype)
    gy = np.full(inside.shape, np.inf, dtype)
    gx = host(cubin.sign_grad(xp.asarray(inside), xp.asarray(gy), surrogate=name, **parameters))
    np.testing.assert_array_equal(gx, gy)


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_gradients_are_kept(xp, host, name, dtype):
    tiny = finfo(dtype).tiny
    x = np.zeros(3, dtype)
    gy = np.array([tiny / 4, -tiny / 8, tiny / 64], dtype)
    assert np.all(gy)
    gx = host(cubin.sign_grad(xp.asarray(x), xp.asarray(gy), surrogate=name))
    slope = SLOPES[name](0.0)
    expected = (slope * gy.astype(np.float64)).astype(dtype)
    np.testing.assert_allclose(gx, expected, rtol=0, atol=float(finfo(dtype).smallest_subnormal))


def test_ste_at_its_clip_agrees_with_the_mask(xp, host):
    for dtype in FLOATS:
        x = np.array(
            [0.3, -0.3, np.nextafter(np.dtype(dtype).type(0.3), np.dtype(dtype).type(1))], dtype
        )
        gx = cubin.sign_grad(xp.asarray(x), xp.ones(3, dtype), surrogate="ste", clip=0.3)
        np.testing.assert_array_equal(host(gx), np.asarray(cubin.ste_mask(x, 0.3), dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_default_is_the_clipped_estimator(rng, dtype):
    x = np.concatenate([rng.normal(0, 2, 1000), [1, -1, 0, np.nan, np.inf]]).astype(dtype)
    gy = rng.normal(size=x.shape).astype(dtype)
    default = cubin.sign_grad(x, gy)
    np.testing.assert_array_equal(default, cubin.sign_grad(x, gy, surrogate="ste", clip=1))
    np.testing.assert_array_equal(default, reference.gradient(x, 1, gy))


@pytest.mark.parametrize("name", SLOPES)
def test_views_and_shapes(xp, host, rng, name):
    base = rng.normal(size=(6, 8, 10))
    for view in (
        lambda a: a[::-1, ::2],
        lambda a: a.transpose(2, 0, 1),
        lambda a: a[1:, 1:, ::-3],
        lambda a: a[0, 0, 0, ...],
        lambda a: a[:, :0],
    ):
        x, expected = view(xp.asarray(base)), view(base)
        before = host(x).copy()
        gx = cubin.sign_grad(x, x, surrogate=name)
        assert gx.shape == expected.shape
        slope = np.vectorize(SLOPES[name], otypes=[float])(expected)
        np.testing.assert_allclose(host(gx), slope * expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(host(x), before)


def test_more_than_one_block(xp, host, rng):
    x = rng.normal(size=65_537)
    gx = host(cubin.sign_grad(xp.asarray(x), xp.asarray(x), surrogate="approx_sign"))
    np.testing.assert_allclose(gx, np.maximum(2 - 2 * abs(x), 0) * x, rtol=1e-12)


@pytest.mark.kernels
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SLOPES)
def test_kernels_compile_for_every_architecture(device, monkeypatch, name, dtype):
    compiler = pytest.importorskip("tests.ptx.compiler")
    engine = pytest.importorskip("tests.ptx.device")
    compiled = []
    plain = engine._compiled

    def record(source, options, names=()):
        compiled.append((source, options))
        return plain(source, options, names)

    monkeypatch.setattr(engine, "_compiled", record)
    x = device.asarray(np.linspace(-2, 2, 7).astype(dtype))
    # Without a parameter, ste is the kernel of the multibit gradient.
    cubin.sign_grad(x, x, surrogate=name, **({"clip": 1.0} if name == "ste" else {}))
    assert compiled
    for source, options in set(compiled):
        for arch in ("sm_70", "sm_80", "sm_90", "sm_100", "sm_120"):
            (resources,) = compiler.resources(source, arch, options).values()
            assert resources.spill_stores == resources.spill_loads == 0


# ---------------------------------------------------------------- the registry


def test_a_surrogate_of_ones_own(xp, host, unregistered):
    @surrogates.surrogate("exp(-2 * sharpness * absolute(v)) * 2 * sharpness")
    def laplace(v, sharpness=1.0):
        """The density of the Laplace distribution."""
        return 2 * sharpness * np.exp(-2 * sharpness * np.abs(v))

    x = np.linspace(-2, 2, 33)
    for options, sharpness in (({}, 1.0), ({"sharpness": 3.0}, 3.0)):
        gx = host(cubin.sign_grad(xp.asarray(x), xp.ones(x.shape), surrogate="laplace", **options))
        np.testing.assert_allclose(gx, 2 * sharpness * np.exp(-2 * sharpness * abs(x)), rtol=1e-13)
    assert laplace.kernel_name == "cubin_laplace"
    assert "Laplace" in laplace.__doc__


def test_names_are_unique(unregistered):
    with pytest.raises(ValueError, match="'ste' already"):

        @surrogates.surrogate("W(1)")
        def ste(v):
            return np.ones_like(v)

    assert surrogates.SIGN["ste"].__doc__.startswith("The straight-through estimator")


def test_parameters_need_defaults(unregistered):
    with pytest.raises(ValueError, match="t of 'bare' needs a default value"):

        @surrogates.surrogate("t")
        def bare(v, t):
            return t + 0 * v

    assert "bare" not in surrogates.SIGN


def test_a_definition_can_be_run_again(unregistered):
    for value in (2.0, 3.0):

        @surrogates.surrogate(f"W({value})")
        def constant(v, value=value):
            return np.full(v.shape, value, v.dtype)

        x = np.zeros(3)
        np.testing.assert_array_equal(cubin.sign_grad(x, x + 1, surrogate="constant"), [value] * 3)


def test_a_multibit_surrogate_of_ones_own(unregistered):
    def halved(x, bits, gy, rows, gx):
        np.divide(gy, 2, out=gx)

    surrogates.MULTIBIT["halved"] = halved
    x = np.ones((2, 3))
    np.testing.assert_array_equal(cubin.multibit_grad(x, 1, x, surrogate="halved"), x / 2)


@pytest.mark.parametrize(
    ("error", "message", "name", "parameters"),
    [
        (ValueError, r"surrogate must be one of ste, .*triangle.*'stf'", "stf", {}),
        (TypeError, r"'ste' has no parameter 'beta': its parameters are clip", "ste", {"beta": 1}),
        (TypeError, r"'identity' has no parameter 'clip'.* none", "identity", {"clip": 1}),
        (ValueError, "clip must be positive and finite, got 0", "ste", {"clip": 0}),
        (ValueError, "beta must be positive and finite, got -1", "swish_sign", {"beta": -1.0}),
        (ValueError, "t must be positive and finite, got nan", "tanh", {"t": math.nan}),
        (ValueError, "t must be positive and finite, got inf", "triangle", {"t": math.inf}),
        (TypeError, "t must be a real number, got str", "tanh", {"t": "1"}),
        (TypeError, "t must be a real number, got bool", "tanh", {"t": True}),
    ],
)
def test_refusals(error, message, name, parameters):
    with pytest.raises(error, match=message):
        cubin.sign_grad(np.ones(3), np.ones(3), surrogate=name, **parameters)


def test_arguments_are_checked_as_by_default():
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"gy has shape \(3,\)"):
        cubin.sign_grad(x, np.ones(3), surrogate="approx_sign")
    with pytest.raises(TypeError, match="x must be float"):
        cubin.sign_grad(np.ones(3, int), np.ones(3), surrogate="approx_sign")
    with pytest.raises(ValueError, match="surrogate must be one of bits_clip, scaled_clip"):
        cubin.multibit_grad(x, 1, x, surrogate="ste")
    for name in ("scaled_clip", "scale_aware"):
        with pytest.raises(ValueError, match="channel_axis 2 is out of range"):
            cubin.multibit_grad(x, 1, x, surrogate=name, channel_axis=2)
        with pytest.raises(ValueError, match="bits must lie in"):
            cubin.multibit_grad(x, 17, x, surrogate=name)


# ---------------------------------------------------------------- of the multibit approximation

LAYOUTS = [
    {},
    {"channel_axis": 0},
    {"channel_axis": 1},
    {"channel_axis": (2, 0)},
    {"group_size": 5},
    {"group_size": 6},
]


def bounds(x, bits, layout):
    """The sum of every element's scales."""
    scales, *_ = reference.greedy(x, bits, **layout)
    found = np.zeros(x.shape)
    for row, members in reference.rows(x.shape, **layout).items():
        for index in members:
            found[index] = sum(scales[(level, *row)] for level in range(bits[index]))
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_clip(xp, host, rng, layout, dtype):
    x, gy = rng.normal(size=(2, 3, 4, 10)).astype(dtype)
    bits = rng.integers(0, 5, x.shape)
    found = cubin.multibit_grad(
        xp.asarray(x), bits, xp.asarray(gy), surrogate="scaled_clip", **layout
    )
    assert found.dtype == dtype
    bound = bounds(x, bits, layout)
    # The last element of a row with a code is met exactly, which rounding decides.
    clear = abs(abs(x) - bound) > 1e-6
    assert clear.mean() > 0.9
    expected = np.where(abs(x) <= bound, gy, 0)
    np.testing.assert_array_equal(host(found)[clear], expected[clear])


def test_scaled_clip_includes_its_bound(xp, host):
    x = np.array([[3.0, 3.0, -3.0], [1.0, 2.0, -3.0]])
    gx = cubin.multibit_grad(
        xp.asarray(x), 1, xp.ones(x.shape), channel_axis=0, surrogate="scaled_clip"
    )
    np.testing.assert_array_equal(host(gx), [[1, 1, 1], [1, 1, 0]])


def test_scaled_clip_does_not_depend_on_the_unit(xp, host, rng):
    x, gy = rng.normal(size=(2, 4, 25)).astype(np.float32)
    expected = host(cubin.multibit_grad(xp.asarray(x), 2, xp.asarray(gy), surrogate="scaled_clip"))
    assert 0 < np.count_nonzero(expected) < expected.size
    for scale in (2.0**-100, 2.0**100):
        scaled = xp.asarray(x * np.float32(scale))
        gx = cubin.multibit_grad(scaled, 2, xp.asarray(gy), surrogate="scaled_clip")
        np.testing.assert_array_equal(host(gx), expected)


def test_scaled_clip_of_subnormals(xp, host):
    x = np.array([1, 2, 3, 6], np.float32) * np.finfo(np.float32).smallest_subnormal
    gx = cubin.multibit_grad(xp.asarray(x), 1, xp.ones(4, np.float32), surrogate="scaled_clip")
    np.testing.assert_array_equal(host(gx), [1, 1, 1, 0])


def scale_aware(x, bits, gy, layout):
    """The two parts by finite differences of plain loops, in float64."""
    return through_scales(x, bits, gy, layout) + through_signs(x, bits, gy, layout)


def through_scales(x, bits, gy, layout):
    """Near x no sign changes, so that the approximation itself is smooth there."""
    step = 1e-6
    gradient = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[index] += step
        behind[index] -= step
        difference = (
            reference.greedy(ahead, bits, **layout)[3] - reference.greedy(behind, bits, **layout)[3]
        )
        gradient[index] = (gy * difference).sum() / (2 * step)
    return gradient


def through_signs(x, bits, gy, layout):
    """The chain rule over the levels with the scales held, the sign's derivative inside(r)."""
    scales, _, residuals, _ = reference.greedy(x, bits, **layout)
    gradient = np.zeros(x.shape)
    for row, members in reference.rows(x.shape, **layout).items():
        for index in members:
            slope_of_residual, slope = 1.0, 0.0
            for level in range(bits[index]):
                scale = scales[(level, *row)]
                inside = abs(residuals[(level, *index)]) <= 1
                slope_of_code = inside * slope_of_residual
                slope += scale * slope_of_code
                slope_of_residual -= scale * slope_of_code
            gradient[index] = gy[index] * slope
    return gradient


@pytest.mark.parametrize(("layout", "levels"), list(zip(LAYOUTS, [4, 4, 3, 2, 2, 2], strict=True)))
def test_scale_aware(xp, host, rng, layout, levels):
    x, gy = rng.normal(size=(2, 2, 6, 10))
    bits = 1 + np.indices(x.shape).sum(axis=0) % levels
    bits[0, 0, 0] = 0
    residuals = reference.greedy(x, bits, **layout)[2]
    assert np.abs(residuals[residuals != 0]).min() > 1e-5, "no sign may change within a step"
    found = cubin.multibit_grad(
        xp.asarray(x), bits, xp.asarray(gy), surrogate="scale_aware", **layout
    )
    np.testing.assert_allclose(host(found), scale_aware(x, bits, gy, layout), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_aware_of_one_bit_is_the_rule_of_xnor_net(xp, host, rng, dtype):
    w, g = rng.normal(size=(2, 4, 9)).astype(dtype)
    found = cubin.multibit_grad(
        xp.asarray(w), 1, xp.asarray(g), channel_axis=0, surrogate="scale_aware"
    )
    expected = np.zeros(w.shape)
    for row in range(4):
        b = [reference.sign(float(v)) for v in w[row]]
        scale = math.fsum(abs(float(v)) for v in w[row]) / 9
        through = math.fsum(float(g[row, j]) * b[j] for j in range(9)) / 9
        for j in range(9):
            inside = abs(float(w[row, j])) <= 1
            expected[row, j] = b[j] * through + float(g[row, j]) * scale * inside
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(host(found), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("surrogate", surrogates.MULTIBIT)
def test_rows_with_nan_leave_the_others_alone(xp, host, rng, surrogate):
    x, gy = rng.normal(size=(2, 3, 8))
    expected = cubin.multibit_grad(x, 2, gy, channel_axis=0, surrogate=surrogate)
    x[1, 3] = np.nan
    gx = host(
        cubin.multibit_grad(xp.asarray(x), 2, xp.asarray(gy), channel_axis=0, surrogate=surrogate)
    )
    np.testing.assert_allclose(gx[[0, 2]], expected[[0, 2]], rtol=1e-12)


@pytest.mark.parametrize("surrogate", surrogates.MULTIBIT)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)])
def test_multibit_shapes_and_bits(xp, host, rng, surrogate, shape):
    x, gy = rng.normal(size=(2, *shape))
    for bits in (0, 1, 3):
        gx = host(cubin.multibit_grad(xp.asarray(x), bits, xp.asarray(gy), surrogate=surrogate))
        assert gx.shape == shape
        if bits == 0 and shape:
            np.testing.assert_array_equal(gx, np.zeros(shape))


@pytest.mark.parametrize("surrogate", surrogates.MULTIBIT)
def test_multibit_views(xp, host, rng, surrogate):
    base = rng.normal(size=(6, 8, 10))
    for view in (lambda a: a[::-1, ::2], lambda a: a.transpose(2, 0, 1), lambda a: a[:, 1:, ::-3]):
        plain = np.ascontiguousarray(view(base))
        expected = cubin.multibit_grad(plain, 2, plain, channel_axis=1, surrogate=surrogate)
        x = view(xp.asarray(base))
        gx = cubin.multibit_grad(x, 2, x, channel_axis=1, surrogate=surrogate)
        np.testing.assert_allclose(host(gx), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("surrogate", ["scaled_clip", "scale_aware"])
def test_rows_longer_than_a_block(rng, surrogate):
    x, gy = rng.normal(size=(2, 2, 70_000))
    # Two rows of one length in one array and in two: cut differently, but the same numbers.
    whole = cubin.multibit_grad(x, 2, gy, channel_axis=0, surrogate=surrogate)
    rows = [cubin.multibit_grad(x[row], 2, gy[row], surrogate=surrogate) for row in range(2)]
    np.testing.assert_allclose(whole, rows, rtol=1e-9, atol=1e-12)
    bound = sum(cubin.quantize(x, 2, channel_axis=0).scales)[:, None]
    if surrogate == "scaled_clip":
        np.testing.assert_array_equal(whole, np.where(abs(x) <= bound, gy, 0))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_scale_aware_far_outside_satisfies_eulers_relation(levels, rows, seed):
    """With no residual within 1, only the scales' part is left, the gradient of y itself.

    The approximation is homogeneous, y(c x) = c y(x), so that <x, gx> = <gy, y>.
    """
    rng = np.random.default_rng(seed)
    x = 1e3 * rng.normal(size=(rows, 7))
    gy = rng.normal(size=x.shape)
    assume(np.abs(reference.greedy(x, levels, channel_axis=0)[2]).min() > 1)
    gx = cubin.multibit_grad(x, levels, gy, channel_axis=0, surrogate="scale_aware")
    y = cubin.multibit(x, levels, channel_axis=0)
    assert (x * gx).sum() == pytest.approx((gy * y).sum(), abs=1e-9 * np.abs(gy * y).sum())
