"""Checkpoints of a model's variables: Orbax folders, and `.safetensors` files.

What is read is a dict of arrays by name, whoever wrote it; `matched` puts them into the tree of a
model. What is written exists whole or not at all, and nothing that exists is ever replaced.

Names are the keys of the tree, joined by "/". A file may join them by "." instead.
"""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SAFETENSORS = ".safetensors"
# What `jaxnorm.training` puts around the variables of a model.
_OF_STATE = ("params", "batch_stats", "model_state")


def read_arrays(operation: str, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint by name, on the host.

    Args:
        operation: what is being done; errors begin with it.
        path: a `.safetensors` file, or a folder that Orbax has written: that of a tree, of a step
            of a `CheckpointManager`, or of a step of `jaxnorm.training.Checkpoints`.

    Raises:
        ValueError: there is no checkpoint, or none that can be read whole.
        ImportError: the package safetensors is needed and not installed.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tree("save", Path(folder) / "new", {"params": {"scale": jnp.ones(3)}})
        ...     read_arrays("read", Path(folder) / "new")
        {'params/scale': array([1., 1., 1.], dtype=float32)}
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise ValueError(
            f"{operation}: a checkpoint must be a folder of Orbax or a {SAFETENSORS} file; got "
            f"'{path}', which is not there. Give the path of one."
        )
    if path.is_dir():
        found = _read_orbax(operation, path)
    elif path.suffix == SAFETENSORS:
        found = _read_safetensors(operation, path)
    else:
        raise ValueError(
            f"{operation}: a checkpoint must be a folder of Orbax or a {SAFETENSORS} file; got the "
            f"file '{path}'. For a file of PyTorch, use jaxnorm convert."
        )
    arrays: dict[str, np.ndarray] = {}
    for name, array in found.items():
        plain = _normal(name)
        if plain in arrays:
            raise ValueError(
                f"{operation}: every array of a checkpoint must have a name of its own; '{path}' "
                f"holds {plain!r} twice, once with other separators. Remove one of the two."
            )
        arrays[plain] = array
    if not arrays:
        raise ValueError(
            f"{operation}: a checkpoint must hold arrays; '{path}' holds none. Give another path."
        )
    return arrays


def matched(
    operation: str, path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], like: Any
) -> tuple[Any, list[str]]:
    """The tree of a model with the arrays of a checkpoint.

    Args:
        operation: what is being done; errors begin with it.
        path: where the arrays come from, for errors.
        arrays: result of `read_arrays`.
        like: collections of a Linen module or state of an NNX module, with arrays or their shapes.
            Boxes and NNX variables are kept. Random streams of NNX keep the values that they have
            if the checkpoint has none.

    Returns:
        The tree, with the dtypes of the checkpoint; and the names of what is beside the variables
        of the model, such as the state of an optimizer, which is not read.

    Raises:
        ValueError: the checkpoint lacks an array of the model, has one that the model does not
            have, or one of another shape.

    Example:
        >>> arrays = {"params/scale": np.ones(3, np.float32), "step": np.zeros(())}
        >>> matched("read", "run/10", arrays, {"params": {"scale": jnp.zeros(3)}})
        ({'params': {'scale': Array([1., 1., 1.], dtype=float32)}}, ['step'])
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    linen = not isinstance(like, nnx.State)
    found: dict[str, str] = {}  # name in the model -> name in the checkpoint
    missing, shapes, values = [], [], []
    for keys, leaf in leaves:
        name = name_of(keys)
        at = _place(name, arrays, linen)
        values.append(leaf)
        if at is None:
            missing += [] if _random(leaf) or _counts(like, keys) else [name]
            continue
        found[name] = at
        array = arrays[at]
        if _random(leaf):
            continue  # a stream begins anew: an evaluation draws nothing
        if tuple(array.shape) != tuple(leaf.shape):
            shapes.append(f"{name} {tuple(array.shape)}, not {tuple(leaf.shape)}")
        values[-1] = array
    prefixes = {at.split("/")[0] for name, at in found.items() if linen or at != name}
    unread = sorted(set(arrays) - set(found.values()))
    own = not linen and not prefixes  # the state of an NNX module, with nothing around it
    extra = [name for name in unread if own or not prefixes or name.split("/")[0] in prefixes]
    if missing or extra or shapes:
        raise ValueError(
            f"{operation}: the checkpoint must hold the variables of the model; '{path}' "
            + "; ".join(
                f"{what} {_first(names)}"
                for what, names in (
                    ("lacks", missing),
                    ("has besides", extra),
                    ("has other shapes:", shapes),
                )
                if names
            )
            + ". Name the model that it was written from."
        )
    values = [jnp.asarray(v) if isinstance(v, np.ndarray) else v for v in values]
    beside = sorted({name.split("/")[0] for name in unread})
    return jax.tree_util.tree_unflatten(tree, values), beside


def check_new(
    operation: str, path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """The absolute path of an output, which must not exist, nor lie within an input.

    Raises:
        ValueError: it exists, lies within an input, or in what is not a folder.

    Example:
        >>> check_new("fold", "/")
        Traceback (most recent call last):
        ValueError: fold: an output must be a new path; '/' exists. Choose another: nothing that
        exists is replaced.
    """
    new = Path(os.path.abspath(path))
    if os.path.lexists(new):
        raise ValueError(
            f"{operation}: an output must be a new path; '{new}' exists. Choose another: nothing "
            "that exists is replaced."
        )
    for each in inputs:
        if new.resolve().is_relative_to(Path(each).resolve()):
            raise ValueError(
                f"{operation}: an output must not lie within an input; '{new}' lies within "
                f"'{each}'. Choose a path outside it."
            )
    above = next(parent for parent in new.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"{operation}: an output must lie in a folder that can be written; got '{new}', and "
            f"'{above}' {'cannot be written' if above.is_dir() else 'is a file'}. Choose another."
        )
    return new


def save_tree(operation: str, path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree of variables as a folder of Orbax, or as a `.safetensors` file.

    Args:
        operation: what is being done; errors begin with it.
        path: a new path. Its suffix chooses the format.
        tree: collections of a Linen module, or state of an NNX module. A folder holds it as
            `orbax.checkpoint.StandardCheckpointer` saves it; a file holds no random keys.

    Raises:
        ValueError: the path exists.
        ImportError: the package safetensors is needed and not installed.
        OSError: it cannot be written. Nothing is there then.
    """
    save_outputs(operation, {path: tree})


