"""A minimal tape for reverse-mode differentiation of NumPy and CuPy arrays.

::

    x, w = Node(images), Node(kernels)
    loss = mean(relu(conv2d(x, w)))
    (gw,) = gradients(loss, [w])

`Node` and `gradients` are the whole tape; the operations supply nodes with their pull-backs.
"""

from __future__ import annotations

from cubin.tape.binarize import linear, multibit, sign
from cubin.tape.differences import check_gradient
from cubin.tape.node import Node, gradients
from cubin.tape.operations import (
    add,
    batch_norm,
    clip,
    conv2d,
    divide,
    dropout,
    exp,
    index,
    log,
    matmul,
    max_pool,
    maximum,
    mean,
    mean_pool,
    multiply,
    negative,
    prelu,
    relu,
    reshape,
    softmax_cross_entropy,
    subtract,
    sum,
    transpose,
)
from cubin.tape.optimizers import adam, sgd

__all__ = [
    "Node",
    "adam",
    "add",
    "batch_norm",
    "check_gradient",
    "clip",
    "conv2d",
    "divide",
    "dropout",
    "exp",
    "gradients",
    "index",
    "linear",
    "log",
    "matmul",
    "max_pool",
    "maximum",
    "mean",
    "mean_pool",
    "multibit",
    "multiply",
    "negative",
    "prelu",
    "relu",
    "reshape",
    "sgd",
    "sign",
    "softmax_cross_entropy",
    "subtract",
    "sum",
    "transpose",
]


def __dir__() -> list[str]:
    return sorted(__all__)
