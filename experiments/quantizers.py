"""What others quantize weights with, as short functions from the equations of their papers.

Each takes weights (m, n), float64, and gives the values that it stores them as, with the bits per
weight that they take: codes, maps, scales and zeros. Scales, levels and zeros that are not
integers are rounded to float16 and cost 16 bits. Groups are runs of `group` columns within a row,
the last of which may be shorter; None is the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.stats

SCALE_BITS = 16
DAMPING = 0.01
"""What GPTQ adds to the Gram matrix, as a share of its mean diagonal."""


@dataclass(frozen=True)
class Quantized:
    """What weights are stored as.

    Attributes
    ----------
    values : array, shape (m, n)
    bits : float
        Per weight, with all that is stored.
    """

    values: np.ndarray
    bits: float


def half(x: np.ndarray) -> np.ndarray:
    """Round to float16, to no less than its least normal number where x is positive."""
    least = float(np.finfo(np.float16).tiny)
    return np.where(x > 0, np.maximum(x, least), x).astype(np.float16).astype(np.float64)


def entropy(symbols: np.ndarray) -> float:
    """The empirical entropy of symbols, in bits."""
    counts = np.unique(symbols, return_counts=True)[1]
    share = counts / counts.sum()
    return abs(float(-(share * np.log2(share)).sum()))


def groups(n: int, group: int | None) -> list[slice]:
    """The columns of each group."""
    step = group or n
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def by_groups(
    w: np.ndarray, group: int | None, fit: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, float]:
    """The values that `fit` gives for each group of all rows, and the groups per weight."""
    cuts = groups(w.shape[1], group)
    return np.hstack([fit(w[:, cut]) for cut in cuts]), len(cuts) / w.shape[1]


# ---------------------------------------------------------------- integers


def uniform_grid(w: np.ndarray, bits: int, clipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and integer zero of each row, (m, 1), whose levels reach from its least to its largest.

    With `clipped` the range is shrunk by that of 80 factors, 1 to 0.21, which has the least squared
    error, as in GPTQ's code. The range has 0 in it.
    """
    top = 2**bits - 1
    low = np.minimum(w.min(axis=1, keepdims=True), 0)
    high = np.maximum(w.max(axis=1, keepdims=True), 0)
    best = np.full(low.shape, np.inf)
    scale, zero = np.ones(low.shape), np.zeros(low.shape)
    for shrink in 1 - np.arange(80 if clipped else 1) / 100:
        tried = half(shrink * (high - low) / top)
        tried[tried == 0] = 1
        offset = np.clip(np.round(-shrink * low / tried), 0, top)
        off = w - on_grid(w, tried, offset, bits)
        error = (off * off).sum(axis=1, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        scale, zero = np.where(better, tried, scale), np.where(better, offset, zero)
    return scale, zero


def on_grid(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of the levels scale * (q - zero), q = 0 .. 2^bits - 1."""
    return (np.clip(np.round(w / scale + zero), 0, 2**bits - 1) - zero) * scale


def round_to_nearest(
    w: np.ndarray, bits: int, group: int | None, clipped: bool = False
) -> Quantized:
    """Integers with a scale and an integer zero for each group, with or without a search for it."""

    def fit(part: np.ndarray) -> np.ndarray:
        return on_grid(part, *uniform_grid(part, bits, clipped), bits)

    values, each = by_groups(w, group, fit)
    return Quantized(values, bits + each * (SCALE_BITS + bits))


def inverse_factor(gram: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped Gram matrix."""
    damped = gram + (DAMPING * np.diagonal(gram).mean() or 1.0) * np.eye(len(gram))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def gptq(w: np.ndarray, gram: np.ndarray, bits: int, group: int | None) -> Quantized:
    """GPTQ: integers column by column, errors carried on to the columns that follow.

    Columns come by falling diagonal of the Gram matrix. The grids are those of `round_to_nearest`
    with a search for the range, found before the first column is rounded ("static groups").

    References
    ----------
    .. [1] E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
       Transformers", ICLR 2023, arXiv:2210.17323.
    """
    n = w.shape[1]
    cuts = groups(n, group)
    grids = [uniform_grid(w[:, cut], bits, clipped=True) for cut in cuts]
    order = np.argsort(-np.diagonal(gram), kind="stable")
    factor = inverse_factor(gram[np.ix_(order, order)])
    rest, values = w[:, order], np.empty(w.shape)
    for place, column in enumerate(order):
        grid = grids[column // (group or n)]
        own = rest[:, place : place + 1]
        rounded = on_grid(own, *grid, bits)
        values[:, column] = rounded[:, 0]
        rest[:, place + 1 :] -= (
            (own - rounded) / factor[place, place] * factor[place : place + 1, place + 1 :]
        )
    return Quantized(values, bits + len(cuts) / n * (SCALE_BITS + bits))


def hqq(
    w: np.ndarray, bits: int, group: int | None, p: float = 0.7, iterations: int = 20
) -> Quantized:
    r"""Half-quadratic quantization: integers, whose zero is fitted in the norm l_p.

    With the scale s of the range fixed, the zero z minimises :math:`\sum |w - s (q - z)|^p`. An
    auxiliary error e splits the problem: e is a generalised soft threshold of the error, and z the
    mean of :math:`q - (w - e) / s`; the threshold's weight grows. Of all zeros on the way each
    group keeps the best.

    References
    ----------
    .. [1] H. Badri, A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
       https://mobiusml.github.io/hqq_blog.
    """
    top = 2**bits - 1

    def fit(part: np.ndarray) -> np.ndarray:
        low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        scale = half((high - low) / top)
        scale[scale == 0] = 1
        zero = half(-low / scale)
        best, values, beta = np.full(low.shape, np.inf), np.zeros(part.shape), 10.0
        for _ in range(iterations + 1):
            codes = np.clip(np.round(part / scale + zero), 0, top)
            tried = (codes - half(zero)) * scale
            off = part - tried
            size = np.abs(off)
            error = (size**p).sum(axis=1, keepdims=True)
            values, best = np.where(error < best, tried, values), np.minimum(best, error)
            # The threshold of an error of 0 is infinite: it stays 0.
            threshold = np.power(size, p - 1, out=np.zeros(size.shape), where=size > 0) / beta
            auxiliary = np.sign(off) * np.maximum(size - threshold, 0)
            zero = (codes - (part - auxiliary) / scale).mean(axis=1, keepdims=True)
            beta *= 1.01
        return values

    values, each = by_groups(w, group, fit)
    return Quantized(values, bits + each * 2 * SCALE_BITS)


# ---------------------------------------------------------------- levels


def normal_float() -> np.ndarray:
    """The 16 levels of NF4: quantiles of a Gaussian, with a level at 0, from -1 to 1.

    References
    ----------
    .. [1] T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023,
       arXiv:2305.14314.
    """
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    positive = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate((negative, [0.0], positive)))
    return levels / levels.max()


def nf4(w: np.ndarray, group: int | None) -> Quantized:
    """NF4: the nearest level times the largest magnitude of the group."""
    levels = normal_float()
    middle = (levels[1:] + levels[:-1]) / 2

    def fit(part: np.ndarray) -> np.ndarray:
        scale = half(np.abs(part).max(axis=1, keepdims=True))
        scale[scale == 0] = 1
        return levels[np.searchsorted(middle, part / scale)] * scale

    values, each = by_groups(w, group, fit)
    return Quantized(values, 4 + each * SCALE_BITS)


def kmeans(w: np.ndarray, bits: int, iterations: int = 200) -> Quantized:
    """2^bits free levels for each row by Lloyd's algorithm, from its quantiles on.

    References
    ----------
    .. [1] S. Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory
       28, 1982.
    """
    count = 2**bits
    shares = (np.arange(count) + 0.5) / count
    levels = np.quantile(w, shares, axis=1).T
    for _ in range(iterations):
        codes = nearest(w, levels)
        # One bin for each level of each row.
        bins = codes + count * np.arange(len(w))[:, None]
        members = np.bincount(bins.ravel(), minlength=levels.size).reshape(levels.shape)
        sums = np.bincount(bins.ravel(), w.ravel(), levels.size).reshape(levels.shape)
        means = np.divide(sums, members, out=levels.copy(), where=members > 0)
        if np.array_equal(means, levels):
            break
        levels = means
    stored = levels.astype(np.float16).astype(np.float64)
    values = np.take_along_axis(stored, nearest(w, stored), axis=1)
    return Quantized(values, bits + count * SCALE_BITS / w.shape[1])


def nearest(w: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """For each weight the number of the nearest of its row's ascending levels."""
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    return sum((w > middle[:, i : i + 1]).astype(np.int64) for i in range(middle.shape[1]))


# ---------------------------------------------------------------- signs


def lsbq(w: np.ndarray, bits: int, group: int | None) -> Quantized:
    """Least squares binary quantization with 1 or 2 signs for each weight.

    With 1 the scale is the mean magnitude. With 2 the levels are v1 + v2 and v1 - v2 and their
    negatives, between which |w| is divided at v1: the best division of the sorted magnitudes.

    References
    ----------
    .. [1] H. Pouransari, Z. Tu, O. Tuzel, "Least squares binary quantization of neural networks",
       CVPR Workshops 2020, arXiv:2001.02786.
    """

    def one(part: np.ndarray) -> np.ndarray:
        return np.where(part > 0, 1, -1) * half(np.abs(part).mean(axis=1, keepdims=True))

    def two(part: np.ndarray) -> np.ndarray:
        size = np.sort(np.abs(part), axis=1)
        count, length = np.arange(1, size.shape[1] + 1), size.shape[1]
        below = size.cumsum(axis=1)
        above = below[:, -1:] - below
        rest = np.maximum(length - count, 1)
        best = (below**2 / count + above**2 / rest).argmax(axis=1)[:, None]
        low = np.take_along_axis(below / count, best, axis=1)
        high = np.take_along_axis(above / rest, best, axis=1)
        high = np.where(best == length - 1, low, high)
        first, second = half((high + low) / 2), half((high - low) / 2)
        sign = np.where(part > 0, 1, -1)
        return sign * (first + np.where(np.abs(part) > first, second, -second))

    values, each = by_groups(w, group, {1: one, 2: two}[bits])
    return Quantized(values, bits + each * bits * SCALE_BITS)


def lsbq_ternary(w: np.ndarray, group: int | None) -> Quantized:
    """LSBQ with 2 equal scales: levels -2v, 0 and 2v, divided at v. Codes cost their entropy."""

    def fit(part: np.ndarray) -> np.ndarray:
        size = np.sort(np.abs(part), axis=1)[:, ::-1]
        sums, count = size.cumsum(axis=1), np.arange(1, size.shape[1] + 1)
        best = (sums**2 / count).argmax(axis=1)[:, None]
        scale = half(np.take_along_axis(sums / count, best, axis=1))
        kept = np.abs(part) >= np.take_along_axis(size, best, axis=1)
        return np.sign(part) * kept * scale

    values, each = by_groups(w, group, fit)
    return Quantized(values, entropy(np.sign(values)) + each * SCALE_BITS)


def billm(w: np.ndarray, gram: np.ndarray, block: int = 128) -> Quantized:
    """BiLLM in short: salient columns have two signs for each weight, all others one of two scales.

    Columns are salient by the sum of :math:`w^2 / [H^{-1}]_{jj}^2`. Their second sign is that of
    the residual. The others are divided by magnitude, at a break for the block. How many columns
    are salient and where the break lies is searched for; the errors of a block are carried on to
    the columns that follow. All maps are counted, the division by its entropy.

    References
    ----------
    .. [1] W. Huang et al., "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs", ICML
       2024, arXiv:2402.04291.
    """
    factor = inverse_factor(gram)
    inverse = (factor * factor).sum(axis=0)
    rest, values, stored = w.copy(), np.empty(w.shape), 0.0
    for cut in groups(w.shape[1], block):
        part = rest[:, cut]
        falling = np.argsort(-((part * part).sum(axis=0) / inverse[cut] ** 2), kind="stable")
        counts = [count for count in (0, 1, 2, 4, 8, 16, 32) if count < part.shape[1]]
        tried = [_billm_block(part, falling[:count]) for count in counts]
        best, bits = min(tried, key=lambda found: float(((part - found[0]) ** 2).sum()))
        values[:, cut] = best
        stored += bits
        carried = (part - best) / np.diagonal(factor)[cut]
        rest[:, cut.stop :] -= carried @ factor[cut, cut.stop :]
    return Quantized(values, stored / w.size)


def _billm_block(part: np.ndarray, salient: np.ndarray) -> tuple[np.ndarray, float]:
    """The values of a block with these salient columns, and the bits of all of it."""
    lines, length = part.shape
    values = np.empty(part.shape)
    chosen = np.zeros(length, bool)
    chosen[salient] = True
    first = _signs(part[:, chosen], np.ones((lines, len(salient)), bool))
    second = _signs(part[:, chosen] - first, np.ones(first.shape, bool))
    values[:, chosen] = first + second
    others = part[:, ~chosen]
    size, best, divided = np.abs(others), np.inf, others
    outer = np.zeros(others.shape, bool)
    for share in np.arange(1, 10) / 10:
        tried = size > share * size.max()
        found = _signs(others, tried) + _signs(others, ~tried)
        error = float(((others - found) ** 2).sum())
        if error < best:
            best, divided, outer = error, found, tried
    values[:, ~chosen] = divided
    scales = lines * SCALE_BITS * (4 if len(salient) else 2)
    signs = lines * (length + len(salient)) + others.size * entropy(outer)
    return values, signs + scales + length * entropy(chosen)


def _signs(w: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Signs times the mean magnitude of the row where the mask is, else 0."""
    count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    scale = half((np.abs(w) * mask).sum(axis=1, keepdims=True) / count)
    return np.where(w > 0, 1, -1) * scale * mask


# ---------------------------------------------------------------- limit


def entropy_coded(w: np.ndarray, bits: float) -> Quantized:
    """Uniform rounding, each cell stored as its mean, at the entropy `bits` of all codes together.

    Nothing is counted for the cells' means. With fine steps it comes within pi e / 6 of Shannon's
    limit, a quarter of a bit.
    """
    low, high = 0.0, float(np.abs(w).max()) * 4
    for _ in range(40):
        step = (low + high) / 2
        low, high = (step, high) if entropy(np.round(w / step)) > bits else (low, step)
    codes = np.unique(np.round(w / high), return_inverse=True)[1].reshape(w.shape)
    means = np.bincount(codes.ravel(), w.ravel()) / np.bincount(codes.ravel())
    return Quantized(means[codes], entropy(codes))