def save_outputs(operation: str, outputs: Mapping[Any, Any]) -> None:
    """Write several outputs, trees or bytes, of which none gets its name before all are written.

    Args:
        operation: what is being done; errors begin with it.
        outputs: new path -> bytes, or a tree as for `save_tree`.

    Raises:
        ValueError, ImportError, OSError: as of `save_tree`.
    """
    with contextlib.ExitStack() as cleaning:
        written = []
        for path, content in outputs.items():
            path = check_new(operation, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
            temporary = folder / path.name
            try:
                _writer(operation, path, content)(temporary)
            except (ValueError, OSError) as error:
                raise OSError(
                    f"{operation}: '{path}' could not be written: {error}. Nothing was left "
                    "there. Look at the free space and the permissions."
                ) from error
            written.append((temporary, path))
        for temporary, path in written:
            _give_name(operation, temporary, path)


def safetensors_bytes(operation: str, arrays: Mapping[str, Any]) -> bytes:
    """Arrays in the format of a `.safetensors` file, under the names that they have.

    Raises:
        ImportError: the package safetensors is not installed.
    """
    # In C order, since the file takes the memory as it is.
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors(operation).save(ordered)


def name_of(keys: Iterable[Any]) -> str:
    """The name of a leaf, without what boxes and NNX variables put at its end.

    Example:
        >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path({"params": [1.0]})
        >>> name_of(keys)
        'params/0'
    """
    parts: list[str] = []
    for key in keys:
        part = next(getattr(key, n) for n in ("key", "idx", "name") if hasattr(key, n))
        if isinstance(part, str) and part.startswith("('") and part.endswith(")"):
            part = ast.literal_eval(part)  # Orbax writes a key that is a tuple so
        parts += map(str, part) if isinstance(part, tuple) else [str(part)]
    return _normal("/".join(parts))


def safetensors(operation: str) -> Any:
    """The module `safetensors.numpy`, or the error that says how to install it."""
    try:
        import safetensors.numpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{operation}: the package safetensors must be installed for {SAFETENSORS} files; it "
            "is not. Run: pip install safetensors"
        ) from error
    return safetensors.numpy


