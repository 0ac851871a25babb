"""Input and output of the commands on networks: variables, state dicts, exported programs."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxnorm.cli.arguments import UsageError

TORCH = (".pt", ".pth", ".bin")


@contextlib.contextmanager
def user_errors(command: str) -> Iterator[None]:
    """Errors that the user can correct, without a traceback."""
    from flax.errors import FlaxError

    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError, FlaxError) as error:
        text = str(error)
        known = text.startswith((f"{command}:", "from_torch:", "to_torch:", "match_torch:"))
        if isinstance(error, ImportError) and not known:
            raise  # no package that the user must install, but a defect
        raise UsageError(text if known else f"{command}: {text}") from error


def surgery_tools() -> Any:
    """The package of tools, which the commands call."""
    from jaxnorm import tools

    return tools


def check_outputs(command: str, outputs: Sequence[str | None], source: str) -> None:
    """Refuse outputs that exist, lie within the input, or are the same."""
    from jaxnorm.tools.checkpoints import check_new

    new = [check_new(command, path, [source]) for path in outputs if path]
    if len(set(new)) < len(new):
        raise UsageError(
            f"{command}: each output must have a path of its own; got '{new[0]}' twice."
        )


def initial(command: str, model: Any, inputs: tuple[Any, ...]) -> Any:
    """First variables of a Linen module; None for an NNX module, which has its own."""
    import jax
    from flax import linen

    if not isinstance(model, linen.Module):
        return None
    return jax.jit(lambda *x: _initial(command, model, x, {}))(*inputs)


def restored(
    command: str,
    model: Any,
    path: str,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """The model and its collections from a checkpoint; None for an NNX module, which holds them."""
    import jax
    from flax import linen, nnx

    from jaxnorm.tools.checkpoints import matched, read_arrays

    arrays = read_arrays(command, path)
    is_linen = isinstance(model, linen.Module)
    if is_linen:
        like = jax.eval_shape(
            lambda args, kwargs: _initial(command, model, args, kwargs),
            inputs,
            dict(keywords or {}),
        )
    else:
        like = nnx.state(model)
    tree, beside = matched(command, path, arrays, like)
    if beside:
        print(f"Not read: {', '.join(beside)}.")
    if is_linen:
        return model, tree
    model = nnx.clone(model)
    nnx.update(model, tree)
    return model, None


def tree_of(model: Any, variables: Any) -> Any:
    """The content of a checkpoint: collections of a Linen module, or the state of an NNX module."""
    from flax import nnx

    return nnx.state(model) if variables is None else variables


def first_inputs(
    command: str, text: str, batches: Iterable[Any], inputs: Any
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Inputs and keyword inputs of the model in the first batch."""
    from jaxnorm.training.objective import take_inputs

    batch = next(iter(batches), None)
    if batch is None:
        raise UsageError(
            f"{command}: --data must have at least one batch; '{text}' has none. Give data like "
            "that of training."
        )
    return take_inputs(command, inputs, batch)


def exported(folded: Any, inputs: tuple[Any, ...], platforms: str | None) -> bytes:
    """A folded network with its variables, as a serialized program for inputs of these shapes."""
    import jax
    from flax import linen
    from jax import export

    from jaxnorm.models.adapt import in_evaluation

    def run(*args: Any) -> Any:
        if folded.variables is not None and not isinstance(folded.model, linen.Module):
            return folded.model.apply(folded.variables, *args)
        return in_evaluation("fold", folded.model, folded.variables, args, {})

    names = platforms.split(",") if platforms else None
    shapes = [jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)) for x in inputs]
    return bytes(export.export(jax.jit(run), platforms=names)(*shapes).serialize())


def table_of(state: Mapping[str, Any]) -> str:
    """The tensors of a state dict, a line each."""
    from jaxnorm.text import aligned

    rows = [(name, str(tuple(a.shape)), str(a.dtype)) for name, a in state.items()]
    return aligned([("tensor", "shape", "dtype"), *rows])


def state_dict_bytes(command: str, path: str, state: Mapping[str, Any]) -> bytes:
    """A state dict of PyTorch as the content of a file, in the format of its ending."""
    import numpy as np

    from jaxnorm.tools.checkpoints import safetensors_bytes

    if not path.endswith(TORCH):
        return safetensors_bytes(command, state)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{command}: the package torch must be installed to write '{path}'; it is not. Run: "
            "pip install torch, or write a .safetensors file."
        ) from error
    tensors = {}
    for name, value in state.items():
        array = np.array(value)  # torch wants memory of its own that can be written
        if array.dtype.name == "bfloat16":  # which NumPy has from another package
            tensors[name] = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            tensors[name] = torch.from_numpy(array)
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def written(command: str, outputs: Mapping[str, Any]) -> int:
    """Write all outputs, say so, and return the exit status."""
    from jaxnorm.tools.checkpoints import save_outputs

    save_outputs(command, outputs)
    for path in outputs:
        print(f"Written: {path}")
    return 0


def _initial(command: str, model: Any, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    import jax

    from jaxnorm.models.adapt import initial_variables

    if not inputs:
        raise UsageError(
            f"{command}: a Linen module must have an example input, from which its variables have "
            "their shapes; got none. Add --input, such as --input 1,32,32,3:float32."
        )
    try:
        found = initial_variables(command, model, jax.random.key(0), inputs, keywords)
    except Exception as error:  # whatever the code of the model raises
        if str(error).startswith(f"{command}:"):
            raise
        shapes = ", ".join(str(x.shape) for x in jax.tree.leaves((inputs, dict(keywords))))
        raise UsageError(
            f"{command}: the model must take the inputs that it is given; called with arrays of "
            f"the shapes {shapes} it raised {type(error).__name__}: {error} Give inputs that it "
            "takes."
        ) from error
    collections = {"params": found.params, "batch_stats": found.batch_stats, **found.model_state}
    return {name: tree for name, tree in collections.items() if jax.tree.leaves(tree)}
