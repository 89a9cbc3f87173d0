"""Forward and backward rules as objects, for any automatic differentiation.

They are the user functions of CNTK's ``netopt.custom_convolution_ops``. `Sign` is its
``SignWithEstimation`` and ``pySign``; `Multibit` and `MultibitKernel` have the same names there.

Each operator has ``forward(x) -> (y, residuals)`` and ``backward(residuals, gy) -> gx``. The
residuals hold what the backward rule needs, and the operator holds nothing. So one operator may be
applied many times before any gradient is asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cubin import surrogates
from cubin.binarize import multibit, sign
from cubin.core import arrays, libraries
from cubin.core.bits import as_bits
from cubin.core.libraries import Array
from cubin.core.rows import plain_axes, rows_of
from cubin.gradients import multibit_grad, sign_grad
from cubin.solvers.solver import solver_of

__all__ = [
    "Multibit",
    "MultibitKernel",
    "Sign",
]


class Sign:
    """The sign with the straight-through gradient.

    .. math:: y = +1 \\text{ if } x > 0 \\text{ else } -1, \\qquad
        g_x = g_y \\text{ where } |x| \\le 1 \\text{ else } 0

    Examples
    --------
    >>> import numpy as np
    >>> from cubin.operators import Sign
    >>> y, residuals = Sign().forward(np.array([0.0, 0.5, 2.0]))
    >>> y, Sign().backward(residuals, np.ones(3))
    (array([-1.,  1.,  1.]), array([1., 1., 0.]))

    References
    ----------
    .. [1] M. Courbariaux et al., "Binarized Neural Networks", arXiv:1602.02830, 2016.
    """

    def forward(self, x: Array) -> tuple[Array, Array]:
        """The sign of `x`, and what `backward` needs: `x` itself."""
        x = _floats(x)
        return sign(x), x

    def backward(self, residuals: Array, gy: Array) -> Array:
        """The gradient with respect to x, of x's shape and dtype."""
        return sign_grad(residuals, gy)

    def state_dict(self) -> dict[str, Any]:
        """The operator's state: a dict of plain values."""
        return {}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Sign:
        """The operator with the state that `state_dict` gave."""
        _check_keys(state, ())
        return cls()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sign)

    def __hash__(self) -> int:
        return hash(Sign)

    def __repr__(self) -> str:
        return "Sign()"


_STATE = ("bits", "channel_axis", "group_size", "solver", "surrogate")


