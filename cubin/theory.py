"""What binary codes can be expected to achieve on a law: error and scales by integration.

Every code here has levels symmetric about zero, so only the law of the magnitude |x| matters: its
density is ``pdf(m) + pdf(-m)``, and an asymmetric law is treated exactly like its symmetrised twin.
The density is turned once into a piecewise polynomial, in units of the root mean square of x;
thereafter the probability and the partial moments of a cell are evaluations of antiderivatives.
The relative errors returned are accurate to about 1e-12 of the power E[x^2] for smooth densities.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy import interpolate, linalg, special, stats

__all__ = [
    "ExpectedLevels",
    "ExpectedScales",
    "alternating",
    "greedy",
    "lloyd_max",
    "optimal",
    "refined",
    "shannon",
    "uniform",
]

_MAX_BITS = 16
_MAX_SEARCHED_BITS = 8

# Shares of the total probability and power.
_RESOLVED = 1e-14
_ROUNDING = 1e-15
_UNTRUSTWORTHY = 1e-6
_MAX_BISECTIONS = 1000
# A search goes on while a step lowers the error by more than this share.
_SETTLED = 1e-12
# Share by which a round of alternating lowers the error once it is close to its limit.
_NEARBY = 1e-3
# In the search for the best scales: how many starts of each kind are optimized, how many of the
# results are extended by a scale, and how many quasi-random starts are compared first.
_TRIED = 12
_KEPT = 5
_SPREAD = 256

_ORDER = 12
_NODES, _WEIGHTS = special.roots_legendre(_ORDER)
_FRACTIONS = (_NODES + 1) / 2
_TO_BERNSTEIN = np.linalg.inv(
    special.binom(_ORDER - 1, np.arange(_ORDER))
    * _FRACTIONS[:, None] ** np.arange(_ORDER)
    * (1 - _FRACTIONS[:, None]) ** np.arange(_ORDER - 1, -1, -1)
)
# The two highest Legendre coefficients of an interpolant tell how well it is resolved.
_LAST_DEGREES = np.array([_ORDER - 2, _ORDER - 1])
_TO_LAST_LEGENDRE = (
    (_LAST_DEGREES + 0.5)
    * _WEIGHTS[:, None]
    * special.eval_legendre(_LAST_DEGREES, _NODES[:, None])
)


@dataclass(frozen=True, eq=False)
class _Expected:
    relative_mse: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, ``-10 log10(relative_mse)``, in decibels."""
        return -10 * math.log10(self.relative_mse)


@dataclass(frozen=True, eq=False)
class ExpectedScales(_Expected):
    """Expected error of a binary code and its scales.

    Attributes
    ----------
    relative_mse : float
        ``E[(x - q(x))^2] / E[x^2]``, without unit.
    scales : numpy.ndarray
        float64 of shape (bits,), in the unit of x: the scale of each level.
    """

    scales: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """The ``2^bits`` sums ``+-a_0 +- a_1 ...``, ascending, in the unit of x."""
        return np.sort(_codes(len(self.scales)) @ self.scales)


@dataclass(frozen=True, eq=False)
class ExpectedLevels(_Expected):
    """Expected error of a scalar quantizer and its levels.

    Attributes
    ----------
    relative_mse : float
        ``E[(x - q(x))^2] / E[x^2]``, without unit.
    levels : numpy.ndarray
        float64 of shape (2^bits,), ascending, in the unit of x.
    """

    levels: np.ndarray


def greedy(distribution: Any, bits: int) -> ExpectedScales:
    r"""Expected error of the greedy multibit code.

    Parameters
    ----------
    distribution : frozen scipy.stats continuous distribution
        The law of x, with finite variance, for instance ``scipy.stats.laplace(scale=0.1)``.
    bits : int
        Number of levels k, 1 to 16.

    Returns
    -------
    ExpectedScales

    Raises
    ------
    TypeError
        If `distribution` is not a frozen continuous distribution or `bits` is not an integer.
    ValueError
        If the variance is not finite and positive, the parameters are arrays, the density defies
        integration, or `bits` is out of range.

    Notes
    -----
    :math:`a_i = E|r_i|`, :math:`b_i = \operatorname{sign} r_i`, :math:`r_{i+1} = r_i - a_i b_i`,
    with :math:`r_0 = x`. The relative error is :math:`1 - \sum_i a_i^2 / E[x^2]`. One level is
    XNOR-Net's scale [1]_; several levels are the residual scheme that [2]_ starts from.

    References
    ----------
    .. [1] Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net: ImageNet Classification Using Binary
       Convolutional Neural Networks", ECCV 2016, arXiv:1603.05279.
    .. [2] Guo, Yao, Zhao, Chen, "Network Sketching: Exploiting Binary Structure in Deep CNNs",
       CVPR 2017, arXiv:1706.02021.
    """
    law, bits = _checked(distribution, bits)
    return _greedy(law, bits).expected()


