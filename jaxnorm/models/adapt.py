"""One small interface over Linen modules, NNX modules and NNX factories.

The rest of this package never asks which framework a model comes from. It uses

* `initial_variables(operation, model, key, args, kwargs)`, the first variables of a model, and
* `adapt(operation, model)`, an object with two methods: `train`, which returns the outputs and the
  variables after the call, and `evaluate`, which returns the outputs alone, so that nothing that an
  evaluation writes can leave it.

A model learns its mode in this way. The names in `MODE_FLAGS` are searched in the signature of the
model's `__call__` and passed there. For a Linen module whose call takes none of them, they are
searched in its dataclass fields (`Net(train=True)`) and set on a clone. An NNX model is rebuilt
inside the traced function anyway, so its `.train()` or `.eval()` is called on the copy, and
`nnx.view` reaches the modules that only know `set_view`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn

from jaxnorm.models.mode import (
    MODE_FLAGS,
    bound_arguments,
    call_signature,
    check_known,
    mode_flags,
)


class Variables(NamedTuple):
    """The variables that a model carries from call to call, apart from random state."""

    # Trees of arrays; shapes and dtypes are the model's.
    params: Any  # Linen: the "params" collection; NNX: State of nnx.Param
    batch_stats: Any  # Linen: the "batch_stats" collection; NNX: State of nnx.BatchStat
    model_state: Any  # Linen: dict of all other collections; NNX: State of all other variables


class Model(Protocol):
    """A model without its values: pure functions of `Variables` and a random key."""

    def train(
        self, variables: Variables, key: jax.Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        """Outputs in training mode, and the variables after the call."""
        ...

    def evaluate(
        self, variables: Variables, key: jax.Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Outputs of the model in evaluation mode."""
        ...


def adapt(
    operation: str,
    model: Any,
    mode_kwargs: Mapping[str, Any] | None = None,
    compute_dtype: Any = None,
) -> Model:
    """The adapter of a Linen module, an NNX module or a factory of NNX modules.

    Args:
        operation: the public function that is being called; errors begin with it.
        model: `flax.linen.Module` instance, `flax.nnx.Module` instance, or a callable that takes
            `nnx.Rngs` and returns an `nnx.Module`.
        mode_kwargs: keyword arguments of the model's call that the caller fixes. They win over the
            mode flags. If they are given, even empty, the mode is left to the caller.
        compute_dtype: the dtype that parameters and inputs will be cast to, or None.

    Raises:
        TypeError: the model is none of the three, or `mode_kwargs` names an unknown argument.
    """
    if isinstance(model, nn.Module):
        return _LinenModel(operation, model, mode_kwargs)
    return _NNXModel(operation, model, mode_kwargs, compute_dtype)