def _read_safetensors(operation: str, path: Path) -> dict[str, np.ndarray]:
    reader = safetensors(operation)
    try:
        return reader.load_file(path)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the package has exceptions of its own, and keys of unknown types
        raise ValueError(
            f"{operation}: a {SAFETENSORS} file must be whole; '{path}' cannot be read: {error}. "
            "Fetch it again."
        ) from error


def _read_orbax(operation: str, path: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    folder = _item(operation, path)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            described = reader.metadata(folder).item_metadata.tree  # type: ignore[union-attr]
            # Arrays on the host: the devices that wrote them need not be here.
            as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
            tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_arrays))
    except MemoryError:
        raise
    except Exception as error:  # of any class: TensorStore raises a bare Exception
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{operation}: a checkpoint must be whole; '{folder}' cannot be read: {text}. Take "
            "another, or copy it again."
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(keys): leaf for keys, leaf in leaves if hasattr(leaf, "shape")}


def _item(operation: str, path: Path) -> Path:
    """The folder of the tree within the folder of a checkpoint."""

    def items(folder: Path) -> list[Path]:
        return sorted(child for child in folder.iterdir() if (child / "_METADATA").is_file())

    if (path / "_METADATA").is_file():
        return path
    found = items(path)
    if len(found) == 1:
        return found[0]
    steps = [child for child in path.iterdir() if child.is_dir() and items(child)]
    what, names, example = "is no checkpoint", "", "the folder that Orbax wrote"
    if found or steps:
        newest = max(steps or found, key=lambda child: (len(child.name), child.name))
        what = f"holds {_first([child.name for child in sorted(steps or found)])}"
        example = f"one of them, such as '{newest}'"
    raise ValueError(
        f"{operation}: a checkpoint must be the folder of one tree; '{path}' {what}{names}. Give "
        f"{example}."
    )


def _normal(name: str) -> str:
    return name.replace(".", "/").removesuffix("/value")


def _place(name: str, arrays: Mapping[str, Any], linen: bool) -> str | None:
    """The name in a checkpoint of an array of the model, None if it has none."""
    candidates = [name, *(f"{field}/{name}" for field in _OF_STATE[2 if linen else 0 :])]
    return next((each for each in candidates if each in arrays), None)


def _random(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _counts(like: Any, keys: Any) -> bool:
    """True for the counter of a random stream of NNX."""
    node = like
    for key in keys:
        if isinstance(node, nnx.Variable):
            break
        node = node[key.key]
    return isinstance(node, nnx.RngState)


def _first(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _writer(operation: str, path: Path, content: Any) -> Callable[[Path], None]:
    """A function that writes an output at a path."""
    if isinstance(content, bytes):
        return lambda at: _write_bytes(at, content)
    if path.suffix == SAFETENSORS:
        packed = safetensors_bytes(operation, flat_arrays(content))
        return lambda at: _write_bytes(at, packed)

    def write(at: Path) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(at, content)

    return write


def flat_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Arrays of a tree on the host, by name, without random keys.

    Example:
        >>> flat_arrays({"params": {"scale": jnp.ones(2)}})
        {'params/scale': array([1., 1.], dtype=float32)}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(keys): np.asarray(leaf) for keys, leaf in leaves if not _random(leaf)}


def _write_bytes(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _give_name(operation: str, temporary: Path, path: Path) -> None:
    """Give a file or folder its name, unless something has got that name meanwhile."""
    check_new(operation, path)
    if temporary.is_dir():
        temporary.rename(path)
    else:
        os.link(temporary, path)  # unlike a rename, it never replaces a file
