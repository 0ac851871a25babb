"""Sources of PyTorch weights: files, dicts and modules, all read into NumPy arrays."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxnorm.tools.torch.pickled import read_pickled

_SAFE_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Arrays by PyTorch's names, with the modules where these are known.

    Attributes:
        arrays: name -> array, in the order of the source.
        modules: name -> `torch.nn.Module`; None if only arrays are known.
        notes: what was done while reading.
        ordered: the order of the arrays is that of the model.
    """

    arrays: dict[str, np.ndarray]
    modules: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    ordered: bool = True


def read(operation: str, source: Any, order: Sequence[str] | None = None) -> Source:
    """Read weights from a path, a dict or a module.

    Args:
        operation: the public function that is being called; errors begin with it.
        source: the path, dict or module.
        order: all names in the order of the model; None for that of the source.

    Raises:
        TypeError, ValueError: it is none of these, or is damaged, or a value is not finite.
    """
    notes: list[str] = []
    modules = None
    if isinstance(source, str | Path):
        found = _from_file(operation, Path(source))
    elif isinstance(source, Mapping):
        found = source
    elif hasattr(source, "state_dict") and hasattr(source, "named_modules"):
        found, modules = source.state_dict(), dict(source.named_modules())
    else:
        raise TypeError(
            f"{operation}: source must be a path, a dict of arrays or a torch.nn.Module; got "
            f"{type(source).__name__}. Pass model.state_dict()."
        )
    ordered = order is not None or not str(source).endswith(".safetensors")
    found = _weights(operation, found, notes)
    if order is not None:
        differing = sorted(set(found) ^ set(order))
        if differing:
            raise ValueError(
                f"{operation}: order must hold the names of the source; got {len(order)} names "
                f"for {len(found)} arrays, and only one of the two has {', '.join(differing)}. "
                "Pass list(model.state_dict())."
            )
        found = {name: found[name] for name in order}
    elif not ordered:
        found = dict(sorted(found.items(), key=lambda item: by_number(item[0])))
    arrays = {name: as_numpy(operation, name, value) for name, value in found.items()}
    for name, array in arrays.items():
        inexact = array.dtype.kind in "fcV"  # V: the dtypes of ml_dtypes
        if inexact and not np.isfinite(array.astype(np.complex128)).all():
            bad = int((~np.isfinite(array.astype(np.complex128))).sum())
            raise ValueError(
                f"{operation}: every weight must be finite; got {bad} of {array.size} values of "
                f"{name} {array.shape} that are not. Take the weights of an earlier step."
            )
    return Source(arrays, modules, notes, ordered)


def by_number(name: str) -> list[tuple[int, int | str]]:
    """A key by which layer.2 is sorted before layer.10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def as_numpy(operation: str, name: str, value: Any) -> np.ndarray:
    """An array from a NumPy or JAX array or a PyTorch tensor, bit for bit."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().contiguous()
        if str(value.dtype) == "torch.bfloat16":
            int16 = importlib.import_module("torch").int16
            return value.view(int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise TypeError(
            f"{operation}: every value of source must be an array or a tensor; got "
            f"{type(value).__name__} at {name!r}. Pass the dict of the weights alone."
        )
    return np.asarray(value)


def _from_file(operation: str, path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{operation}: source must be a file that exists; got {path}. Check the path."
        )
    if path.suffix in (".pt", ".pth", ".bin"):
        return read_pickled(operation, path)
    if path.suffix == ".safetensors":
        return _from_safetensors(operation, path)
    raise ValueError(
        f"{operation}: a file of weights must end with .safetensors, .pt, .pth or .bin; got "
        f"{path}. Rename it, or pass a dict of arrays."
    )


def _from_safetensors(operation: str, path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import deserialize
    except ImportError as error:
        raise ValueError(
            f"{operation}: a .safetensors file needs the package safetensors; got {path}, and it "
            'is not installed. Run: pip install safetensors  (or "jaxnorm[torch]").'
        ) from error
    content = path.read_bytes()

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is there twice")
        return dict(pairs)

    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length], object_pairs_hook=once)
        header.pop("__metadata__", None)
        parts = dict(deserialize(content))
        found = {}
        for name in header:
            part = parts[name]
            dtype = _SAFE_TYPES[part["dtype"]]
            found[name] = np.frombuffer(part["data"], dtype).reshape(part["shape"])
        return found
    except Exception as error:  # of a damaged file, nearly any
        raise ValueError(
            f"{operation}: a .safetensors file must be whole, with every name once and a dtype "
            f"among {', '.join(_SAFE_TYPES)}; got {path} of {len(content)} bytes: {error!r}. "
            "Copy or write it again."
        ) from error


def _weights(operation: str, found: Any, notes: list[str]) -> dict[str, Any]:
    """The dict of arrays in what a file holds: itself, or the only one within a checkpoint."""

    def holds_arrays(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(k, str) and hasattr(v, "shape") for k, v in value.items())
        )

    if holds_arrays(found):
        return dict(found)
    inner = {k: v for k, v in found.items() if holds_arrays(v)} if isinstance(found, dict) else {}
    if len(inner) == 1:
        [(key, value)] = inner.items()
        notes.append(f"The weights are those under {key!r}; the rest of the source is not read.")
        return dict(value)
    shown = (
        f"a dict with {', '.join(map(repr, list(found)[:8]))}"
        if isinstance(found, Mapping)
        else type(found).__name__
    )
    raise ValueError(
        f"{operation}: source must hold one dict of arrays by name, at least one; got {shown or 0}"
        f"{' and ' + str(len(inner)) + ' dicts of arrays in it' if inner else ''}. Pass the dict "
        "of the weights, model.state_dict()."
    )
