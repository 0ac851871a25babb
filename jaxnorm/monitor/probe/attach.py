"""Marks on a model of Linen or NNX, so that a program which runs it can be observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen, nnx

from jaxnorm._jax import run_program
from jaxnorm.models.adapt import Model, Variables, adapt, build
from jaxnorm.models.calls import hooked, hooked_copy
from jaxnorm.models.select import Layers, Selection
from jaxnorm.models.trace import on_arrays
from jaxnorm.monitor.probe.layers import Marking, seen_layers
from jaxnorm.monitor.probe.places import Marker


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
    """A marked model, as `jaxnorm.models.adapt.adapt` gives it."""
    if isinstance(model, nnx.Module):
        marked = hooked_copy(model, Marking(selection.layer))
    elif isinstance(model, linen.Module):
        marked = model
    else:
        marked = _factory(operation, model, selection)
    return _Adapted(adapt(operation, marked, mode_kwargs, compute_dtype), model, selection)


def _factory(operation: str, factory: Any, selection: Selection) -> Callable[[nnx.Rngs], Any]:
    """A factory of marked modules, from a factory of NNX modules."""

    def make(rngs):
        return hooked_copy(build(operation, factory, rngs), Marking(selection.layer))

    return make


class _Adapted:
    """A `models.adapt.Model` whose training passes are marked."""

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
        graph, params, rest = nnx.split(
            hooked_copy(self.model, Marking(self._selection.layer)), nnx.Param, ...
        )

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
    with hooked(Marking(selection.layer)), seen_layers() as existing:
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
