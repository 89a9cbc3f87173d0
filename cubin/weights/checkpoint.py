"""Pretrained weights on disk, read one tensor at a time.

`Weights(paths)` reads headers and graphs only: the name, shape and channel axis of every weight
tensor are known before its data is touched. Iterating loads the tensors one by one. What the files
hold besides is listed with the reason why it is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cubin.weights.gguf_files import read_gguf
from cubin.weights.numpy_files import read_npy, read_npz
from cubin.weights.onnx_files import read_onnx
from cubin.weights.safetensors_files import read_safetensors
from cubin.weights.tensor import FLOATS, Axis, Weight, WeightsError, first_line
from cubin.weights.torch_files import read_torch

READERS: dict[str, Callable[[Path], Iterator[Weight]]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".onnx": read_onnx,
    ".gguf": read_gguf,
    ".pt": read_torch,
    ".pth": read_torch,
    ".bin": read_torch,
}

INDEX = ".index.json"
"""How the name of a file ends that says which tensor is in which shard."""

SAVE = "save the weights as float16, float32, float64 or bfloat16"


class Weights:
    """The float weight tensors of files and folders.

    In files with a graph (ONNX) a weight is what an operator uses as its weight; in the others,
    every float tensor of rank 2 or more. Only headers are read until a tensor is asked for.

    Parameters
    ----------
    paths : path-like or iterable of path-like
        `.npy`, `.npz`, `.safetensors`, `.onnx`, `.gguf`, `.pt`, `.pth` and `.bin` files,
        `.index.json` files, which name the shards of a checkpoint, and folders, which are searched
        for these at any depth. Where a folder has an index, its shards are those that the index
        names. Where it has `.safetensors` files, PyTorch's files beside them are left out: they
        hold the same once more, or the state of an optimizer. A file that several paths lead to is
        read once, and so are tensors of PyTorch's files that share their memory.
    include, exclude : str or iterable of str, optional
        Regular expressions. Only tensors whose name one of `include` is found in are read, and
        none of those that one of `exclude` is found in.

    Attributes
    ----------
    tensors : list of Weight
        The weights in the order of their files, not loaded yet.
    skipped : list of Weight
        Weights that cannot be read, such as those of int8, and files of a folder that are damaged
        or missing, under their own names.
    files : list of Path
        The files that have been read.
    left_out : list of Weight
        Float tensors that are no weights, such as biases, and those that are not asked for. From
        files without a graph also tensors of other types that could be weights, since they have
        rank 2 or more.

    Raises
    ------
    WeightsError
        If a path does not exist, has an unknown type, needs a package that is not installed,
        cannot be read, or holds no float weights; or if no weight is asked for.
    ValueError
        If `include` or `exclude` is no regular expression.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile
    >>> from cubin.weights import Weights
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> np.savez(folder / "net.npz", conv=np.ones((4, 3, 3, 3), np.float32), bias=np.ones(4))
    >>> weights = Weights(folder)
    >>> [(tensor.name, tensor.shape, tensor.dtype) for tensor in weights.tensors]
    [('conv', (4, 3, 3, 3), 'float32')]
    >>> [(tensor.name, tensor.reason) for tensor in weights.left_out]
    [('bias', 'of rank 1')]
    >>> [(name, array.sum(), channel_axis) for name, array, channel_axis in weights]
    [('conv', np.float32(108.0), 0)]
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
    ) -> None:
        wanted, unwanted = patterns("include", include), patterns("exclude", exclude)
        listed = [paths] if isinstance(paths, str | os.PathLike) else paths
        groups = {Path(path): weight_files(Path(path)) for path in listed}
        # By the files themselves, whatever the paths to them: the first path to each counts.
        every: dict[Path, Path] = {}
        for file in (file for files, _ in groups.values() for file in files):
            every.setdefault(file.resolve(), file)
        labels = file_labels(list(every.values()))
        self.tensors: list[Weight] = []
        self.skipped: list[Weight] = []
        self.left_out: list[Weight] = []
        self.files: list[Path] = []
        for path, (files, unread) in groups.items():
            new = [file for file in files if every.pop(file.resolve(), None) is not None]
            if files and not new:  # all of them have been read for a path before
                continue
            tensors = list(unread)
            self.files += new
            for file in new:
                try:
                    tensors += list(tensors_of(file, labels))
                except WeightsError as error:
                    if file == path:
                        raise
                    tensors.append(unreadable(labels[file] or file.name, str(error)))
            weights = [tensor for tensor in tensors if not tensor.reason]
            if not weights:
                raise WeightsError(f"{path}: {without_weights(tensors)}")
            self.tensors += weights
            rest = [tensor for tensor in tensors if tensor.reason]
            self.skipped += [tensor for tensor in rest if tensor.is_weight]
            self.left_out += [tensor for tensor in rest if not tensor.is_weight]
        if wanted or unwanted:
            self._choose(wanted, unwanted)
        self.tensors = apart(self.tensors)

    def _choose(self, wanted: list[re.Pattern[str]], unwanted: list[re.Pattern[str]]) -> None:
        def is_wanted(tensor: Weight) -> bool:
            name = tensor.name
            return (not wanted or any(pattern.search(name) for pattern in wanted)) and not any(
                pattern.search(name) for pattern in unwanted
            )

        others = [tensor for tensor in self.tensors if not is_wanted(tensor)]
        if len(others) == len(self.tensors):
            raise WeightsError(
                f"include and exclude leave none of {len(others)} weights, "
                f"whose names are like {others[0].name!r}"
            )
        self.left_out += [replace(t, reason="not asked for", is_weight=False) for t in others]
        self.tensors = [tensor for tensor in self.tensors if is_wanted(tensor)]
        # What is not readable as a whole has the name of a file, which no expression is meant for.
        self.skipped = [t for t in self.skipped if is_wanted(t) or not t.dtype]

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return (
            f"Weights({len(self.tensors)} tensors, {len(self.skipped)} skipped, "
            f"{len(self.left_out)} left out, {len(self.files)} files)"
        )

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, Axis]]:
        """Yield (name, array, channel_axis), one tensor in memory at a time."""
        for tensor in self.tensors:
            yield tensor.name, tensor.load(), tensor.channel_axis