def initial_variables(
    operation: str, model: Any, key: jax.Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Variables:
    """The first variables of a model; the function can be traced, jitted and mapped over keys.

    Args:
        operation: the public function that is being called; errors begin with it.
        model: as for `adapt`.
        key: typed random key, shape (). Linen: the key of `model.init`. NNX factory: the key of
            `nnx.Rngs`. NNX instance: unused, the instance has its values already.
        args: example inputs of a Linen module; unused by NNX.
        kwargs: further keyword arguments of a Linen module's call.

    Returns:
        The variables. For an NNX instance they are its arrays themselves, not copies.

    Raises:
        TypeError: the model is none of the three, or cannot be called with these inputs.
    """
    if isinstance(model, nn.Module):
        return _LinenModel(operation, model, kwargs or None).init(key, args)
    if isinstance(model, nnx.Module):
        # Merging makes new module objects around the same arrays. So popping does not change the
        # caller's instance.
        fresh = nnx.merge(*nnx.split(model))
    else:
        fresh = build(operation, model, nnx.Rngs(key))
    nnx.pop(fresh, nnx.Intermediate)
    return _split(fresh)[2]


def partition(collections: Mapping[str, Any]) -> Variables:
    """The collections of a Linen module as `Variables`."""
    rest = dict(collections)
    return Variables(rest.pop("params", {}), rest.pop("batch_stats", {}), rest)


def in_evaluation(
    operation: str, model: Any, variables: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The outputs of a model in evaluation mode; can be traced.

    A Linen module that is told its mode neither by its call nor by a field is called as it is.

    Args:
        operation: the public function that is being called; errors begin with it.
        model: a Linen or NNX module; of the latter, nothing is changed.
        variables: collections of the Linen module; unused by NNX.
        args: inputs.
        kwargs: further keyword arguments of the call; they win over the mode flags.
    """
    if isinstance(model, nn.Module):
        inner = _LinenModel(operation, model, None)
        if inner.without_mode():
            inner = _LinenModel(operation, model, {})
        return inner.evaluate(partition(variables), jax.random.key(0), args, kwargs)
    inner = _NNXModel(operation, model, None, None)
    variables = _split(nnx.merge(*nnx.split(model)))[2]
    return inner.evaluate(variables, jax.random.key(0), args, kwargs)


class _LinenModel:
    """A `flax.linen.Module` as a `Model`: variables are the dictionaries of its collections."""

    def __init__(
        self, operation: str, module: nn.Module, mode_kwargs: Mapping[str, Any] | None
    ) -> None:
        self._operation = operation
        self._module = module
        self._name = type(module).__name__
        self._mode_kwargs = mode_kwargs
        self._signature = call_signature(type(module))
        check_known(operation, self._name, self._signature, mode_kwargs)
        self._call_flags = set(self._signature.parameters) & set(MODE_FLAGS)
        fields = {field.name for field in dataclasses.fields(module)}  # type: ignore[arg-type]
        use_fields = not self._call_flags and mode_kwargs is None
        self._field_flags = fields & set(MODE_FLAGS) if use_fields else set()

    def init(self, key: jax.Array, args: tuple[Any, ...]) -> Variables:
        module, args, kwargs = self._call(args, {}, train=True)
        rngs = {"params": key, "dropout": jax.random.fold_in(key, _DROPOUT_STREAM)}
        return partition(module.init(rngs, *args, **kwargs))

    def train(
        self, variables: Variables, key: jax.Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        self._check_mode(variables, "train_kwargs")
        module, args, kwargs = self._call(args, kwargs, train=True)
        collections = self._collections(variables)
        outputs, written = module.apply(
            collections,
            *args,
            **kwargs,
            rngs=self._rngs(key),
            mutable=[name for name in collections if name != "params"],
        )
        return outputs, partition({**collections, **written})

    def evaluate(
        self, variables: Variables, key: jax.Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        self._check_mode(variables, "eval_kwargs")
        module, args, kwargs = self._call(args, kwargs, train=False)
        try:
            return module.apply(
                self._collections(variables), *args, **kwargs, rngs=self._rngs(key), mutable=False
            )
        except errors.ModifyScopeVariableError as error:
            raise ValueError(
                f"{self._operation}: an evaluation must not write variables; {self._name} tried "
                f"to, called with {mode_flags(self._call_flags, False) or 'no mode argument'}: "
                f"{error}. Give the model an argument that switches it to evaluation, and name it "
                "in eval_kwargs= if it is not one of " + ", ".join(MODE_FLAGS) + "."
            ) from error

    def _call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, train: bool
    ) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        module = self._module
        if self._field_flags:
            fields: dict[str, Any] = dict(mode_flags(self._field_flags, train))
            module = module.clone(**fields)
        merged = {**mode_flags(self._call_flags, train), **(self._mode_kwargs or {}), **kwargs}
        return module, *bound_arguments(self._operation, self._name, self._signature, args, merged)

    def without_mode(self) -> bool:
        """True if neither the call nor a field tells the module its mode."""
        return not (self._call_flags or self._field_flags)

    def _check_mode(self, variables: Variables, keyword: str) -> None:
        told = not self.without_mode() or self._mode_kwargs is not None
        if told or not jax.tree.leaves(variables.batch_stats):
            return
        raise ValueError(
            f"{self._operation}: a model with batch statistics must be told whether it trains; "
            f"{self._name}.__call__{self._signature} has none of the arguments "
            f"{', '.join(MODE_FLAGS)}, nor has the module such a field. Add one, or name yours: "
            f'{keyword}={{"my_flag": ...}} ({keyword}={{}} if the model needs none).'
        )

    @staticmethod
    def _rngs(key: jax.Array) -> dict[str, jax.Array]:
        # A stream that is not given draws from "params" (flax.core.Scope.make_rng). So these two
        # streams serve every name that a model may use.
        return {"params": key, "dropout": jax.random.fold_in(key, _DROPOUT_STREAM)}

    @staticmethod
    def _collections(variables: Variables) -> dict[str, Any]:
        collections = {"params": variables.params, **variables.model_state}
        if jax.tree.leaves(variables.batch_stats):
            collections["batch_stats"] = variables.batch_stats
        return collections


# Separates the streams that are drawn from one key. It is far from the small counters of Flax.
_DROPOUT_STREAM = 0x6E6F726D  # "norm"


class _NNXModel:
    """A `flax.nnx.Module` or a factory of one, as a `Model`: only its graph is kept."""

    def __init__(
        self,
        operation: str,
        model: Any,
        mode_kwargs: Mapping[str, Any] | None,
        compute_dtype: Any,
    ) -> None:
        self._operation = operation
        self._mode_kwargs = mode_kwargs
        self._compute_dtype = compute_dtype
        classes: list[type] = []

        def describe() -> Any:
            if isinstance(model, nnx.Module):
                fresh = nnx.merge(*nnx.split(model))
            else:
                fresh = build(operation, model, nnx.Rngs(jax.random.key(0)))
            nnx.pop(fresh, nnx.Intermediate)
            classes.append(type(fresh))
            return _split(fresh)

        self._graphdef, self._rngs, self._like = jax.eval_shape(describe)
        self._name = classes[0].__name__
        self._signature = call_signature(classes[0])
        check_known(operation, self._name, self._signature, mode_kwargs)
        self._call_flags = set(self._signature.parameters) & set(MODE_FLAGS)

    def train(
        self, variables: Variables, key: jax.Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        model = self._merge(variables, key)
        model.train()
        outputs, model = self._run(model, args, kwargs, train=True)
        return outputs, _split(model)[2]

    def evaluate(
        self, variables: Variables, key: jax.Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        model = self._merge(variables, key)
        model.eval()
        return self._run(model, args, kwargs, train=False)[0]

    def _run(
        self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, train: bool
    ) -> tuple[Any, Any]:
        model = nnx.view(
            model, raise_if_not_found=False, deterministic=not train, use_running_average=not train
        )
        merged = {**mode_flags(self._call_flags, train), **(self._mode_kwargs or {}), **kwargs}
        args, merged = bound_arguments(self._operation, self._name, self._signature, args, merged)
        return model(*args, **merged), model

    def _merge(self, variables: Variables, key: jax.Array) -> Any:
        given, wanted = _paths(variables), _paths(self._like)
        if given != wanted:
            differing = sorted(given ^ wanted)[:4]
            raise ValueError(
                f"{self._operation}: the state must belong to the model; {self._name} and the "
                f"state differ in {', '.join(differing)}. Make the state with create_train_state "
                "of this model, or pass the model that it was made for."
            )
        leaves, treedef = jax.tree.flatten(self._rngs)
        streams = [
            _stream(jax.random.fold_in(key, i), leaf.shape)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        # `merge` puts the given Variables themselves into the model, and a call would then write to
        # the state. Rebuilding the tree makes new Variables that belong to the present trace.
        variables = jax.tree.map(lambda x: x, variables)
        model = nnx.merge(self._graphdef, jax.tree.unflatten(treedef, streams), *variables)
        if self._compute_dtype is not None:
            # An NNX norm with dtype=None returns the dtype to which x and its float32 statistics
            # promote. All layers after it would then compute in float32.
            for _, module in nnx.iter_modules(model):
                fields = vars(module)
                stats = any(isinstance(v, nnx.BatchStat) for v in fields.values())
                if stats and fields.get("dtype", ...) is None:
                    module.dtype = self._compute_dtype  # type: ignore[attr-defined]
        return model


def _stream(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.split(key, shape) if shape else key


def _paths(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _split(model: Any) -> tuple[Any, Any, Variables]:
    """Graph, random state and variables of an NNX module, without sown intermediates."""
    graphdef, rngs, _, params, batch_stats, rest = nnx.split(
        model, nnx.RngState, nnx.Intermediate, nnx.Param, nnx.BatchStat, ...
    )
    return graphdef, rngs, Variables(params, batch_stats, rest)


def build(operation: str, factory: Callable[..., Any], rngs: nnx.Rngs) -> Any:
    """Call a factory of NNX modules, as `factory(rngs)` or `factory(*, rngs)`."""
    hint = (
        "Pass an instance, such as Net(features=8), or for NNX a function that builds one: "
        "lambda rngs: Net(8, rngs=rngs)."
    )
    is_linen_class = isinstance(factory, type) and issubclass(factory, nn.Module)
    if is_linen_class or not callable(factory):
        shown = f"the class {factory.__name__}" if is_linen_class else repr(factory)
        raise TypeError(
            f"{operation}: model must be a flax.linen.Module or a flax.nnx.Module; got {shown}. "
            + hint
        )
    try:
        parameter = inspect.signature(factory).parameters.get("rngs")
    except (TypeError, ValueError):
        parameter = None
    by_name = parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY
    model = factory(rngs=rngs) if by_name else factory(rngs)
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{operation}: a model factory must return a flax.nnx.Module; "
            f"{getattr(factory, '__name__', factory)!r} called with nnx.Rngs returned "
            f"{type(model).__name__}. " + hint
        )
    return model
