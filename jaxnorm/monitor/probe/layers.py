"""Marks on the input and on the output of every layer of a model that is wanted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxnorm.models.calls import Path
from jaxnorm.models.select import NORM_TYPES
from jaxnorm.monitor.probe.marks import FENCE, VALUE, Place, mark

# Layers whose bias is subtracted again by a batch norm that follows.
AFFINE_TYPES = (
    *(linen.Dense, linen.DenseGeneral, linen.Conv, linen.ConvTranspose, linen.ConvLocal),
    *(nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose),
)
# Fields of a layer that become facts of its place, where the layer has them.
FIELDS = ("epsilon", "momentum", "use_running_average", "num_groups", "group_size", "dtype",
          "param_dtype", "force_float32_reductions", "virtual_batch_size")  # fmt: skip

Wanted = Callable[[str, Any], bool]
"""A function of a layer's path and its module: True if the layer is to be marked."""


class _Trace(threading.local):
    """The knowledge about a model while it is traced."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        # By its identity, what an affine layer returned (kept, so that the identity is its own),
        # the layer's path, and the axes along which its bias varies; None without a bias.
        self.fed: dict[int, tuple[Any, str, tuple[int, ...] | None]] = {}


_trace = _Trace()


@contextlib.contextmanager
def seen_layers() -> Iterator[list[str]]:
    """Collect the paths of all layers that are called within it, wanted or not."""
    outer = _trace.layers, _trace.fed
    _trace.layers, _trace.fed = [], {}
    try:
        yield _trace.layers
    finally:
        _trace.layers, _trace.fed = outer


@dataclass(frozen=True)
class Marking:
    """The hook that marks the layers that are wanted; see `jaxnorm.models.calls`."""

    wanted: Wanted

    def __call__(self, call, path: Path, module: Any, args, kwargs):
        """Call a layer, with marks if it is wanted."""
        name = "/".join(path) or type(module).__name__
        return _called(call, name, module, self.wanted(name, module), args, kwargs)


def _called(call, path: str, module: Any, wanted: bool, args, kwargs):
    """Call a layer, with marks on its first argument and on its result."""
    _trace.layers.append(path)
    if not args and "x" in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("x"),)
    role = VALUE if wanted else FENCE
    place = Place(path, type(module).__name__, "input", is_norm=isinstance(module, NORM_TYPES))
    marked = (wanted or place.is_norm) and bool(args) and _is_floating(args[0])
    if marked:
        place, beside = _place(place, module, args, kwargs)
        args = (mark(args[0], place, *beside, role=role), *args[1:])
    result = call(*args, **kwargs)
    if isinstance(module, AFFINE_TYPES) and _is_floating(result):
        _trace.fed[id(result)] = result, path, _bias_axes(module, result.ndim)
    first, *rest = result if isinstance(result, tuple) else (result,)
    if not marked or not _is_floating(first):
        return result
    first = mark(first, replace(place, side="output"), role=role)
    return (first, *rest) if isinstance(result, tuple) else first


def _place(place: Place, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Place, list[Any]]:
    """The place with what is known of the layer, and its running statistics if it has any."""
    x = args[0]
    facts = {name: _plain(getattr(module, name)) for name in FIELDS if hasattr(module, name)}
    facts |= {"shape": tuple(x.shape), "input_dtype": jnp.dtype(x.dtype).name}
    if not type(module).__module__.startswith("flax."):
        facts.pop("force_float32_reductions", None)  # jaxnorm's are of float32 whatever it says
    if kwargs.get("mask") is not None:
        facts["masked"] = True
    beside = []
    if isinstance(module, linen.BatchNorm | nnx.BatchNorm):
        frozen = args[1] if len(args) > 1 else kwargs.get("use_running_average")
        if frozen is not None:
            facts["use_running_average"] = bool(frozen)
        axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
        facts["feature_axes"] = tuple(sorted(a % x.ndim for a in axes))
        if id(x) in _trace.fed:
            _, facts["fed_by"], varies = _trace.fed[id(x)]
            # Only a bias that is constant in a channel is subtracted with the channel's mean.
            facts["fed_by_bias"] = varies is not None and set(varies) <= set(facts["feature_axes"])
        # Masked elements are in the array, but not in the statistics.
        beside = [] if "masked" in facts else _running(module)
        if beside:
            facts["running_dtype"] = jnp.dtype(beside[0].dtype).name
    return replace(place, facts=tuple(facts.items())), beside


def _bias_axes(module: Any, ndim: int) -> tuple[int, ...] | None:
    """The axes of a layer's result along which its bias varies; None without a bias."""
    if isinstance(module, linen.Module):
        bias = module.get_variable("params", "bias")
    else:
        bias = getattr(module, "bias", None)
    # The bias of a batched layer has axes that do not lie side by side in the result.
    if bias is None or getattr(module, "batch_dims", ()) or getattr(module, "batch_axis", ()):
        return None
    shape = jnp.shape(bias)
    return tuple(ndim - len(shape) + axis for axis, size in enumerate(shape) if size > 1)


def _running(module: Any) -> list[Any]:
    """Running mean and variance, before the call changes them."""
    if isinstance(module, nnx.BatchNorm):
        return [module.mean[...], module.var[...]]
    # At initialization there are none yet.
    if not module.has_variable("batch_stats", "mean"):
        return []
    return [module.get_variable("batch_stats", name) for name in ("mean", "var")]


def _is_floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and jnp.ndim(x) > 0


def _plain(value: Any) -> Any:
    """A value that JSON can store, or else the name of the value."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        return jnp.dtype(value).name
    except TypeError:
        return getattr(value, "__name__", type(value).__name__)
