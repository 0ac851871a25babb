"""Weights out of a file of `torch.save`, without PyTorch, and without running what it holds.

Such a file is a zip archive: a pickle that names tensors, and the bytes of each. The pickle may
name nothing but tensors, their storages and ordered dicts, so that it can call nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter, OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_, "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}  # fmt: skip


class _NamedTwiceError(ValueError):
    pass


class _Holder:
    """Names and numbers that the pickle gives for a storage's type, a storage or a tensor."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class _OnceDict(OrderedDict):
    """A dict that takes each key once."""

    def __setitem__(self, key, value):
        if key in self:
            raise _NamedTwiceError(key)
        super().__setitem__(key, value)


class _Reader(pickle.Unpickler):
    """An unpickler that knows tensors and dicts alone.

    What it hands out is made anew for each file, since a pickle can set attributes of it.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return type("OrderedDict", (_OnceDict,), {})
        if module_name == "torch" and global_name in _STORAGES:
            return _Holder("type", global_name)
        if module_name == "torch._utils":
            if global_name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
                return lambda *arguments: _Holder("tensor", *arguments[:4])
            if global_name == "_rebuild_parameter":
                return lambda tensor, *_: tensor
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, stored, key, _, number = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return _Holder("storage", stored.parts[1], key, number)


def read_pickled(operation: str, path: Path) -> Any:
    """The object in a file of `torch.save`, with arrays in place of its tensors.

    Raises:
        ValueError: the file is damaged, of the format before PyTorch 1.6, or holds something that
            is not weights. None of it has been executed.
    """
    advice = "Save weights alone: torch.save(model.state_dict(), path)."
    if not _is_archive(path):
        raise ValueError(
            f"{operation}: a .pt file must be a whole zip archive, as torch.save has written since "
            f"PyTorch 1.6; got {path} of {path.stat().st_size} bytes, which is cut off or older. "
            f"Copy it again, or load it in PyTorch and save it anew. {advice}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            twice = [n for n, count in Counter(archive.namelist()).items() if count > 1]
            if twice:
                raise _NamedTwiceError(twice[0])
            (pickled,) = [n for n in archive.namelist() if n.split("/", 1)[-1] == "data.pkl"]
            folder = pickled[: -len("data.pkl")]
            order = "little"
            if f"{folder}byteorder" in archive.namelist():
                order = archive.read(f"{folder}byteorder").decode()
            with archive.open(pickled) as file:
                found = _Reader(file).load()
            return _filled(found, archive, folder, order, {})
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{operation}: a file of weights must hold tensors, numbers and dicts alone, and "
            f"nothing else in it is executed; got {path}: {error}. {advice}"
        ) from error
    except _NamedTwiceError as error:
        raise ValueError(
            f"{operation}: every name in a file of weights must be there once; got {error} twice "
            f"in {path}. {advice}"
        ) from error
    except Exception as error:  # of a damaged archive or pickle, nearly any
        raise ValueError(
            f"{operation}: a .pt file must be whole; got {path}, which cannot be read: {error!r}. "
            f"Copy it again. {advice}"
        ) from error


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # the directory at its end is damaged
        return False


def _filled(found: Any, archive: zipfile.ZipFile, folder: str, order: str, read: dict) -> Any:
    """Nest of dicts and lists as it is found, with arrays in place of tensors."""
    if isinstance(found, dict):
        return {k: _filled(v, archive, folder, order, read) for k, v in found.items()}
    if isinstance(found, list | tuple):
        return [_filled(v, archive, folder, order, read) for v in found]
    if not isinstance(found, _Holder):
        return found
    kind, storage, offset, shape, strides = found.parts
    _, stored, key, _ = storage.parts
    if kind != "tensor":
        raise ValueError("a storage outside a tensor")
    if key not in read:
        flat = np.frombuffer(archive.read(f"{folder}data/{key}"), _STORAGES[stored])
        read[key] = flat if order == "little" else flat.byteswap()
    flat = read[key]
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    numbers = (offset, *shape, *strides)
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"a tensor with the shape {shape} and the strides {strides}")
    if prod(shape) and last >= flat.size:
        raise ValueError(f"a tensor reaches element {last} of {flat.size}")
    if not prod(shape):
        return np.zeros(shape, flat.dtype)
    steps = [s * flat.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()
