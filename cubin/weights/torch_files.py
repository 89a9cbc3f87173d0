"""Tensors of PyTorch's files: `.pt`, `.pth`, `.bin`. PyTorch reads them, without running code."""

from __future__ import annotations

import functools
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cubin.core import floats
from cubin.weights import float8
from cubin.weights.float8 import FLOAT8
from cubin.weights.tensor import Cut, Weight, is_listed, without_graph

MODELS = ("state_dict", "model_state_dict", "model")
"""Under which of these names a training checkpoint keeps the model beside the optimizer."""


def read_torch(path: Path) -> Iterator[Weight]:
    """List the tensors of a file of `torch.save`."""
    tensors = tensors_in(path, os.stat(path).st_mtime_ns)
    names: dict[Any, str] = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        weight = without_graph(name, shape, dtype, partial(load_tensor, path, name, dtype))
        if tensor.layout.__str__() != "torch.strided" or tensor.is_quantized:
            weight = replace(weight, reason=f"of the layout {tensor.layout}, which is not read")
        elif not weight.reason:
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
            first = names.setdefault((place, shape, tensor.stride(), dtype), name)
            if first != name:
                weight = replace(weight, reason=f"tied to {first}", is_weight=False)
        if is_listed(weight):
            yield weight


@functools.lru_cache(maxsize=1)
def tensors_in(path: Path, changed: int) -> dict[str, Any]:
    """The tensors of a file by name, their data mapped; of the last file they are kept."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on storages without a type, in files of older versions
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                "PyTorch reads tensors alone from it, and it holds more, such as a whole model: "
                "save model.state_dict()"
            ) from error
    if isinstance(content, Mapping):
        models = [content[key] for key in MODELS if isinstance(content.get(key), Mapping)]
        content = models[0] if models else content
    return dict(leaves("", content))


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors in mappings, under names joined by dots."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(f"{name}.{key}" if name else str(key), part)


def load_tensor(path: Path, name: str, dtype: str, cut: Cut) -> np.ndarray:
    """Read a part of a tensor; float8 becomes float32."""
    import torch

    tensor = tensors_in(path, os.stat(path).st_mtime_ns)[name]
    if dtype == "bfloat16":
        return tensor.view(torch.int16).numpy().view(floats.bfloat16())[cut]
    if dtype in FLOAT8:
        return float8.decode(tensor.view(torch.uint8).numpy()[cut], dtype)
    return tensor.numpy()[cut]