def refined(distribution: Any, bits: int) -> ExpectedScales:
    r"""Expected error of the greedy code whose scales are refitted after each new level.

    Parameters
    ----------
    distribution : frozen scipy.stats continuous distribution
        The law of x, with finite variance.
    bits : int
        Number of levels k, 1 to 16.

    Returns
    -------
    ExpectedScales

    Raises
    ------
    TypeError, ValueError
        As :func:`greedy`.

    Notes
    -----
    After each sign :math:`b_i = \operatorname{sign} r_i` all scales so far are refitted by least
    squares, :math:`(a_0 \dots a_i) = E[b b^T]^{-1} E[b x]` with :math:`b = (b_0 \dots b_i)`, the
    signs being kept, and :math:`r_{i+1} = x - \sum_{j \le i} a_j b_j` [1]_ (equation 5 of [2]_).

    References
    ----------
    .. [1] Guo, Yao, Zhao, Chen, "Network Sketching", CVPR 2017, arXiv:1706.02021.
    .. [2] Xu, Yao, Lin, Ou, Cao, Wang, Zha, "Alternating Multi-bit Quantization for Recurrent
       Neural Networks", ICLR 2018, arXiv:1802.00150.
    """
    law, bits = _checked(distribution, bits)
    quantizer = _greedy(law, 1)
    for _ in range(1, bits):
        quantizer = quantizer.with_next_sign()
        quantizer = quantizer.with_scales(quantizer.least_squares_scales())
    return quantizer.expected()


def alternating(distribution: Any, bits: int, *, iterations: int | None = 2) -> ExpectedScales:
    r"""Expected error of alternating between codes and scales, from the greedy codes on.

    Parameters
    ----------
    distribution : frozen scipy.stats continuous distribution
        The law of x, with finite variance.
    bits : int
        Number of levels k, 1 to 8.
    iterations : int, optional
        How often the codes are renewed, 2 by default as in `cubin.quantize`; None goes on until
        the error stops falling. 0 leaves the greedy codes with their least-squares scales.

    Returns
    -------
    ExpectedScales
        The scales descending.

    Raises
    ------
    TypeError, ValueError
        As :func:`greedy`; also if `iterations` is not an integer, or negative.

    Notes
    -----
    One iteration gives each x the nearest of the :math:`2^k` sums :math:`\sum_i \pm a_i`, then
    refits the scales, :math:`a = E[b b^T]^{-1} E[b x]` [1]_. Neither step can raise the error, and
    the result is a local optimum: see :func:`optimal` for the best of several starts.

    References
    ----------
    .. [1] Xu, Yao, Lin, Ou, Cao, Wang, Zha, "Alternating Multi-bit Quantization for Recurrent
       Neural Networks", ICLR 2018, arXiv:1802.00150.
    """
    if iterations is not None:
        iterations = _checked_integer(iterations, "iterations", "a non-negative int or None")
        if iterations < 0:
            raise ValueError(f"iterations must be a non-negative int or None, got {iterations}")
    law, bits = _checked(distribution, bits, _MAX_SEARCHED_BITS)
    if iterations is None:
        return _converged(law, bits).expected(descending=True)
    quantizer = _greedy(law, bits)
    for _ in range(iterations):
        quantizer = _NearestSums(law, _codes(bits), quantizer.least_squares_scales())
    return quantizer.with_scales(quantizer.least_squares_scales()).expected(descending=True)


