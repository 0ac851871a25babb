"""Things that arguments of the command line name: a model, inputs, data, options."""

import importlib
import inspect
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxnorm.cli.arguments import UsageError

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
SPEC = re.compile(r"(\d+(?:,\d+)*)(?::(\w+))?")


def named_object(command: str, argument: str, text: str) -> Any:
    """The attribute of a module, as "module:attribute"; the current folder can be imported from."""
    if not NAME.fullmatch(text):
        raise UsageError(
            f"{command}: {argument} must be module:attribute; got '{text}'. For example "
            "networks:resnet, for resnet in the file networks.py of this folder."
        )
    module_name, _, attribute = text.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name is not None
        if absent and f"{module_name}.".startswith(f"{error.name}."):  # type: ignore[attr-defined]
            raise UsageError(
                f"{command}: {argument} must name a module that can be imported; there is no "
                f"{error.name!r} in '{here}' or among the installed packages. "  # type: ignore[attr-defined]
                "Change to the folder of the file, or install its package."
            ) from None
        raise UsageError(
            f"{command}: {argument} must name a module that can be imported; importing "
            f"{module_name} raised {type(error).__name__}: {error}. Correct the module: "
            f"python -c 'import {module_name}'"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = ", ".join(name for name in vars(found) if not name.startswith("_"))
            raise UsageError(
                f"{command}: {argument} must name an attribute of its module; '{text}' has no "
                f"{part!r}, and there are {names or 'none'}. Choose among these."
            )
        found = getattr(found, part)
    return found


def named_model(command: str, text: str) -> Any:
    """A Linen or NNX module: the attribute itself, or what it returns."""
    from flax import linen, nnx

    found = named_object(command, "--model", text)
    if isinstance(found, linen.Module | nnx.Module):
        return found
    if not callable(found):
        raise UsageError(_no_model(command, text, f"it is a {type(found).__name__}"))
    try:
        needed = {
            name
            for name, p in inspect.signature(found).parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
    except (TypeError, ValueError):
        needed = set()
    # Classes of NNX modules show no signature, and want their streams by this name.
    streams = {"rngs": nnx.Rngs(0)} if needed == {"rngs"} or _is_nnx_class(found) else {}
    if needed - set(streams):
        raise UsageError(_no_model(command, text, f"it takes {', '.join(sorted(needed))}"))
    try:
        model = found(**streams)
    except Exception as error:
        why = f"calling it raised {type(error).__name__}: {error}"
        raise UsageError(_no_model(command, text, why)) from error
    if not isinstance(model, linen.Module | nnx.Module):
        raise UsageError(_no_model(command, text, f"it returned a {type(model).__name__}"))
    return model


def example_inputs(command: str, texts: Iterable[str]) -> tuple[Any, ...]:
    """Example inputs: of a shape and dtype with random numbers, or the arrays of a file."""
    import numpy as np

    inputs: list[Any] = []
    for text in texts:
        if text.endswith((".npy", ".npz")):
            inputs += read_numpy(command, "--input", text).values()
            continue
        spec = SPEC.fullmatch(text)
        dtype = _dtype(spec[2] or "float32") if spec else None
        if spec is None or dtype is None:
            raise UsageError(
                f"{command}: --input must be a shape and a dtype, or a .npy or .npz file; got "
                f"'{text}'. For example 1,32,32,3:float32."
            )
        # Each input has a seed of its own, the same in every run.
        rng = np.random.default_rng(len(inputs))
        drawn = rng.normal(size=tuple(map(int, spec[1].split(","))))
        # Integers are mostly indices: 0 and 1 are within every table.
        inputs.append((drawn > 0 if dtype.kind in "iub" else drawn).astype(dtype))
    return tuple(inputs)


def read_numpy(command: str, argument: str, text: str) -> dict[str, Any]:
    """Arrays of a `.npy` or `.npz` file; nothing in it is unpickled."""
    import numpy as np

    try:
        with open(text, "rb") as file:  # NumPy leaves a file that is none of its own open
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"array": loaded}
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UsageError(
            f"{command}: {argument} must be a whole .npy or .npz file of arrays of numbers; "
            f"'{text}' cannot be read: {error}. Write it with numpy.save or numpy.savez."
        ) from error


def data_batches(
    command: str, text: str, size: int, names: tuple[str, ...] | None
) -> tuple[Iterable[Any], Callable[[Any], Any] | None]:
    """Batches from a file of arrays, or from an iterable that is named; they begin anew each time.

    Returns:
        The batches, and what takes the model's inputs out of one. A batch of a file is the tuple
        of inputs; a named one is taken apart as in training.
    """
    if not text.endswith((".npy", ".npz")):
        return _named_batches(command, text), None
    arrays = read_numpy(command, "--data", text)
    if names is None:
        names = tuple(arrays)
        if len(names) != 1:
            raise UsageError(
                f"{command}: the inputs of the model must be named where a file has several "
                f"arrays; '{text}' has {', '.join(names) or 'none'}. For example "
                f"--arrays {names[0] if names else 'x'}"
            )
    unknown = [name for name in names if name not in arrays]
    if unknown:
        raise UsageError(
            f"{command}: --arrays must name arrays of the file; '{text}' has "
            f"{', '.join(arrays)}, and not {', '.join(unknown)}. Choose among these."
        )
    chosen = [arrays[name] for name in names]
    rows = {array.shape[:1] for array in chosen}
    if len(rows) != 1 or rows == {()} or rows == {(0,)}:
        shapes = ", ".join(f"{n} {a.shape}" for n, a in zip(names, chosen))
        raise UsageError(
            f"{command}: the arrays of --data must have equally many examples, and at least one; "
            f"got {shapes} in '{text}'. The first axis is that of the examples."
        )
    return ArrayBatches(chosen, size), lambda batch: batch


def _named_batches(command: str, text: str) -> Any:
    found = named_object(command, "--data", text)
    if callable(found) and not isinstance(found, Iterable):
        found = CalledBatches(found)
    if not isinstance(found, Iterable):
        raise UsageError(
            f"{command}: --data must be a .npy or .npz file, or name an iterable of batches or a "
            f"function that returns one; '{text}' gives a {type(found).__name__}. Make it a list, "
            "or a generator function."
        )
    if isinstance(found, Iterator):
        raise UsageError(
            f"{command}: --data must begin anew each time that it is read; '{text}' is a "
            f"{type(found).__name__}, which is used up after once. Name the function that makes it."
        )
    return found


class CalledBatches:
    """Batches of a function that returns an iterable, which is called for each pass."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def __iter__(self) -> Iterator[Any]:
        yield from self._function()


class ArrayBatches:
    """Batches of the rows of arrays, in order; the last may be smaller."""

    def __init__(self, arrays: list[Any], size: int) -> None:
        self._arrays = arrays
        self._size = size

    def __len__(self) -> int:
        return -(-len(self._arrays[0]) // self._size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self._arrays[0]), self._size):
            yield tuple(array[start : start + self._size] for array in self._arrays)


# Arguments of `jaxnorm.tools.from_torch`, and their kinds in JSON.
TORCH_OPTIONS: dict[str, type] = {
    "names": dict, "flattened": dict, "scale_offset": dict, "running_var_count": dict,
    "conv1d": list, "skip": list, "keep": list,
}  # fmt: skip


def torch_options(command: str, text: str | None) -> dict[str, Any]:
    """Arguments of `jaxnorm.tools.from_torch`, from a file of JSON."""
    if text is None:
        return {}
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
        why = f"a {type(found).__name__}" if not isinstance(found, dict) else ""
    except (OSError, ValueError) as error:
        found, why = {}, str(error)
    if not why:
        wrong = [n for n, v in found.items() if not isinstance(v, TORCH_OPTIONS.get(n, ()))]
        why = f"{', '.join(wrong)}" if wrong else ""
    if why:
        kinds = ", ".join(f"{n} ({k.__name__})" for n, k in TORCH_OPTIONS.items())
        raise UsageError(
            f"{command}: --options must be a file of JSON with one object, of {kinds}; got {why} "
            f'in \'{text}\'. For example {{"names": {{"layer1.*": "block_1/*"}}}}.'
        )
    windows = found.get("flattened", {})
    if windows:
        shapes = {name: tuple(w) if isinstance(w, list) else w for name, w in windows.items()}
        found = {**found, "flattened": shapes}
    return found


def _is_nnx_class(found: Any) -> bool:
    from flax import nnx

    return isinstance(found, type) and issubclass(found, nnx.Module)


def _no_model(command: str, text: str, why: str) -> str:
    return (
        f"{command}: --model must name a Linen or NNX module, or a function without arguments that "
        f"returns one; '{text}' is none, for {why}. Write one: def model(): return Net(...)"
    )


def _dtype(name: str) -> Any:
    import jax.numpy as jnp

    try:
        return jnp.dtype(name)
    except TypeError:
        return None
