"""What one writes without cubin: the same algorithms in NumPy, CuPy and PyTorch.

Scales belong to what is left when `axes` are summed over: ``axes=(1,)`` for rows, all axes for a
scale per tensor. Groups are the rows of a view. `bits` is an int, or an integer array of x's shape.
Those that alternate or refit take x as (rows, n).
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


def array_mask(xp: Any, x: Any, bound: Any = 1) -> Any:
    return xp.abs(x) <= bound


def array_gradient(xp: Any, x: Any, bound: Any, gy: Any) -> Any:
    return xp.where(xp.abs(x) <= bound, gy, x.dtype.type(0))


def array_levels(xp: Any, x: Any, bits: Any, axes: Any = (1,)) -> Any:
    """The scale and the codes (-1, 0 or 1 in x's dtype) of each greedy level, one after another."""
    mapped = hasattr(bits, "shape")
    residual, wide = x, xp.promote_types(x.dtype, "float32")
    for level in range(int(xp.max(bits)) if mapped else bits):
        code = xp.where(residual > 0, x.dtype.type(1), x.dtype.type(-1))
        if mapped:
            hot = bits > level
            count = xp.maximum(hot.sum(axis=axes, keepdims=True), 1)
            total = xp.where(hot, xp.abs(residual), 0).sum(axis=axes, keepdims=True, dtype=wide)
            code = xp.where(hot, code, x.dtype.type(0))
            scale = (total / count).astype(x.dtype)
        else:
            scale = xp.abs(residual).mean(axis=axes, keepdims=True, dtype=wide).astype(x.dtype)
        yield scale, code
        residual = residual - scale * code


def array_greedy(xp: Any, x: Any, bits: Any, axes: Any = (1,)) -> Any:
    approx = xp.zeros_like(x)
    for scale, code in array_levels(xp, x, bits, axes):
        approx = approx + scale * code
    return approx


def array_encode(xp: Any, x: Any, bits: Any, axes: Any = (1,)) -> Any:
    """Scales, and signs as int8, each with a first axis of levels."""
    found = [(scale, code.astype("int8")) for scale, code in array_levels(xp, x, bits, axes)]
    return xp.stack([scale for scale, _ in found]), xp.stack([code for _, code in found])


def array_decode(xp: Any, scales: Any, signs: Any) -> Any:
    return (scales * signs).sum(axis=0, dtype=scales.dtype)


def array_ranked(xp: Any, x: Any, counts: Any, distance: bool = False) -> Any:
    """The first of `counts` (bits, elements) for the largest |x|, or those farthest from its mean.

    Equal elements come by position, except on CuPy.
    """
    key = xp.abs(x).ravel()
    if distance:
        key = xp.abs(key - key.mean(dtype="float64"))
    order = xp.argsort(-key, **({"kind": "stable"} if xp.__name__ == "numpy" else {}))
    bits, start = xp.empty(x.size, "int8"), 0
    for width, count in counts:
        bits[order[start : start + count]] = width
        start += count
    return bits.reshape(x.shape)


# ---------------------------------------------------------------- PyTorch


def torch_sign(torch: Any, x: Any) -> Any:
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def torch_mask(torch: Any, x: Any, bound: Any = 1) -> Any:
    return x.abs() <= bound


def torch_gradient(torch: Any, x: Any, bound: Any, gy: Any) -> Any:
    return torch.where(x.abs() <= bound, gy, 0.0)


def torch_levels(torch: Any, x: Any, levels: int, bits: Any = None, axes: Any = (1,)) -> Any:
    """As `array_levels`."""
    residual, wide = x, torch.promote_types(x.dtype, torch.float32)
    for level in range(levels):
        code = torch.where(residual > 0, 1.0, -1.0).to(x.dtype)
        if bits is None:
            scale = residual.abs().mean(dim=axes, keepdim=True, dtype=wide).to(x.dtype)
        else:
            hot = bits > level
            total = torch.where(hot, residual.abs(), 0.0).sum(dim=axes, keepdim=True, dtype=wide)
            code = torch.where(hot, code, 0.0)
            scale = (total / hot.sum(dim=axes, keepdim=True).clamp(min=1)).to(x.dtype)
        yield scale, code
        residual = residual - scale * code


def torch_greedy(torch: Any, x: Any, levels: int, bits: Any = None, axes: Any = (1,)) -> Any:
    approx = torch.zeros_like(x)
    for scale, code in torch_levels(torch, x, levels, bits, axes):
        approx = approx + scale * code
    return approx


def torch_encode(torch: Any, x: Any, levels: int, bits: Any = None, axes: Any = (1,)) -> Any:
    """As `array_encode`."""
    levelled = torch_levels(torch, x, levels, bits, axes)
    found = [(scale, code.to(torch.int8)) for scale, code in levelled]
    return torch.stack([scale for scale, _ in found]), torch.stack([code for _, code in found])


def torch_decode(torch: Any, scales: Any, signs: Any) -> Any:
    return (scales * signs).sum(dim=0)


def torch_ranked(torch: Any, x: Any, counts: Any, distance: bool = False) -> Any:
    """As `array_ranked`."""
    key = x.abs().flatten()
    if distance:
        key = (key - key.mean(dtype=torch.float64)).abs()
    order = torch.argsort(key, descending=True, stable=True)
    bits, start = torch.empty(x.numel(), dtype=torch.int8, device=x.device), 0
    for width, count in counts:
        bits[order[start : start + count]] = width
        start += count
    return bits.reshape(x.shape)


def torch_refined(torch: Any, x: Any, levels: int) -> Any:
    """Greedy codes, with all scales so far refitted by least squares after each level.

    Y. Guo et al., "Network sketching: exploiting binary structure in deep CNNs", CVPR 2017.
    """
    approx, signs = torch.zeros_like(x), []
    for _ in range(levels):
        signs.append(torch.where(x - approx > 0, 1.0, -1.0).to(x.dtype))
        codes = torch.stack(signs, dim=2)
        approx = (codes @ least_squares(torch, codes, x))[:, :, 0]
    return approx


def least_squares(torch: Any, codes: Any, x: Any) -> Any:
    """The scales, (rows, levels, 1), of codes (rows, n, levels)."""
    transposed = codes.transpose(1, 2)
    return torch.linalg.lstsq(transposed @ codes, transposed @ x[:, :, None]).solution


def torch_alternating(torch: Any, x: Any, levels: int, iterations: int = 2) -> Any:
    """Least squares, then the nearest of the sorted sums of levels, from greedy codes on.

    C. Xu et al., "Alternating multi-bit quantization for recurrent neural networks", ICLR 2018.
    """
    x = x.contiguous()
    residual, signs = x, []
    for _ in range(levels):
        signs.append(torch.where(residual > 0, 1.0, -1.0).to(x.dtype))
        residual = residual - signs[-1] * residual.abs().mean(dim=1, keepdim=True)
    codes = torch.stack(signs, dim=2)
    combinations = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=levels)))
    combinations = combinations.to(x)
    for _ in range(iterations):
        sums, order = (combinations @ least_squares(torch, codes, x))[:, :, 0].sort(dim=1)
        middle = ((sums[:, 1:] + sums[:, :-1]) / 2).contiguous()
        codes = combinations[order.gather(1, torch.searchsorted(middle, x))]
    return (codes @ least_squares(torch, codes, x))[:, :, 0]