def patterns(argument: str, expressions: str | Iterable[str] | None) -> list[re.Pattern[str]]:
    """Compile regular expressions."""
    if isinstance(expressions, str):
        expressions = [expressions]
    try:
        return [re.compile(expression) for expression in expressions or ()]
    except re.error as error:
        raise ValueError(
            f"{argument} must be regular expressions, got {error.pattern!r}: {error}"
        ) from None


def unreadable(name: str, reason: str) -> Weight:
    """What stands for a file whose tensors are not known."""
    return Weight(name, (), "", None, lambda cut: np.empty(0), reason)


def weight_files(path: Path) -> tuple[list[Path], list[Weight]]:
    """List the weight files that a path stands for, and what stands for those left out."""
    if path.is_dir():
        return folder_files(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder; check the path")
    if path.name.endswith(INDEX):
        return shards(path)
    if path.suffix.lower() not in READERS:
        raise WeightsError(
            f"{path}: unknown type {path.suffix!r}; save the weights as {' or '.join(READERS)}"
        )
    return [path], []


def folder_files(folder: Path) -> tuple[list[Path], list[Weight]]:
    """List the weight files of a folder and of those in it."""
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in folder.rglob("*"):
        if file.is_file():
            by_folder[file.parent].append(file)
    files: list[Path] = []
    others: list[Weight] = []
    for listed in by_folder.values():
        indices = sorted(file for file in listed if file.name.endswith(f".safetensors{INDEX}"))
        indices = indices or sorted(file for file in listed if file.name.endswith(f".bin{INDEX}"))
        read = [
            file for file in listed if READERS.get(file.suffix.lower()) not in (None, read_torch)
        ]
        if indices:
            read = [file for file in read if file.suffix.lower() != ".safetensors"]
            for index in indices:
                named, missing = shards(index)
                read += named
                others += missing
        of_torch = [file for file in listed if is_torch(file) and file not in read]
        if indices or any(file.suffix.lower() == ".safetensors" for file in read):
            others += [beside(file.relative_to(folder)) for file in sorted(of_torch)]
        else:
            read += of_torch
        files += read
    if not files:
        raise WeightsError(f"{folder}: no {' or '.join(READERS)} files in this folder")
    return sorted(set(files)), others


def beside(file: Path) -> Weight:
    """What stands for a file of PyTorch that is left out."""
    left_out = unreadable(file.as_posix(), "a file of PyTorch beside .safetensors or an index")
    return replace(left_out, is_weight=False)


def is_torch(file: Path) -> bool:
    """Whether a file in a folder is one of torch.save: others have such names, too."""
    if READERS.get(file.suffix.lower()) is not read_torch:
        return False
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def shards(index: Path) -> tuple[list[Path], list[Weight]]:
    """List the files that an index names, and what stands for those that are not there."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = sorted(index.parent / name for name in names)
        outside = [file for file in files if file.parent != index.parent]
        if outside or any(file.suffix.lower() not in READERS for file in files):
            raise ValueError("it names files that are no shards beside it")
    except Exception as error:
        raise WeightsError(f"{index}: not a sound index ({first_line(error)})") from error
    missing = [file for file in files if not file.is_file()]
    said = f"named by {index.name}, but not there"
    return (
        [file for file in files if file not in missing],
        [unreadable(file.name, said) for file in missing],
    )


def file_labels(files: list[Path]) -> dict[Path, str]:
    """Name the files as shortly as keeps them apart, without the path that they share."""
    if len(files) < 2:
        return dict.fromkeys(files, "")
    shared = os.path.commonpath([file.absolute().parent for file in files])
    labels = {file: file.absolute().relative_to(shared) for file in files}
    stems = {file: label.with_suffix("").as_posix() for file, label in labels.items()}
    if len(set(stems.values())) == len(stems):
        return stems
    return {file: label.as_posix() for file, label in labels.items()}


def tensors_of(path: Path, labels: Mapping[Path, str]) -> Iterator[Weight]:
    """Yield the tensors of a file, weights or not, under names that begin with its label."""
    try:
        for tensor in READERS[path.suffix.lower()](path):
            name = ":".join(part for part in (labels[path], tensor.name) if part) or path.stem
            yield replace(tensor, name=name)
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"{path}: reading it needs {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:
        empty = path.is_file() and not path.stat().st_size
        problem = "it is empty" if empty else first_line(error)
        raise WeightsError(
            f"{path}: not a sound {path.suffix.lower()} file ({problem}); save it again"
        ) from error


def apart(tensors: Iterable[Weight]) -> list[Weight]:
    """Number the tensors that share a name, as those of subgraphs may."""
    seen: Counter[str] = Counter()
    named = []
    for tensor in tensors:
        seen[tensor.name] += 1
        count = seen[tensor.name]
        named.append(replace(tensor, name=f"{tensor.name} ({count})") if count > 1 else tensor)
    return named


def without_weights(tensors: Iterable[Weight]) -> str:
    """Say why none of the tensors of a path is a weight that can be read."""
    tensors = list(tensors)
    skipped = [tensor for tensor in tensors if tensor.is_weight]
    if skipped:
        counts = Counter(tensor.reason for tensor in skipped)
        reasons = "; ".join(f"{count} {reason}" for reason, count in counts.most_common(3))
        return f"none of its {len(skipped)} weights can be read: {reasons}; {SAVE}"
    floats = [tensor for tensor in tensors if tensor.dtype in FLOATS]
    if floats:
        return (
            f"none of its {len(floats)} float arrays is a weight, of rank 2 or more and used by a "
            "layer; give files that hold weights"
        )
    files = [tensor for tensor in tensors if not tensor.dtype]
    if files:
        return f"it holds {files[0].reason}"
    return f"no float arrays in it; {SAVE}"
