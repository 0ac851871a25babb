"""Marks on a model of Linen or NNX, so that a program which runs it can be observed."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen, nnx

from jaxnorm._jax import run_program
from jaxnorm.monitor.probe.layers import NORM_TYPES, derived, intercepted, seen_layers
from jaxnorm.monitor.probe.observe import on_arrays
from jaxnorm.monitor.probe.places import Marker
from jaxnorm.training.models import Model, Variables, adapt, build

Layers = str | type | Callable[[str, str], bool] | Sequence[str | type]


@dataclass(frozen=True)
class Selection:
    """The layers and nonlinearities to be observed.

    Attributes:
        layers: None, a function, or a tuple of patterns and types.
    """

    layers: Any = None

    @classmethod
    def of(cls, operation: str, layers: Layers | None) -> Selection:
        """A selection from the argument of a public function."""
        if layers is None or (callable(layers) and not isinstance(layers, type)):
            return cls(layers)
        several = layers if isinstance(layers, list | tuple | set) else (layers,)
        for each in several:
            if not isinstance(each, str | type):
                raise TypeError(
                    f"{operation}: layers must be a path with * for anything, a class of layers, "
                    "several of these, or a function of a path and a name of a class; got "
                    f"{each!r}. For example layers=('*/BatchNorm_*', flax.linen.LayerNorm)."
                )
        return cls(tuple(several))

    def layer(self, path: str, module: Any) -> bool:
        """True if this layer is to be observed."""
        if self.layers is None:
            return isinstance(module, NORM_TYPES)
        if not isinstance(self.layers, tuple):
            return bool(self.layers(path, type(module).__name__))
        types = tuple(t for t in self.layers if isinstance(t, type))
        return isinstance(module, types) or self._matches(path)

    def nonlinearity(self, path: str, name: str) -> bool:
        """True if this nonlinearity is to be observed."""
        if self.layers is None:
            return True
        if not isinstance(self.layers, tuple):
            return bool(self.layers(path, name))
        return self._matches(path)

    def _matches(self, path: str) -> bool:
        patterns = [p for p in self.layers if isinstance(p, str)]
        return any(fnmatch.fnmatchcase(path, p) for p in patterns)


def attach(model: Any, layers: Layers | None = None) -> Any:
    """Mark the layers of a model, for training loops of one's own.

    Args:
        model: any `flax.linen.Module` or `flax.nnx.Module`; it is not changed.
        layers: as in `Monitor`.

    Returns:
        For Linen an object with `init` and `apply` as the module has them. For NNX a module that
        is called as the given one is, and shares its variables.

    Raises:
        TypeError: the model is neither, or `layers` is nothing that selects layers.
        ValueError: when the model is traced: nothing in it was selected.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxnorm.monitor import attach, observe
        >>> model = attach(nn.Sequential([nn.Dense(3), nn.LayerNorm(), nn.relu]))
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> variables = model.init(jax.random.key(0), x)
        >>> y, seen = observe(model.apply)(variables, x)
        >>> list(seen)
        ['layers_1:input', 'layers_1:output', 'relu_0:input', 'relu_0:output']
    """
    operation = "attach"
    selection = Selection.of(operation, layers)
    if isinstance(model, linen.Module):
        return _Linen(model, selection)
    if isinstance(model, nnx.Module):
        return _NNX(model, selection)
    raise TypeError(
        f"{operation}: model must be a flax.linen.Module or a flax.nnx.Module; got "
        f"{type(model).__name__}. Pass an instance, such as Net()."
    )


def adapted(
    operation: str,
    selection: Selection,
    model: Any,
    mode_kwargs: Mapping[str, Any] | None,
    compute_dtype: Any,
) -> Model:
    """A marked model, as `jaxnorm.training.models.adapt` gives it."""
    if isinstance(model, nnx.Module):
        marked = derived(model, selection.layer)
    elif isinstance(model, linen.Module):
        marked = model
    else:
        marked = _factory(operation, model, selection)
    return _Adapted(adapt(operation, marked, mode_kwargs, compute_dtype), model, selection)


def _factory(operation: str, factory: Any, selection: Selection) -> Callable[[nnx.Rngs], Any]:
    """A factory of marked modules, from a factory of NNX modules."""

    def make(rngs):
        return derived(build(operation, factory, rngs), selection.layer)

    return make


class _Adapted:
    """A `training.models.Model` whose training passes are marked."""

    def __init__(self, inner: Model, model: Any, selection: Selection):
        self._inner = inner
        self._selection = selection
        self._top = type(model).__name__ if isinstance(model, linen.Module) else ""

    def train(self, variables: Variables, key, args, kwargs) -> tuple[Any, Variables]:
        def run(params, rest, key, args, kwargs):
            return self._inner.train(rest._replace(params=params), key, args, kwargs)

        rest = variables._replace(params=None)
        return _marked(run, self._selection, self._top, variables.params, rest, key, args, kwargs)

    def evaluate(self, variables: Variables, key, args, kwargs) -> Any:
        return self._inner.evaluate(variables, key, args, kwargs)


# JAX may have traced a compiled part of the model before, without marks: within this context it
# traces that part again.
_marking = jax.make_user_context(default_value=None)


class _Linen:
    def __init__(self, module: linen.Module, selection: Selection):
        self._module = module
        self._selection = selection

    def init(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.init(*args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        def run(params, rest, args, kwargs):
            return self._module.apply({"params": params, **rest}, *args, **kwargs)

        rest = {name: value for name, value in variables.items() if name != "params"}
        params = variables.get("params", {})
        top = type(self._module).__name__
        return _marked(run, self._selection, top, params, rest, args, kwargs)


class _NNX(nnx.Module):
    def __init__(self, model: nnx.Module, selection: Selection):
        self.model = model
        self._selection = selection

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph, params, rest = nnx.split(derived(self.model, self._selection.layer), nnx.Param, ...)

        def run(params, rest, args, kwargs):
            model = nnx.merge(graph, params, rest)
            result = model(*args, **kwargs)
            return result, nnx.state(model)

        top = type(self.model).__name__
        result, state = _marked(run, self._selection, top, params, rest, args, kwargs)
        nnx.update(self.model, state)
        return result


def _marked(function: Callable, selection: Selection, top: str, params: Any, *args: Any) -> Any:
    """Run ``function(params, *args)`` with marks; in `args`, all but arrays is constant."""
    # Parameters come first, so that they are the first inputs of the program.
    run, arrays = on_arrays(function, (params, *args), {})
    with _marking(selection), intercepted(selection.layer), seen_layers() as existing:
        closed, shape = jax.make_jaxpr(run, return_shape=True)(arrays)
    marker = Marker(selection.nonlinearity, top)
    count = len(jax.tree.leaves(params))
    program = marker.marked(closed, [i < count for i in range(len(arrays))])
    if not marker.places:
        layers = ", ".join(dict.fromkeys([*existing, *marker.found])) or "nothing"
        wanted = "normalization layers and nonlinearities" if selection.layers is None else (
            f"layers={selection.layers!r}"
        )  # fmt: skip
        raise ValueError(
            f"monitor: there must be something to observe; got {wanted} for a model that has "
            f"{layers}. Choose among these with layers=, * standing for anything."
        )
    results = run_program(program, arrays)
    return jax.tree.unflatten(jax.tree.structure(shape), results)
