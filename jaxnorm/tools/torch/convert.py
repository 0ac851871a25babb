"""Weights of a whole model from PyTorch, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from jaxnorm.tools.torch import naming
from jaxnorm.tools.torch.assignment import TorchAssignment
from jaxnorm.tools.torch.matching import assign
from jaxnorm.tools.torch.pairs import Options
from jaxnorm.tools.torch.sources import read
from jaxnorm.tools.torch.targets import tree_of


def match_torch(
    source: Any,
    model: Any,
    *args: Any,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, tuple[int, ...] | None] | None = None,
    conv1d: Sequence[str] = (),
    scale_offset: Mapping[str, float] | None = None,
    running_var_count: Mapping[str, float] | None = None,
    skip: Sequence[str] = (),
    keep: Sequence[str] = (),
    order: Sequence[str] | None = None,
) -> TorchAssignment:
    """Assign the weights of a PyTorch model to the variables of a Flax model.

    Nothing is converted. Layers are matched by `names`, all others by their order and shapes
    within each kind: convolutions, transposed convolutions, dense layers, embeddings, norms,
    attentions, lone parameters. PyTorch's order is that of the state dict. Flax's is that in which
    an example passes through the model. Without an example it is the order of definition.

    Args:
        source: path of a .safetensors, .pt, .pth or .bin file; a dict of arrays or tensors; or a
            `torch.nn.Module`, whose epsilons, paddings and strides are compared, too.
        model: a Linen or NNX module.
        *args: for Linen the variables, then an example, the inputs of the model; for NNX an
            example alone. The example may be left out.
        names: pattern of PyTorch's layer -> pattern of Flax's path; {i} stands for one part of a
            name, and {i+1} for the number after it.
        flattened: pattern of a dense layer in PyTorch -> (channels, *window) of the map that is
            flattened before it, or None if there is none.
        conv1d: patterns of dense layers whose weight is (inputs, outputs), as GPT-2's.
        scale_offset: pattern of a norm in PyTorch -> what it adds to its weight, such as 1.0.
        running_var_count: pattern of a norm in PyTorch -> the n of its variance with n - 1.
        skip: patterns of PyTorch's names that go nowhere.
        keep: patterns of Flax's layers that keep their values.
        order: list(state_dict) of PyTorch's model, for a source that has lost this order, as
            .safetensors files have.

    Returns:
        The assignment. `str` of it is a table; `.notes` says what cannot be seen in weights.

    Raises:
        TypeError: source or model are of no known kind.
        ValueError: something is left over on either side or does not fit; layers compute
            something else; the source is damaged, holds code, or holds values that are not finite.

    Source: the layouts of `torch.nn` and `flax.linen`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
        >>> model, x = nn.Dense(3), jnp.ones((1, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> state = {"fc.weight": np.ones((3, 2)), "fc.bias": np.zeros(3)}
        >>> print(match_torch(state, model, variables, x))
        torch      shape   flax           shape   how
        fc.bias    (3,)    params/bias    (3,)    as it is
        fc.weight  (3, 2)  params/kernel  (2, 3)  transposed
    """
    options = _options(names, flattened, conv1d, scale_offset, running_var_count, skip, keep)
    return _matched("match_torch", source, model, args, options, order)[0]


def from_torch(
    source: Any,
    model: Any,
    *args: Any,
    show: Callable[[TorchAssignment], Any] | None = print,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, tuple[int, ...] | None] | None = None,
    conv1d: Sequence[str] = (),
    scale_offset: Mapping[str, float] | None = None,
    running_var_count: Mapping[str, float] | None = None,
    skip: Sequence[str] = (),
    keep: Sequence[str] = (),
    order: Sequence[str] | None = None,
) -> Any:
    """Fill the variables of a Flax model with the weights of a PyTorch model.

    Kernels are transposed, convolutions from OIHW to HWIO; weight and spectral normalization are
    resolved to the weights they give. The model itself must compute what PyTorch's does, in
    channels-last layout; what can be compared is compared.

    Args:
        source: see `match_torch`.
        model: see `match_torch`.
        *args: see `match_torch`.
        show: is given the whole assignment before anything is applied; None for nothing.
        names: see `match_torch`.
        flattened: see `match_torch`.
        conv1d: see `match_torch`.
        scale_offset: see `match_torch`.
        running_var_count: see `match_torch`.
        skip: see `match_torch`.
        keep: see `match_torch`.
        order: see `match_torch`.

    Returns:
        For Linen new variables with the same structure, dtypes, boxes and shardings; for NNX a
        new model.

    Raises:
        TypeError: see `match_torch`.
        ValueError: see `match_torch`.

    Source: the layouts of `torch.nn` and `flax.linen`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
        >>> model, x = nn.Dense(3), jnp.ones((1, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> state = {"fc.weight": np.arange(6.0).reshape(3, 2), "fc.bias": np.zeros(3)}
        >>> new = from_torch(state, model, variables, x, show=None)
        >>> print(new["params"]["kernel"])
        [[0. 2. 4.] [1. 3. 5.]]
    """
    options = _options(names, flattened, conv1d, scale_offset, running_var_count, skip, keep)
    assignment, tree = _matched("from_torch", source, model, args, options, order)
    if show is not None:
        show(assignment)
    new: dict[Any, Any] = {}
    for move in assignment:
        value = move.layout.to_flax(assignment.arrays[move.key])
        new[move.path] = _like(move.key, tree.leaves[move.path], value)
    return tree.filled(new)


def to_torch(
    model: Any,
    variables: Any = None,
    *example: Any,
    like: TorchAssignment | None = None,
    tensors: bool = False,
) -> dict[str, Any]:
    """Write the variables of a Flax model as a state dict of PyTorch.

    Args:
        model: a Linen or NNX module.
        variables: collections of a Linen module; for NNX the first input of an example, or None.
        *example: inputs of the model, for the order of execution. Without them layers come in the
            order of definition.
        like: the assignment by which weights came from PyTorch, of `match_torch`. The state dict
            has its names, order, shapes and dtypes, and what went nowhere is as it was. Without
            it the names are Flax's paths. A weight or spectral normalization that was resolved
            stays so: the plain weight is written.
        tensors: give tensors, which needs PyTorch, and not NumPy arrays.

    Returns:
        Name -> array. Back and forth in one dtype is exact, bit for bit, but where numbers were
        converted (`scale_offset`, `running_var_count`).

    Raises:
        TypeError: model or variables are of no known kind.
        ValueError: `like` is of another model, or PyTorch is not installed.

    Source: the layouts of `torch.nn` and `flax.linen`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Conv(4, (3, 3)), nn.LayerNorm()])
        >>> variables = model.init(jax.random.key(0), x := jnp.ones((1, 5, 5, 2)))
        >>> {name: array.shape for name, array in to_torch(model, variables, x).items()}
        {'layers_0.weight': (4, 2, 3, 3), 'layers_0.bias': (4,),
         'layers_1.weight': (4,), 'layers_1.bias': (4,)}
    """
    if not isinstance(model, linen.Module):
        example = (() if variables is None else (variables,)) + example
        variables = None
    tree = tree_of("to_torch", model, variables)
    if like is None:
        like = naming.assignment_of("to_torch", model, variables, tree, example)
    found = {key: np.array(like.arrays[key]) for key in like.order}
    for move in like:
        shape = getattr(tree.leaves.get(move.path), "shape", None)
        if shape is None or tuple(shape) != move.layout.flax_shape:
            raise ValueError(
                f"to_torch: like must be an assignment of this model; got one with "
                f"{'/'.join(move.path)} {move.layout.flax_shape}, which has the shape {shape} "
                "here. Make it anew with match_torch."
            )
        move.layout.to_torch(np.asarray(tree.leaves[move.path]), found[move.key])
    if not tensors:
        return found
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "to_torch: tensors=True needs PyTorch; got an environment without it. Run: pip "
            "install torch, or take the arrays with tensors=False."
        ) from error
    return {key: _tensor(torch, value) for key, value in found.items()}


def _tensor(torch: Any, value: np.ndarray) -> Any:
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _options(*values: Any) -> Options:
    names, flattened, conv1d, scale_offset, running_var_count, skip, keep = values
    maps = (names or {}, flattened or {}, conv1d, scale_offset or {}, running_var_count or {})
    return Options(*maps, skip, keep)


def _matched(
    operation: str, source: Any, model: Any, args: tuple[Any, ...], options: Options, order: Any
) -> Any:
    variables, example = None, args
    if isinstance(model, linen.Module):
        if not args:
            raise TypeError(
                f"{operation}: a Linen model must come with its variables; got none for "
                f"{type(model).__name__}. Pass what model.init returns after the model."
            )
        variables, example = args[0], args[1:]
    tree = tree_of(operation, model, variables)
    read_source = read(operation, source, order)
    return assign(operation, read_source, model, variables, tree, example, options), tree


def _like(name: str, leaf: Any, value: np.ndarray) -> Any:
    """A value in the dtype and place of a leaf."""
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(value).reshape(value.shape).astype(leaf.dtype)
    if not np.isfinite(narrow.astype(np.complex128)).all():
        raise ValueError(
            f"from_torch: every weight must fit the dtype of its variable; got {name} with values "
            f"up to {np.abs(value.astype(np.complex128)).max():.3g} for {leaf.dtype}. Initialize "
            "the model with a wider param_dtype."
        )
    value = narrow
    if isinstance(leaf, np.ndarray):
        return value
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.device_put(value, leaf.sharding)
    return jnp.asarray(value)