def optimal(distribution: Any, bits: int) -> ExpectedScales:
    """Expected error of the best k scales found, every x taking the nearest of the 2^k sums.

    Parameters
    ----------
    distribution : frozen scipy.stats continuous distribution
        The law of x, with finite variance.
    bits : int
        Number of levels k, 1 to 8.

    Returns
    -------
    ExpectedScales
        The scales descending.

    Raises
    ------
    TypeError, ValueError
        As :func:`greedy`.

    Notes
    -----
    The error has many local minima from three levels on. This is the best of the local minima
    reached by Newton's method from the converged point of :func:`alternating`, from the optimal
    uniform scales, from scales of quasi-random ratios, and from the best scales with one level
    less; no proof of global optimality comes with it. It lies between :func:`lloyd_max` and
    :func:`uniform`, and takes seconds at 8 bits.
    """
    law, bits = _checked(distribution, bits, _MAX_SEARCHED_BITS)
    from_uniform = _NearestSums(law, _codes(bits), _uniform(law, bits).scales * _halvings(bits))
    optima = (_converged(law, bits), _settled(from_uniform), _searched(law, bits))
    return min(optima, key=_Quantizer.by_error).expected(descending=True)


def uniform(distribution: Any, bits: int) -> ExpectedScales:
    r"""Expected error of the best uniform quantizer: scales in ratio 2.

    Parameters
    ----------
    distribution : frozen scipy.stats continuous distribution
        The law of x, with finite variance.
    bits : int
        Number of levels k, 1 to 16.

    Returns
    -------
    ExpectedScales

    Raises
    ------
    TypeError, ValueError
        As :func:`greedy`.

    Notes
    -----
    The :math:`2^k` levels are the odd multiples of half a step, :math:`\sum_i \pm a_i` with
    :math:`a_i = 2^{k-2-i} \Delta`; every x takes the nearest, and the step :math:`\Delta` minimises
    the error (the equally spaced case of [1]_). For the uniform law on (-1, 1) this is optimal
    among all codes: :math:`4^{-k}`.

    References
    ----------
    .. [1] Max, "Quantizing for Minimum Distortion", IRE Transactions on Information Theory 6,
       1960.
    """
    law, bits = _checked(distribution, bits)
    quantizer = _uniform(law, bits)
    return ExpectedScales(quantizer.error, quantizer.scales * _halvings(bits) * law.unit)


def lloyd_max(distribution: Any, bits: int) -> ExpectedLevels:
    r"""Expected error of the best scalar quantizer with 2^k levels symmetric about zero.

    Parameters
    ----------
    distribution : frozen scipy.stats continuous distribution
        The law of x, with finite variance.
    bits : int
        Number of bits k, 1 to 16.

    Returns
    -------
    ExpectedLevels

    Raises
    ------
    TypeError, ValueError
        As :func:`greedy`.

    Notes
    -----
    Each level is the mean of its cell, each threshold the midpoint of two levels [1]_ [2]_. Solved
    by Newton's method on the levels, whose Hessian is tridiagonal, from the companding start of
    density proportional to :math:`f^{1/3}`; where a Newton step would not lower the error, Lloyd's
    step is taken. The solution is unique if the density of |x| is log-concave; for other laws it
    is a local optimum. No choice of k scales can have a smaller error than the best 2^k levels.

    References
    ----------
    .. [1] Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory 28,
       1982.
    .. [2] Max, "Quantizing for Minimum Distortion", IRE Transactions on Information Theory 6,
       1960.
    """
    law, bits = _checked(distribution, bits)
    quantizer = _lloyd_max(law, bits)
    levels = np.concatenate((-quantizer.levels[::-1], quantizer.levels)) * law.unit
    return ExpectedLevels(quantizer.error, levels)


def shannon(distribution: Any, bits: int) -> float:
    r"""Shannon's lower bound on the relative error of any code, however long its blocks.

    Parameters
    ----------
    distribution : frozen scipy.stats continuous distribution
        The law of x, with finite variance. An asymmetric law is replaced by its symmetrised twin,
        as everywhere in this module: the bound holds for codes with symmetric levels.
    bits : int
        Bits per element k, 1 to 16.

    Returns
    -------
    float
        Lower bound on the relative error.

    Raises
    ------
    TypeError, ValueError
        As :func:`greedy`.

    Notes
    -----
    :math:`\frac{e^{2h}}{2 \pi e \, E[x^2]} 4^{-k}` with the differential entropy
    :math:`h = -\int f \ln f` in nats [1]_ [2]_. For a Gaussian of mean 0 that is :math:`4^{-k}`,
    and it is reached; for other laws the bound is smaller and in general not reached.

    References
    ----------
    .. [1] Shannon, "Coding Theorems for a Discrete Source with a Fidelity Criterion", IRE National
       Convention Record 7, 1959.
    .. [2] Cover, Thomas, "Elements of Information Theory", 2nd edition, Wiley, 2006, chapter 10.
    """
    law, bits = _checked(distribution, bits)
    # The symmetrised law has half the magnitude's density on either side, hence one bit more.
    entropy = law.magnitude_entropy() + math.log(2)
    return math.exp(2 * entropy - math.log(2 * math.pi * math.e) - bits * math.log(4))