class Multibit:
    """The multibit approximation with the straight-through gradient.

    .. math:: y = \\sum_i a_i b_i, \\qquad
        g_x = g_y \\text{ where } |x| \\le \\text{bits} \\text{ else } 0

    with the scales :math:`a_i` and signs :math:`b_i` of `cubin.multibit`.

    Parameters
    ----------
    bits : int or integer array that broadcasts to x's shape
        The number of levels of each element, 0 to 16.
    channel_axis : int or tuple of int, optional
        One scale per level for each index of this axis (these axes). Default: one for the tensor.
    group_size : int, optional
        One scale per level for every run of this many elements of the last axis; the last of them
        may be shorter.
    solver : {"greedy", "refined", "alternating", "optimal"}
        As in `cubin.quantize`.
    surrogate : {"bits_clip", "scaled_clip", "scale_aware"}
        The gradient's rule, as in `cubin.multibit_grad`.

    Raises
    ------
    TypeError
        If `bits`, `channel_axis` or `group_size` is not integer.
    ValueError
        If `bits` is out of range, `channel_axis` and `group_size` are both given, or there is no
        such solver or surrogate.

    Examples
    --------
    >>> import numpy as np
    >>> from cubin.operators import Multibit
    >>> operator = Multibit(2)
    >>> y, residuals = operator.forward(np.array([-1.0, 3.0]))
    >>> y, operator.backward(residuals, np.ones(2))
    (array([-1.,  3.]), array([1., 0.]))

    References
    ----------
    .. [1] J. Fromm, S. Patel, M. Philipose, "Heterogeneous bitwidth binarization in convolutional
       neural networks", NeurIPS 2018, arXiv:1805.10368.
    """

    def __init__(
        self,
        bits: Array,
        channel_axis: int | tuple[int, ...] | None = None,
        group_size: int | None = None,
        solver: str = "greedy",
        surrogate: str = "bits_clip",
    ) -> None:
        rule = solver_of(solver, None)
        surrogates.multibit_rule(surrogate)
        _, bits = libraries.viewed("bits", bits)
        if not libraries.on_device(bits):
            # The map's values are checked now. Its shape is checked once x is known.
            checked = np.asarray(bits)
            as_bits(checked, np.broadcast_to(np.float32(0), checked.shape), **rule.limit)
            bits = checked if checked.ndim else int(checked)
        # A copy: the gradient has to see the same map as the approximation.
        self.bits = _copied(bits)
        self.channel_axis = plain_axes(channel_axis)
        self.group_size = (
            None if group_size is None else arrays.as_integer("group_size", group_size)
        )
        if group_size is not None:
            rows_of((0,), channel_axis, group_size)
        self.solver = solver
        self.surrogate = surrogate

    def forward(self, x: Array) -> tuple[Array, Array]:
        """The approximation of `x`, and what `backward` needs: `x` itself."""
        x = _floats(x)
        return multibit(x, self.bits, solver=self.solver, **self._layout()), x

    def backward(self, residuals: Array, gy: Array) -> Array:
        """The gradient with respect to x, of x's shape and dtype."""
        return multibit_grad(residuals, self.bits, gy, surrogate=self.surrogate, **self._layout())

    def _layout(self) -> dict[str, Any]:
        return {"channel_axis": self.channel_axis, "group_size": self.group_size}

    def state_dict(self) -> dict[str, Any]:
        """The operator's state: the arguments that it was made with, the map as a copy."""
        return {
            "bits": _copied(self.bits),
            **self._layout(),
            "solver": self.solver,
            "surrogate": self.surrogate,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Multibit:
        """The operator with the state that `state_dict` gave."""
        _check_keys(state, _STATE)
        return cls(**state)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, Multibit)
        if (
            any(getattr(self, name) != getattr(other, name) for name in _STATE if name != "bits")
            or libraries.on_device(self.bits) != libraries.on_device(other.bits)
            or np.shape(self.bits) != np.shape(other.bits)
        ):
            return False
        xp = libraries.library(self.bits)
        with libraries.current_device(self.bits):
            # A map on another device is copied to this one.
            return bool((self.bits == xp.asarray(other.bits)).all())

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Multibit:
        return self.from_state_dict(self.state_dict())

    def __repr__(self) -> str:
        bits = self.bits if isinstance(self.bits, int) else f"<map of shape {self.bits.shape}>"
        rest = f", group_size={self.group_size}" if self.group_size is not None else ""
        rest += f", solver={self.solver!r}" if self.solver != "greedy" else ""
        rest += f", surrogate={self.surrogate!r}" if self.surrogate != "bits_clip" else ""
        return f"{type(self).__name__}({bits}, channel_axis={self.channel_axis}{rest})"


class MultibitKernel(Multibit):
    """`Multibit` with one scale per level for each kernel: ``channel_axis=0``.

    Parameters
    ----------
    bits : int or integer array that broadcasts to x's shape
        The number of levels of each element, 0 to 16.
    """

    def __init__(self, bits: Array) -> None:
        super().__init__(bits, channel_axis=0)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> MultibitKernel:
        """The operator with the state that `state_dict` gave."""
        _check_keys(state, _STATE)
        return cls(state["bits"])

    def __repr__(self) -> str:
        return super().__repr__().replace(", channel_axis=0", "")


def _floats(x: Any) -> Any:
    """`x` as an array of floats in its library."""
    library, view = libraries.viewed("x", x)
    floats = arrays.as_floats("x", view)
    return floats if library is None else x


def _copied(bits: Any) -> Any:
    """A number of bits, or a copy of a map, on its own device."""
    if isinstance(bits, int):
        return bits
    with libraries.current_device(bits):
        return bits.copy()


def _check_keys(state: dict[str, Any], expected: tuple[str, ...]) -> None:
    if set(state) != set(expected):
        raise ValueError(f"state must have the keys {list(expected)}, got {sorted(state)}")


def __dir__() -> list[str]:
    return sorted(__all__)
