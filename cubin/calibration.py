"""Gram: the mean outer product of a layer's inputs, the metric of its outputs' error."""

from __future__ import annotations

import math
import os

import numpy as np

from cubin.core import arrays, conversions, libraries
from cubin.core.libraries import Array
from cubin.core.windows import patches

__all__ = ["Gram"]

BLOCK = 1 << 21
"""Elements of inputs that are widened to float64 at a time."""


class Gram:
    """The Gram matrix of a layer's inputs, summed up batch by batch.

    .. math:: H = \\frac{1}{N} \\sum_{t=1}^{N} x_t x_t^T

    A layer with weights W has the outputs :math:`W x`. If its weights are off by E, its outputs are
    off by :math:`\\frac{1}{N} \\sum_t \\lVert E x_t \\rVert^2 = \\operatorname{tr}(E H E^T)` in the
    mean of squares [1]_. The diagonal of H, the mean square of each input, is an ``importance``
    that leaves out how inputs go together.

    Parameters
    ----------
    n : int
        The number of inputs of the layer: the length of a line of its weights.

    Attributes
    ----------
    n : int
    count : int
        How many input vectors were added.
    matrix : array of float64, shape (n, n)
        H, in the library of the latest inputs; zeros where none was added. In units of x squared.

    Raises
    ------
    TypeError
        If `n` is no integer.
    ValueError
        If it is less than 1.

    See Also
    --------
    cubin.quantize : Takes a Gram matrix as ``gram``.
    cubin.errors.output_mse : The error of the outputs.

    References
    ----------
    .. [1] B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain
       Surgeon", NIPS 1992.

    Examples
    --------
    >>> import numpy as np, cubin
    >>> gram = cubin.Gram(2).add(np.array([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.matrix.tolist(), gram.count
    ([[5.0, 1.0], [1.0, 2.0]], 2)
    """

    def __init__(self, n: int) -> None:
        self.n = arrays.as_integer("n", n)
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.count = 0
        self._sum: Array | None = None
        self._library: libraries.Library | None = None

    def add(self, x: Array) -> Gram:
        """Add a batch of inputs.

        Besides the n x n sums it takes the memory of some million float64 numbers, however large
        the batch. The sums go through the library's matrix product: they repeat to the bit on the
        same machine, with the same number of threads.

        Parameters
        ----------
        x : float array, shape (..., n)
            All earlier batches were in the same library.

        Returns
        -------
        Gram
            Itself.

        Raises
        ------
        TypeError
            If `x` is not floating point, or of another library than earlier batches.
        ValueError
            If its last axis is not of length n, or it has NaN or infinity. Nothing is added then.
        """
        library, x = libraries.viewed("x", x)
        x = arrays.as_floats("x", x)
        if x.ndim == 0 or x.shape[-1] != self.n:
            raise ValueError(f"x has shape {x.shape}, but its last axis must have length {self.n}")
        if self._sum is not None:
            libraries.check_same("x", x, self._sum, "what was added before")
        with libraries.current_device(x, library):
            self._add(x.reshape(-1, self.n))
        self._library = library
        return self

    def _add(self, vectors: Array) -> None:
        xp = libraries.library(vectors)
        total = xp.zeros((self.n, self.n))
        step = max(1, BLOCK // self.n)
        for start in range(0, len(vectors), step):
            block = conversions.widened(vectors[start : start + step])
            with np.errstate(over="ignore", invalid="ignore"):
                total += block.T @ block
        # A NaN or infinity of an input is one of its square, which nothing can cancel.
        if not bool(xp.isfinite(xp.diagonal(total)).all()):
            raise ValueError(
                "x must be finite and its squares too: it has NaN, infinity or numbers "
                "whose squares overflow float64"
            )
        self._sum = total if self._sum is None else self._sum + total
        self.count += len(vectors)

    @classmethod
    def of_conv(
        cls,
        x: Array,
        kernel: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
    ) -> Gram:
        """The Gram matrix of a convolution's inputs: of every patch that the kernel sees.

        Gram matrices of several batches are added with ``+``. Each group of a grouped convolution
        has inputs of its own: give its channels of x alone.

        Parameters
        ----------
        x : float array, shape (batch, channels, height, width)
        kernel : int or tuple of int
            Height and width of the kernel.
        stride, padding : int or tuple of int
            Positions outside of x count as 0.

        Returns
        -------
        Gram
            With n = channels * height * width of the kernel, in the order of the lines of a weight
            of shape (outputs, channels, height, width).

        Raises
        ------
        TypeError
            If `x` is not floating point, or another argument no integer.
        ValueError
            If `x` has not four axes, a number is out of range, or the kernel is larger than the
            padded input, or `x` has NaN or infinity.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> cubin.Gram.of_conv(np.ones((1, 1, 3, 3)), 2).matrix.tolist()[0]
        [1.0, 1.0, 1.0, 1.0]
        """
        library, x = libraries.viewed("x", x)
        x = arrays.as_floats("x", x)
        if x.ndim != 4:
            raise ValueError(f"x must have the axes batch, channels, height, width, got {x.shape}")
        kernel = arrays.as_pair("kernel", kernel, 1)
        stride, padding = arrays.as_pair("stride", stride, 1), arrays.as_pair("padding", padding, 0)
        padded = tuple(x.shape[2 + axis] + 2 * padding[axis] for axis in range(2))
        if padded[0] < kernel[0] or padded[1] < kernel[1]:
            raise ValueError(f"the kernel {kernel} is larger than the padded input {padded}")
        gram = cls(max(1, x.shape[1]) * math.prod(kernel))
        places = [(padded[axis] - kernel[axis]) // stride[axis] + 1 for axis in range(2)]
        step = max(1, BLOCK // (math.prod(places) * gram.n))
        with libraries.current_device(x, library):
            for start in range(0, len(x) if x.shape[1] else 0, step):
                gram.add(patches(x[start : start + step], kernel, stride, padding, places))
        gram._library = library
        return gram

    @classmethod
    def from_matrix(cls, matrix: Array, count: int = 1) -> Gram:
        """The Gram matrix that somebody else has summed up.

        Parameters
        ----------
        matrix : float array, shape (n, n)
            H, the mean of the outer products. A factor, such as that of a Hessian, changes neither
            codes nor relative errors. It may be singular. What rounding leaves of an asymmetry is
            averaged.
        count : int
            How many inputs it is the mean of: its weight in sums with others.

        Raises
        ------
        TypeError
            If `matrix` is not floating point, or `count` no integer.
        ValueError
            If `matrix` is not square, finite and symmetric, or has a negative mean square on its
            diagonal, or `count` is less than 1.

        Examples
        --------
        >>> import numpy as np, cubin
        >>> cubin.Gram.from_matrix(np.eye(3), count=100)
        Gram(n=3, count=100)
        """
        library, matrix = libraries.viewed("matrix", matrix)
        matrix = arrays.as_floats("matrix", matrix)
        if matrix.ndim != 2 or len(set(matrix.shape)) != 1 or not matrix.size:
            raise ValueError(f"matrix must be square, got the shape {matrix.shape}")
        gram = cls(len(matrix))
        gram.count, gram._library = arrays.as_integer("count", count), library
        if gram.count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        with libraries.current_device(matrix, library):
            xp, wide = libraries.library(matrix), conversions.widened(matrix)
            if not bool(xp.isfinite(wide).all()):
                raise ValueError("matrix must be finite, but it has NaN or infinity")
            if bool((xp.diagonal(wide) < 0).any()):
                raise ValueError("matrix has a negative mean square on its diagonal")
            if bool(abs(wide - wide.T).max() > 1e-3 * abs(wide).max()):
                raise ValueError("matrix must be symmetric: give both of its triangles")
            gram._sum = (wide + wide.T) * (gram.count / 2)
        return gram

    @property
    def matrix(self) -> Array:
        """H, the mean of the outer products."""
        return libraries.given_back(self.view(), self._library)

    def view(self) -> Array:
        """H as an array of NumPy or CuPy, whatever library the inputs are from."""
        if self._sum is None:
            return np.zeros((self.n, self.n))
        with libraries.current_device(self._sum):
            return self._sum / max(1, self.count)

    def diagonal(self) -> Array:
        """The mean square of each input, shape (n,): an ``importance`` for `cubin.quantize`."""
        matrix = self.view()
        with libraries.current_device(matrix):
            diagonal = libraries.library(matrix).diagonal(matrix).copy()
        return libraries.given_back(diagonal, self._library)

    def __add__(self, other: object) -> Gram:
        """The Gram matrix of the inputs of both, as if one had been given all of them."""
        if not isinstance(other, Gram):
            return NotImplemented
        if other.n != self.n:
            raise ValueError(f"Gram matrices of {self.n} and of {other.n} inputs have no sum")
        both = Gram(self.n)
        both.count = self.count + other.count
        both._library = self._library or other._library
        parts = [part for part in (self._sum, other._sum) if part is not None]
        if len(parts) == 2:
            libraries.check_same("other", parts[1], parts[0], "self")
            with libraries.current_device(parts[0]):
                both._sum = parts[0] + parts[1]
        elif parts:
            both._sum = parts[0].copy()
        return both

    def __radd__(self, other: object) -> Gram:
        """The sum of several, by Python's ``sum``, which begins with 0."""
        return self + Gram(self.n) if type(other) is int and other == 0 else NotImplemented

    def __repr__(self) -> str:
        return f"Gram(n={self.n}, count={self.count})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a ``.npz`` file, which `load` reads. Nothing in it is pickled.

        A file of that name is replaced once all is written, and stays as it is if that fails.

        Parameters
        ----------
        path : str or path
            Written as it is, without a suffix being added.

        Raises
        ------
        OSError
            If it cannot be written.
        ValueError
            If there is something at `path` that is no regular file.
        """
        from cubin.codes.files import replacing  # here, since zipfile and json take long to import

        total = np.zeros((self.n, self.n)) if self._sum is None else libraries.to_host(self._sum)
        with replacing(path) as file:
            np.savez(file, sum=total, count=np.int64(self.count))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gram:
        """Read what `save` wrote, as NumPy arrays.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, or no Gram matrix.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as members:
                total, count = members["sum"], members["count"]
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy raise many kinds for a damaged file
            raise ValueError(f"{os.fspath(path)} is no Gram matrix: {error}") from error
        square = total.ndim == 2 and total.shape[0] == total.shape[1] > 0
        if not (square and total.dtype == np.float64 and np.isfinite(total).all()):
            raise ValueError(
                f"{os.fspath(path)} is no Gram matrix: its sum is no square of numbers"
            )
        if count.shape != () or count.dtype != np.int64 or count < 0:
            raise ValueError(f"{os.fspath(path)} is no Gram matrix: its count is {count}")
        gram = cls(len(total))
        gram.count, gram._sum = int(count), total
        return gram


def matrix_for(gram: object, w: Array, name: str) -> Array:
    """The matrix of `gram`, for weights `w` that the caller calls `name`.

    Raises
    ------
    TypeError
        If `gram` is no `Gram`, or of another library than `w`.
    ValueError
        If `w` has less than two axes, or lines of another length than the number of inputs, or if
        nothing was added to `gram`.
    """
    if not isinstance(gram, Gram):
        raise TypeError(
            f"gram must be a cubin.Gram, got {type(gram).__qualname__}: "
            "cubin.Gram(n).add(x) makes one of a layer's inputs x"
        )
    n = math.prod(w.shape[1:])
    if w.ndim < 2 or n != gram.n:
        raise ValueError(
            f"gram is of {gram.n} inputs, so {name} needs at least two axes and {gram.n} elements "
            f"in a line, got shape {w.shape}"
        )
    if not gram.count:
        raise ValueError("gram has no inputs: add some first, gram.add(x)")
    matrix = gram.view()
    libraries.check_same("gram", matrix, w, name)
    return matrix


def __dir__() -> list[str]:
    return sorted(__all__)