def _checked_integer(value: Any, name: str, wanted: str) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be {wanted}, got the bool {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {wanted}, got {value!r}") from None


def _checked(distribution: Any, bits: Any, max_bits: int = _MAX_BITS) -> tuple[_MagnitudeLaw, int]:
    wanted = f"an int from 1 to {max_bits}"
    bits = _checked_integer(bits, "bits", wanted)
    if not 1 <= bits <= max_bits:
        raise ValueError(f"bits must be {wanted}, got {bits}")
    if not isinstance(getattr(distribution, "dist", None), stats.rv_continuous):
        raise TypeError(
            "distribution must be a frozen scipy.stats continuous distribution, "
            f"such as scipy.stats.norm(), got {type(distribution).__qualname__}"
        )
    return _MagnitudeLaw(distribution), bits


class _MagnitudeLaw:
    """The law of |x| in units of the root mean square, as piecewise polynomial partial moments."""

    def __init__(self, distribution: Any) -> None:
        mean, variance = distribution.stats(moments="mv")
        if np.ndim(mean) or np.ndim(variance):
            raise ValueError(
                "distribution must have scalar parameters, "
                f"got parameters of shape {np.broadcast(mean, variance).shape}"
            )
        if not (np.isfinite(mean) and np.isfinite(variance) and variance > 0):
            raise ValueError(
                "distribution must have a finite positive variance, "
                f"got mean {float(mean)} and variance {float(variance)}"
            )
        self._distribution = distribution
        self.unit = math.hypot(float(mean), math.sqrt(variance))
        with np.errstate(all="ignore"):
            self._edges, values = self._resolved_panels()
        self._widths = np.diff(self._edges)
        self._points = self._edges[:-1, None] + self._widths[:, None] * _FRACTIONS
        self._densities = values
        self._lengths = self._widths[:, None] * _WEIGHTS / 2
        powers = self._points[..., None] ** np.arange(3)
        integrands = values[..., None] * self._widths[:, None, None] * powers
        # Panel i covers [i, i + 1], whatever its width, so that no power of a width is formed.
        coefficients = np.einsum("bn,pnm->bpm", _TO_BERNSTEIN, integrands)
        panels = np.arange(len(self._edges), dtype=float)
        self._derivative = interpolate.BPoly(coefficients, panels)
        self._below = self._derivative.antiderivative()
        # The same from the far end: differences of small sums keep the digits of the tail.
        self._above = interpolate.BPoly(coefficients[::-1, ::-1], panels).antiderivative()
        total = self._below(panels[-1])
        if not np.all(np.abs(total[[0, 2]] - 1) < _UNTRUSTWORTHY):
            raise ValueError(
                f"distribution {distribution.dist.name!r} could not be integrated: its density "
                f"gives a total probability of {total[0]:.9g} and {total[2]:.9g} times E[x^2]"
            )

    @property
    def reach(self) -> float:
        """The largest magnitude, or one beyond which there is practically no power."""
        return self._edges[-1]

    def _magnitude_pdf(self, magnitude: np.ndarray) -> np.ndarray:
        x = magnitude * self.unit
        return (self._distribution.pdf(x) + self._distribution.pdf(-x)) * self.unit

    def _first_edges(self) -> np.ndarray:
        """Panels no wider than the law's features: quantiles, ends of the support, doublings."""
        tails = 10.0 ** np.arange(-15, -1)
        quantiles = np.concatenate(
            (
                self._distribution.ppf(np.concatenate((tails, np.linspace(0.05, 0.95, 19)))),
                self._distribution.isf(tails),
            )
        )
        support = np.asarray(self._distribution.support(), dtype=float)
        ends = np.abs(np.concatenate((quantiles, support))) / self.unit
        doublings = 2.0 ** np.arange(350)
        tail_power = doublings**3 * self._magnitude_pdf(doublings)
        if tail_power[-1] > 1:
            raise ValueError(
                f"distribution {self._distribution.dist.name!r} could not be integrated: "
                "its density does not fall off"
            )
        reached = np.flatnonzero(tail_power > _RESOLVED)
        doublings = doublings[: reached[-1] + 2] if len(reached) else doublings[:1]
        edges = np.concatenate(([0.0], ends[np.isfinite(ends)], doublings))
        edges = np.unique(edges[edges <= np.max(np.abs(support)) / self.unit])
        return edges[np.append(_divisible(edges[:-1], edges[1:]), True)]

    def _resolved_panels(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges of panels on which an interpolating polynomial of the density is exact enough."""
        edges = self._first_edges()
        left, right = edges[:-1], edges[1:]
        done: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(_MAX_BISECTIONS):
            width = right - left
            points = left[:, None] + width[:, None] * _FRACTIONS
            values = self._magnitude_pdf(points)
            integrands = values * width[:, None] * np.maximum(1, points**2)
            unresolved = np.max(np.abs(integrands @ _TO_LAST_LEGENDRE), axis=1)
            middle = (left + right) / 2
            bisected = (unresolved > _RESOLVED) & _divisible(left, right)
            done.append((left[~bisected], values[~bisected]))
            left, middle, right = left[bisected], middle[bisected], right[bisected]
            left, right = np.concatenate((left, middle)), np.concatenate((middle, right))
            if not len(left):
                break
        starts = np.concatenate([panel[0] for panel in done])
        order = np.argsort(starts)
        values = np.concatenate([panel[1] for panel in done])
        return np.append(starts[order], edges[-1]), values[order]

    def _coordinate(self, magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        magnitude = np.minimum(magnitude, self._edges[-1])
        panel = np.searchsorted(self._edges[1:-1], magnitude, side="right")
        return panel, panel + (magnitude - self._edges[panel]) / self._widths[panel]

    def density(self, magnitude: np.ndarray) -> np.ndarray:
        panel, coordinate = self._coordinate(magnitude)
        return self._derivative(coordinate)[:, 0] / self._widths[panel]

    def cell_moments(self, edges: np.ndarray) -> np.ndarray:
        """Integrals of 1, m and m^2 over the cells between the edges, shape (3, cells)."""
        coordinate = self._coordinate(edges)[1]
        tail = min(int(np.searchsorted(edges, 1.0)), len(edges) - 1)
        body_moments = np.diff(self._below(coordinate[: tail + 1]), axis=0)
        tail_moments = -np.diff(self._above(len(self._widths) - coordinate[tail:]), axis=0)
        return np.concatenate((body_moments, tail_moments)).T

    def scanned_mse(self, step: float, n_levels: int) -> float:
        """Roughly the error of a uniform quantizer, from the quadrature's points alone."""
        nearest = (np.minimum(self._points // step, n_levels - 1) + 0.5) * step
        return float(np.sum(self._lengths * self._densities * (self._points - nearest) ** 2))

    def companded_levels(self, n_levels: int) -> np.ndarray:
        """Levels spaced by the cube root of the density, best for many levels (Panter, Dite)."""
        shares = (self._lengths * np.cbrt(self._densities)).ravel()
        cumulative = np.concatenate(([0.0], np.cumsum(shares) - shares / 2, [np.sum(shares)]))
        magnitudes = np.concatenate(([0.0], self._points.ravel(), self._edges[-1:]))
        return np.interp(
            (np.arange(n_levels) + 0.5) / n_levels * cumulative[-1], cumulative, magnitudes
        )

    def magnitude_entropy(self) -> float:
        """Differential entropy of |x| in nats."""
        return float(np.sum(self._lengths * special.entr(self._densities)))


def _divisible(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether nodes between the two are still distinct from them in float64."""
    return right - left > 1024 * np.spacing(right)


class _Quantizer:
    """Levels for the cells of |x| between ascending edges, one more than there are levels."""

    def __init__(self, law: _MagnitudeLaw, edges: np.ndarray, levels: np.ndarray) -> None:
        self.law = law
        self.edges = edges
        self.levels = levels
        self.moments = law.cell_moments(edges)
        mass, first, second = self.moments
        self.error = float(np.sum(second - levels * (2 * first - levels * mass)))

    def by_error(self) -> float:
        return self.error

    def slope(self) -> np.ndarray:
        """Half the gradient of the error by the levels."""
        mass, first, _ = self.moments
        return self.levels * mass - first

    def curvature(self) -> tuple[np.ndarray, np.ndarray]:
        """Half the Hessian by the levels, the edges following as midpoints: two diagonals."""
        beside = np.diff(self.levels) / -4 * self.law.density(self.edges[1:-1])
        main = self.moments[0].copy()
        main[:-1] += beside
        main[1:] += beside
        return main, beside


class _FreeLevels(_Quantizer):
    """Every magnitude takes the nearest of the levels, which are free."""

    def __init__(self, law: _MagnitudeLaw, levels: np.ndarray) -> None:
        super().__init__(law, _midpoint_edges(levels), levels)

    def refitted(self) -> _FreeLevels:
        """Lloyd's step: each level becomes the mean of its cell."""
        mass, first, _ = self.moments
        means = np.divide(first, mass, out=self.levels.copy(), where=mass > 0)
        return _FreeLevels(self.law, np.maximum.accumulate(means))

    def newton(self) -> _FreeLevels | None:
        if len(self.levels) == 1:
            return None
        main, beside = self.curvature()
        try:
            step = linalg.solveh_banded(np.stack((np.append(0.0, beside), main)), self.slope())
        except linalg.LinAlgError:
            return None
        levels = self.levels - step
        ascending = levels[0] > 0 and np.all(np.diff(levels) > 0)
        return _FreeLevels(self.law, levels) if ascending else None


class _SumLevels(_Quantizer):
    """The level of each cell is its row of the design, for binary codes its code, times scales."""

    def __init__(
        self, law: _MagnitudeLaw, edges: np.ndarray, design: np.ndarray, scales: np.ndarray
    ) -> None:
        super().__init__(law, edges, design @ scales)
        self.design = design
        self.scales = scales

    def expected(self, descending: bool = False) -> ExpectedScales:
        scales = np.sort(np.abs(self.scales))[::-1] if descending else self.scales
        return ExpectedScales(self.error, scales * self.law.unit)

    def least_squares_scales(self) -> np.ndarray:
        mass, first, _ = self.moments
        gram = (self.design * mass[:, None]).T @ self.design
        return np.linalg.lstsq(gram, self.design.T @ first, rcond=None)[0]

    def with_scales(self, scales: np.ndarray) -> _SumLevels:
        return _SumLevels(self.law, self.edges, self.design, scales)

    def with_next_sign(self) -> _SumLevels:
        """Append the sign of the residual to the codes, and for now the scale 0."""
        cut = np.flatnonzero((self.edges[:-1] < self.levels) & (self.levels < self.edges[1:]))
        edges = np.insert(self.edges, cut + 1, self.levels[cut])
        codes = np.insert(self.design, cut + 1, self.design[cut], axis=0)
        signs = np.where(edges[:-1] >= codes @ self.scales, 1.0, -1.0)
        return _SumLevels(
            self.law, edges, np.column_stack((codes, signs)), np.append(self.scales, 0.0)
        )

    def mean_residual(self) -> float:
        """E|x - q(x)|, for cells that do not have their level inside."""
        return float(np.sum(np.abs(self.slope())))


class _NearestSums(_SumLevels):
    """Every x takes the nearest level of the whole design, whose levels are symmetric about 0."""

    def __init__(self, law: _MagnitudeLaw, whole: np.ndarray, scales: np.ndarray) -> None:
        levels = whole @ scales
        design = whole[np.argsort(levels, kind="stable")[len(levels) // 2 :]]
        super().__init__(law, _midpoint_edges(design @ scales), design, scales)
        self.whole = whole

    def refitted(self) -> _NearestSums:
        """Alternating step: least-squares scales for these codes, then nearest codes."""
        return _NearestSums(self.law, self.whole, self.least_squares_scales())

    def newton(self) -> _NearestSums | None:
        main, beside = self.curvature()
        across = (self.design[:-1] * beside[:, None]).T @ self.design[1:]
        hessian = (self.design * main[:, None]).T @ self.design + across + across.T
        try:
            step = linalg.cho_solve(linalg.cho_factor(hessian), self.design.T @ self.slope())
        except linalg.LinAlgError:
            return None
        return _NearestSums(self.law, self.whole, self.scales - step)


_Adaptive = TypeVar("_Adaptive", _FreeLevels, _NearestSums)


def _settled(quantizer: _Adaptive) -> _Adaptive:
    """A local optimum, by Newton steps and, where they do not lower the error, refits."""
    while True:
        following = quantizer.newton()
        if following is None or not following.error < quantizer.error:
            following = quantizer.refitted()
        fallen = quantizer.error - following.error
        if fallen > 0:
            quantizer = following
        if not fallen > max(_SETTLED * quantizer.error, _ROUNDING):
            return quantizer


def _greedy(law: _MagnitudeLaw, bits: int) -> _SumLevels:
    quantizer = _SumLevels(law, np.array([0.0, np.inf]), np.zeros((1, 0)), np.zeros(0))
    for _ in range(bits):
        quantizer = quantizer.with_next_sign()
        quantizer = quantizer.with_scales(
            np.append(quantizer.scales[:-1], quantizer.mean_residual())
        )
    return quantizer


def _converged(law: _MagnitudeLaw, bits: int) -> _NearestSums:
    """The local optimum that alternating reaches from the greedy codes."""
    quantizer = _NearestSums(law, _codes(bits), _greedy(law, bits).least_squares_scales())
    while True:
        renewed = quantizer.refitted()
        # Newton's steps only near the optimum: from afar they may reach another one.
        if not renewed.error < quantizer.error * (1 - _NEARBY):
            return _settled(quantizer)
        quantizer = renewed


def _uniform(law: _MagnitudeLaw, bits: int) -> _NearestSums:
    n_levels = 2 ** (bits - 1)
    odd_halves = np.arange(0.5 - n_levels, n_levels)[:, None]
    # The levels' range, from half the root mean square to far into the heaviest tails.
    steps = 2.0 ** np.arange(-1, 12, 0.25) / n_levels
    scanned = steps[np.argmin([law.scanned_mse(step, n_levels) for step in steps])]
    # A density that ends abruptly makes many local minima, the best of which spans the support.
    spanning = law.reach / n_levels
    starts = (_NearestSums(law, odd_halves, np.array([step])) for step in (scanned, spanning))
    return _settled(min(starts, key=_Quantizer.by_error))


def _lloyd_max(law: _MagnitudeLaw, bits: int) -> _FreeLevels:
    return _settled(_FreeLevels(law, law.companded_levels(2 ** (bits - 1))))


def _searched(law: _MagnitudeLaw, bits: int) -> _NearestSums:
    """The best scales found from quasi-random ratios, and by adding a scale to the few best."""
    sizes = 2.0 ** np.arange(-6, 0.75, 0.125)
    optima = [_settled(_NearestSums(law, _codes(1), np.ones(1)))]
    for n_scales in range(2, bits + 1):
        codes = _codes(n_scales)
        extended = [
            np.append(quantizer.scales, size * np.max(quantizer.scales))
            for quantizer in optima
            for size in sizes
        ]
        points = stats.qmc.Halton(n_scales, scramble=False).random(_SPREAD)
        shapes = np.cumprod(1 / (1 + points[:, 1:]), axis=1)
        shapes = np.column_stack((np.ones(_SPREAD), shapes))
        reaches = 1.5 + 3 * points[:, :1]
        spread = shapes * (reaches / np.sum(shapes, axis=1, keepdims=True))
        starts: list[_NearestSums] = []
        for family in (extended, spread):
            quantizers = (_NearestSums(law, codes, scales).refitted() for scales in family)
            starts += sorted(quantizers, key=_Quantizer.by_error)[:_TRIED]
        optima = sorted(map(_settled, starts), key=_Quantizer.by_error)[:_KEPT]
    return optima[0]


def _codes(bits: int) -> np.ndarray:
    """All 2^bits codes, (2^bits, bits), in counting order from all -1 to all +1."""
    counts = np.arange(2**bits)[:, None] >> np.arange(bits - 1, -1, -1)
    return 2.0 * (counts & 1) - 1


def _halvings(bits: int) -> np.ndarray:
    """Scales of a uniform quantizer of step 1."""
    return 2.0 ** np.arange(bits - 2, -2, -1)


def _midpoint_edges(levels: np.ndarray) -> np.ndarray:
    return np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]))


def __dir__() -> list[str]:
    return sorted(__all__)