class TorchDigits:
    """The CNN of train_mnist.py with k bits for its hidden weights, and one step of Adam.

    The straight-through gradient of the weights is 1 up to k, in magnitude, and 0 beyond.
    """

    def __init__(self, torch: Any, parameters: Any, bits: int, rate: float) -> None:
        self.torch, self.bits = torch, bits
        self.parameters = {
            name: torch.from_numpy(value.copy()).requires_grad_()
            for name, value in parameters.items()
        }
        self.last = sum(name.startswith("weights.") for name in parameters) - 1
        self.running = [
            (torch.zeros(len(parameters[f"gamma.{n}"])), torch.ones(len(parameters[f"gamma.{n}"])))
            for n in range(self.last)
        ]
        self.adam = torch.optim.Adam(self.parameters.values(), rate)

    def weights(self, number: int) -> Any:
        w = self.parameters[f"weights.{number}"]
        if number in (0, self.last):
            return w
        with self.torch.no_grad():
            approx = torch_greedy(self.torch, w, self.bits, axes=(1, 2, 3))
        passing = w.clamp(-self.bits, self.bits)
        return passing + (approx - passing.detach())

    def step(self, images: Any, labels: Any) -> Any:
        """Move the parameters; return the loss before."""
        of, p = self.torch.nn.functional, self.parameters
        x = images
        for number in range(self.last):
            if number:
                mean, variance = self.running[number - 1]
                gamma, beta = p[f"gamma.{number - 1}"], p[f"beta.{number - 1}"]
                x = of.batch_norm(x, mean, variance, gamma, beta, training=True)
            x = of.max_pool2d(of.conv2d(x, self.weights(number), padding=1), 2)
            x = of.prelu(x, p[f"slope.{number}"])
        mean, variance = self.running[self.last - 1]
        gamma, beta = p[f"gamma.{self.last - 1}"], p[f"beta.{self.last - 1}"]
        x = of.batch_norm(x, mean, variance, gamma, beta, training=True)
        logits = of.linear(x.flatten(1), self.weights(self.last), p["bias"])
        loss = of.cross_entropy(logits, labels)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        with self.torch.no_grad():
            for number in range(1, self.last):
                p[f"weights.{number}"].clamp_(-1, 1)
        return loss.detach()
