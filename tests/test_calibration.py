"""Gram: against sums of outer products written as loops."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cubin
from cubin import calibration


def outer_products(vectors):
    """The mean outer product, one vector after the other."""
    total = np.zeros((vectors.shape[1],) * 2)
    for vector in vectors.astype(np.float64):
        total += np.outer(vector, vector)
    return total / max(1, len(vectors))


def patches(x, kernel, stride, padding):
    """Every patch of a convolution, one index at a time."""
    count, channels, height, width = x.shape
    found = []
    for image in range(count):
        for top in range(-padding[0], height + padding[0] - kernel[0] + 1, stride[0]):
            for left in range(-padding[1], width + padding[1] - kernel[1] + 1, stride[1]):
                patch = []
                for channel in range(channels):
                    for row in range(top, top + kernel[0]):
                        for column in range(left, left + kernel[1]):
                            inside = 0 <= row < height and 0 <= column < width
                            patch.append(x[image, channel, row, column] if inside else 0.0)
                found.append(patch)
    return np.array(found, np.float64).reshape(-1, channels * kernel[0] * kernel[1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_matrix_is_the_mean_of_outer_products(xp, host, rng, dtype, monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK", 40)  # several blocks, the last one shorter
    batches = [rng.standard_normal(shape).astype(dtype) for shape in ((3, 5, 7), (7,), (0, 7))]
    gram = cubin.Gram(7)
    for batch in batches:
        assert gram.add(xp.asarray(batch)) is gram
    vectors = np.concatenate([batch.reshape(-1, 7) for batch in batches])
    wanted = outer_products(vectors)
    assert gram.count == len(vectors) == 16
    assert type(gram.matrix) is type(xp.zeros(1))
    assert gram.matrix.dtype == np.float64
    np.testing.assert_allclose(host(gram.matrix), wanted, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(host(gram.diagonal()), np.diag(wanted), rtol=1e-13)


def test_subnormal_inputs_count_on_a_device_too(xp, host):
    tiny = np.full((2, 3), 1e-40, np.float32)
    gram = cubin.Gram(3).add(xp.asarray(tiny))
    np.testing.assert_allclose(host(gram.matrix), float(tiny[0, 0]) ** 2, rtol=1e-14)


def test_views_of_every_kind(rng):
    x = rng.standard_normal((6, 8))
    for view in (x[::2, ::-1], x.T[:4].T[:, ::2], np.broadcast_to(x[0], (5, 8)), x.T[:, :3]):
        gram = cubin.Gram(view.shape[1]).add(view)
        np.testing.assert_allclose(gram.matrix, outer_products(view), atol=1e-14)


def test_nothing_added():
    gram = cubin.Gram(3)
    assert (gram.count, gram.matrix.tolist(), gram.diagonal().tolist()) == (
        0,
        [[0.0] * 3] * 3,
        [0.0] * 3,
    )


def test_sums_of_workers(xp, host, rng):
    x = rng.standard_normal((10, 4))
    parts = [cubin.Gram(4).add(xp.asarray(x[:3])), cubin.Gram(4).add(xp.asarray(x[3:]))]
    both = parts[0] + parts[1] + cubin.Gram(4)
    assert both.count == 10
    np.testing.assert_allclose(host(both.matrix), outer_products(x), rtol=1e-13, atol=1e-14)
    before = host(parts[0].matrix)
    parts[1].add(xp.asarray(x))
    np.testing.assert_array_equal(host(parts[0].matrix), before)
    with pytest.raises(ValueError, match="4 and of 5 inputs"):
        parts[0] + cubin.Gram(5)
    for not_zero in (1, 0.0, None):
        with pytest.raises(TypeError):
            parts[0] + not_zero
        with pytest.raises(TypeError):
            not_zero + parts[0]
    total = sum(parts)
    np.testing.assert_array_equal(host(total.matrix), host((parts[0] + parts[1]).matrix))
    assert sum(parts[:1]) is not parts[0]


@given(st.data())
def test_convolutions(data):
    draw = data.draw
    small = st.integers(1, 3)
    kernel, stride = draw(st.tuples(small, small)), draw(st.tuples(small, small))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    height, width = (
        draw(st.integers(max(1, k - 2 * p), 6)) for k, p in zip(kernel, padding, strict=True)
    )
    shape = (draw(st.integers(0, 3)), draw(small), height, width)
    x = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape)
    gram = cubin.Gram.of_conv(x, kernel, stride, padding)
    seen = patches(x, kernel, stride, padding)
    assert gram.count == len(seen)
    np.testing.assert_allclose(gram.matrix, outer_products(seen), atol=1e-13)


def test_convolutions_on_both_libraries_in_blocks(xp, host, rng, monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK", 200)
    x = rng.standard_normal((5, 2, 6, 5)).astype(np.float32)
    gram = cubin.Gram.of_conv(xp.asarray(x), 3, stride=2, padding=1)
    seen = patches(x, (3, 3), (2, 2), (1, 1))
    assert gram.count == len(seen)
    np.testing.assert_allclose(host(gram.matrix), outer_products(seen), atol=1e-13)


def test_a_bad_batch_leaves_the_sums_as_they_were(rng):
    gram = cubin.Gram(3).add(rng.standard_normal((4, 3)))
    before, count = gram.matrix, gram.count
    for bad in (np.nan, np.inf, 1e200):
        x = np.ones((5, 3))
        x[2, 1] = bad
        with pytest.raises(ValueError, match="x must be finite"):
            gram.add(x)
    for wrong in (np.ones((2, 4)), np.float64(1)):
        with pytest.raises(ValueError, match="last axis must have length 3"):
            gram.add(wrong)
    with pytest.raises(TypeError, match="x must be"):
        gram.add(np.ones((2, 3), int))
    np.testing.assert_array_equal(gram.matrix, before)
    assert gram.count == count


def test_libraries_do_not_mix(device):
    gram = cubin.Gram(2).add(np.ones((1, 2)))
    with pytest.raises(TypeError, match="x is a CuPy array"):
        gram.add(device.ones((1, 2)))
    with pytest.raises(TypeError, match="other is a CuPy array"):
        gram + cubin.Gram(2).add(device.ones((1, 2)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 2, 2)), 1), ValueError, "four|axes batch"),
        ((np.ones((1, 1, 2, 2)), 3), ValueError, "larger than the padded"),
        (
            (np.ones((1, 1, 2, 2)), 0),
            ValueError,
            "kernel must be one or two",
        ),
        ((np.ones((1, 1, 2, 2)), (1, 1, 1)), ValueError, "kernel must be one or two integers"),
        (
            (np.ones((1, 1, 2, 2)), 1, 0),
            ValueError,
            "stride must be one .* at least 1",
        ),
        (
            (np.ones((1, 1, 2, 2)), 1, 1, -1),
            ValueError,
            "padding must be one .* at least 0",
        ),
        ((np.ones((1, 1, 2, 2)), 1.0), TypeError, "kernel must be an integer"),
        ((np.ones((1, 1, 2, 2), int), 1), TypeError, "x must be"),
    ],
)
def test_bad_arguments_of_convolutions(arguments, error, message):
    with pytest.raises(error, match=message):
        cubin.Gram.of_conv(*arguments)


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_bad_numbers_of_inputs(n, error):
    with pytest.raises(error, match="n must be"):
        cubin.Gram(n)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_matrix_of_somebody_else(xp, host, rng, dtype):
    x = rng.standard_normal((4, 6))  # singular
    own = cubin.Gram(6).add(x)
    matrix = own.matrix.astype(dtype)
    matrix[0, 1] *= 1 + 1e-6
    gram = cubin.Gram.from_matrix(xp.asarray(matrix), count=4)
    assert (gram.n, gram.count) == (6, 4)
    assert type(gram.matrix) is type(xp.zeros(1))
    np.testing.assert_allclose(host(gram.matrix), own.matrix, rtol=2e-6)
    np.testing.assert_array_equal(host(gram.matrix), host(gram.matrix).T)
    both = gram + cubin.Gram(6).add(xp.asarray(x[:2]))
    twice = cubin.Gram(6).add(x).add(x[:2])
    np.testing.assert_allclose(host(both.matrix), twice.matrix, rtol=2e-6)


def test_the_scale_of_a_matrix_does_not_matter(rng):
    x, w = rng.standard_normal((40, 8)), rng.standard_normal((4, 8))
    own = cubin.Gram(8).add(x)
    given = cubin.Gram.from_matrix(2 * own.matrix)  # as Hessians of squares are
    options = {"channel_axis": 0, "solver": "alternating"}
    codes = [cubin.quantize(w, 2, gram=gram, **options) for gram in (own, given)]
    assert codes[0] == codes[1]
    errors = [cubin.errors.output_mse(w, codes[0].dequantize(), gram) for gram in (own, given)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)


def test_matrices_that_are_none():
    upper = np.triu(np.ones((3, 3)))
    for wrong, error, message in [
        (np.ones((2, 3)), ValueError, r"square, got the shape \(2, 3\)"),
        (np.ones((2, 2, 2)), ValueError, "square"),
        (np.ones((0, 0)), ValueError, "square"),
        (np.float64(1), ValueError, "square"),
        (np.ones((2, 2), int), TypeError, "matrix must be float16"),
        (np.full((2, 2), np.nan), ValueError, "matrix must be finite"),
        (-np.eye(2), ValueError, "negative mean square"),
        (upper, ValueError, "both of its triangles"),
    ]:
        with pytest.raises(error, match=message):
            cubin.Gram.from_matrix(wrong)
    for count, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="count must be"):
            cubin.Gram.from_matrix(np.eye(2), count)


def test_files(tmp_path, rng):
    gram = cubin.Gram(3).add(rng.standard_normal((4, 3)))
    gram.save(tmp_path / "gram.any")
    cubin.Gram(2).save(tmp_path / "empty")
    for copy in (cubin.Gram.load(tmp_path / "gram.any"), pickle.loads(pickle.dumps(gram))):
        assert (copy.n, copy.count) == (3, 4)
        np.testing.assert_array_equal(copy.matrix, gram.matrix)
    assert cubin.Gram.load(tmp_path / "empty").count == 0
    with pytest.raises(FileNotFoundError):
        cubin.Gram.load(tmp_path / "none")


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "gram"
    cubin.Gram(2).add(np.eye(2)).save(path)

    def half(file, **members):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="full"):
        cubin.Gram(2).add(np.ones((3, 2))).save(path)
    monkeypatch.undo()
    assert cubin.Gram.load(path).count == 2
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="regular file"):
        cubin.Gram(2).save(tmp_path)


def test_damaged_files_are_refused(tmp_path, rng):
    path = tmp_path / "gram.npz"
    cubin.Gram(3).add(rng.standard_normal((4, 3))).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no Gram matrix"):
        cubin.Gram.load(path)
    bad = [
        {"sum": np.ones((2, 3)), "count": np.int64(1)},
        {"sum": np.ones((2, 2), np.float32), "count": np.int64(1)},
        {"sum": np.full((2, 2), np.nan), "count": np.int64(1)},
        {"sum": np.ones((2, 2)), "count": np.int64(-1)},
        {"sum": np.ones((2, 2)), "count": np.array([1])},
        {"sum": np.ones((2, 2))},
        {"sum": np.array([[None]]), "count": np.int64(1)},
    ]
    for members in bad:
        np.savez(path, **members)
        with pytest.raises(ValueError, match="is no Gram matrix"):
            cubin.Gram.load(path)


def test_output_error_is_that_of_the_outputs(xp, rng):
    inputs = rng.standard_normal((50, 6))
    for shape in ((4, 6), (4, 2, 3, 1), (0, 6)):
        w = rng.standard_normal(shape).astype(np.float32)
        approx = w + rng.standard_normal(shape).astype(np.float32)
        gram = cubin.Gram(6).add(xp.asarray(inputs))
        error = cubin.errors.output_mse(xp.asarray(w), xp.asarray(approx), gram)
        assert (error.shape, error.dtype) == ((), np.float64)
        lines, others = (a.reshape(-1, 6).astype(np.float64) for a in (w, approx))
        outputs, changed = inputs @ lines.T, inputs @ others.T
        wanted = ((outputs - changed) ** 2).sum() / (outputs**2).sum() if w.size else 0.0
        assert float(error) == pytest.approx(wanted, rel=1e-12)


def test_output_error_of_bad_arguments(rng):
    w, gram = np.ones((2, 3)), cubin.Gram(3)
    with pytest.raises(ValueError, match="3 elements in a line"):
        cubin.errors.output_mse(np.ones((2, 4)), np.ones((2, 4)), gram)
    with pytest.raises(ValueError, match="at least two axes"):
        cubin.errors.output_mse(np.ones(3), np.ones(3), gram)
    with pytest.raises(ValueError, match="approx has shape"):
        cubin.errors.output_mse(w, np.ones((3, 3)), gram)
    with pytest.raises(TypeError, match=r"gram must be a cubin\.Gram"):
        cubin.errors.output_mse(w, w, np.eye(3))
    with pytest.raises(ValueError, match="gram has no inputs"):
        cubin.errors.output_mse(w, w, gram)
    with pytest.raises(ValueError, match="gram has no inputs"):
        cubin.quantize(w, 1, channel_axis=0, solver="refined", gram=gram)
    assert float(cubin.errors.output_mse(w, w, gram.add(np.zeros((1, 3))))) == 0.0
