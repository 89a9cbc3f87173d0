"""What one writes without cubin: the same algorithms in NumPy, CuPy, PyTorch and Triton.

All take x as (rows, n), with one scale per level and row. `bits` is an int, or an integer array of
x's shape.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Any


def optional(name: str) -> ModuleType | None:
    """A module if it can be imported, else None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# ---------------------------------------------------------------- NumPy and CuPy


def array_sign(xp: Any, x: Any) -> Any:
    return xp.where(x > 0, x.dtype.type(1), x.dtype.type(-1))


def array_gradient(xp: Any, x: Any, bound: Any, gy: Any) -> Any:
    return xp.where(xp.abs(x) <= bound, gy, x.dtype.type(0))


def array_greedy(xp: Any, x: Any, bits: Any) -> Any:
    residual, approx = x, xp.zeros_like(x)
    for level in range(int(xp.max(bits)) if hasattr(bits, "shape") else bits):
        step = xp.where(residual > 0, x.dtype.type(1), x.dtype.type(-1))
        if hasattr(bits, "shape"):
            hot = bits > level
            count = xp.maximum(hot.sum(axis=1, keepdims=True), 1)
            total = xp.where(hot, xp.abs(residual), 0).sum(axis=1, keepdims=True)
            step = xp.where(hot, step, 0) * (total / count).astype(x.dtype)
        else:
            step = step * xp.abs(residual).mean(axis=1, keepdims=True)
        approx = approx + step
        residual = residual - step
    return approx


# ---------------------------------------------------------------- PyTorch


def torch_sign(torch: Any, x: Any) -> Any:
    return torch.where(x > 0, 1.0, -1.0)


def torch_gradient(torch: Any, x: Any, bound: Any, gy: Any) -> Any:
    return torch.where(x.abs() <= bound, gy, 0.0)


def torch_greedy(torch: Any, x: Any, levels: int, bits: Any = None) -> Any:
    residual, approx = x, torch.zeros_like(x)
    for level in range(levels):
        step = torch.where(residual > 0, 1.0, -1.0)
        if bits is None:
            step = step * residual.abs().mean(dim=1, keepdim=True)
        else:
            hot = bits > level
            total = torch.where(hot, residual.abs(), 0.0).sum(dim=1, keepdim=True)
            step = torch.where(hot, step, 0.0) * (total / hot.sum(dim=1, keepdim=True).clamp(min=1))
        approx = approx + step
        residual = residual - step
    return approx


def torch_alternating(torch: Any, x: Any, levels: int, search: Any, iterations: int = 2) -> Any:
    """Least squares, then the nearest of the sorted sums of levels, from greedy codes on.

    `search` gives the place of the nearest sum, from the sorted ones, (rows, 2^levels).

    C. Xu et al., "Alternating multi-bit quantization for recurrent neural networks", ICLR 2018.
    """
    residual, signs = x, []
    for _ in range(levels):
        signs.append(torch.where(residual > 0, 1.0, -1.0))
        residual = residual - signs[-1] * residual.abs().mean(dim=1, keepdim=True)
    codes = torch.stack(signs, dim=2)
    combinations = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=levels)))
    combinations = combinations.to(x.device)

    def least_squares() -> Any:
        transposed = codes.transpose(1, 2)
        return torch.linalg.lstsq(transposed @ codes, transposed @ x[:, :, None]).solution

    for _ in range(iterations):
        sums, order = (combinations @ least_squares())[:, :, 0].sort(dim=1)
        codes = combinations[order.gather(1, search(torch, sums, x))]
    return (codes @ least_squares())[:, :, 0]


def torch_search(torch: Any, sums: Any, x: Any) -> Any:
    """The nearest sums by PyTorch's own binary search."""
    middle = ((sums[:, 1:] + sums[:, :-1]) / 2).contiguous()
    return torch.searchsorted(middle, x)


def torch_halving(torch: Any, sums: Any, x: Any) -> Any:
    """The nearest sums by a binary search on tensors, which halves every element's range.

    This is how published quantizers for binary codes do it: `torch.searchsorted` is younger.
    """
    low = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    high = torch.full_like(low, sums.shape[1] - 1)
    for _ in range((sums.shape[1] - 1).bit_length()):
        before = (low + high).div(2, rounding_mode="floor")
        above = x > (sums.gather(1, before) + sums.gather(1, before + 1)) / 2
        low, high = torch.where(above, before + 1, low), torch.where(above, high, before)
    return low
