"""Many runs in one compiled program: seeds and hyperparameters become one more array axis.

A sweep is a `TrainState` whose every leaf has a leading axis of members. Its step is the step of a
single run under `jax.vmap`. So a member computes what the same run computes by itself, up to
rounding. Small models leave most of a machine idle, and a sweep of them costs little more than one
run.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxnorm.models.adapt import adapt
from jaxnorm.training.alternating import compile_step
from jaxnorm.training.create import as_key, check_optimizer, concrete, initial_state
from jaxnorm.training.objective import Batch, InputsFn, LossFn, Metrics, Objective
from jaxnorm.training.prepared import PreparedStep
from jaxnorm.training.programs import (
    EvalStep,
    MetricsFn,
    Step,
    StepMonitor,
    build_eval_step,
    build_train_step,
    leading_size,
)
from jaxnorm.training.state import TrainState, own, strong

MakeOptimizer = Callable[..., optax.GradientTransformation]
_MEMBERS = "jaxnorm_members"  # the mapped axis


def grid(
    seeds: Iterable[Any], **hyperparams: Iterable[Any]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """List every combination of seeds and hyperparameter values; the seeds vary fastest.

    Args:
        seeds: seeds or keys.
        **hyperparams: the values of each hyperparameter.

    Returns:
        `(seeds, hyperparams)` for `create_sweep_state`, one entry for each member.

    Raises:
        Nothing of its own.

    Example:
        >>> grid(range(2), learning_rate=[0.1, 0.3])
        ([0, 1, 0, 1], {'learning_rate': [0.1, 0.1, 0.3, 0.3]})
    """
    rows = list(itertools.product(*hyperparams.values(), list(seeds)))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(hyperparams)}
    return [row[-1] for row in rows], columns


def create_sweep_state(
    model: Any,
    make_optimizer: MakeOptimizer,
    seeds: Sequence[Any] | jax.Array,
    hyperparams: Mapping[str, Any],
    *inputs: Any,
    **call_kwargs: Any,
) -> TrainState:
    """Create the state of `m` runs before their first step.

    Member `i` is `create_train_state(model, make_optimizer(**hyperparams at i), seeds[i], ...)`.
    The hyperparameters are part of the optimizer state (`optax.inject_hyperparams`), as arrays
    `state.opt_state.hyperparams[name]` of shape (m,).

    Args:
        model: a Linen module or a function `rngs -> nnx.Module`. An NNX instance has one set of
            values already, so it works only for a sweep over one seed.
        make_optimizer: a function that takes the hyperparameters by name and returns an Optax
            optimizer, such as `optax.sgd`, or `lambda learning_rate, weight_decay:
            optax.chain(...)`.
        seeds: m seeds, or m random keys.
        hyperparams: name -> m numbers. `{}` means a sweep over seeds alone. `grid` makes seeds and
            numbers from lists that are to be combined.
        *inputs: example inputs of a Linen module, the same for all members.
        **call_kwargs: further keyword arguments of a Linen module's call.

    Returns:
        A TrainState with a leading axis of m members on every leaf.

    Raises:
        TypeError: `model`, a seed, or the result of `make_optimizer` is of another kind.
        ValueError: there are no members; the numbers of seeds and values differ; `make_optimizer`
            does not take these names; or an NNX instance was given with several seeds.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> seeds, hyperparams = grid(range(2), learning_rate=[0.1, 0.3])
        >>> state = create_sweep_state(nn.Dense(2), optax.sgd, seeds, hyperparams, jnp.ones((1, 3)))
        >>> state.params["kernel"].shape, state.opt_state.hyperparams["learning_rate"]
        ((4, 3, 2), Array([0.1, 0.1, 0.3, 0.3], dtype=float32))
    """
    operation = "create_sweep_state"
    seeds = list(seeds)
    values = {name: jnp.asarray(value) for name, value in hyperparams.items()}
    shapes = {name: value.shape for name, value in values.items()}
    if not seeds or any(shape != (len(seeds),) for shape in shapes.values()):
        raise ValueError(
            f"{operation}: each member needs one seed and one value of each hyperparameter; got "
            f"{len(seeds)} seeds and hyperparameters of shape {shapes}. Give lists of equal "
            "length, or combine shorter ones: grid(seeds, learning_rate=[...])."
        )
    keys = jnp.stack([as_key(operation, seed) for seed in seeds])
    distinct = len(np.unique(np.asarray(jax.random.key_data(keys)), axis=0))
    if isinstance(model, nnx.Module) and distinct > 1:
        raise ValueError(
            f"{operation}: members with different seeds must start from different parameters; got "
            f"{distinct} seeds and an instance of {type(model).__name__}, which has its parameters "
            "already. Pass a function that builds the model: lambda rngs: Net(8, rngs=rngs)."
        )

    def init(key: jax.Array, member: dict[str, jax.Array], inputs: Any) -> TrainState:
        optimizer = _injected(operation, make_optimizer, member)
        return initial_state(operation, model, optimizer, key, inputs, call_kwargs)

    return own(jax.jit(jax.vmap(init, in_axes=(0, 0, None)))(keys, values, concrete(inputs)))


def make_sweep_step(
    model: Any,
    make_optimizer: MakeOptimizer,
    loss_fn: LossFn,
    *,
    batch_per_member: bool = False,
    inputs: InputsFn | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    skip_nonfinite: bool = False,
    scan: bool = False,
    donate: bool = True,
    monitor: StepMonitor | None = None,
) -> Step:
    """Make a compiled step of all runs of a sweep: `step(state, batch) -> (state, metrics)`.

    It is the step of `make_train_step` under `jax.vmap`: one program, one trace, all members at
    once. A loss that is not finite affects its own member only, also with `skip_nonfinite`.

    Args:
        model: as for `create_sweep_state`.
        make_optimizer: the function that was given to `create_sweep_state`. The state knows which
            of its arguments are swept, and their values.
        loss_fn: as for `make_train_step`, written for one member.
        batch_per_member: True if every leaf of the batch has a leading axis of members. Otherwise
            all members use the same batch, which is stored once.
        inputs: as for `make_train_step`.
        train_kwargs: as for `make_train_step`.
        skip_nonfinite: as for `make_train_step`.
        scan: True runs many steps in one compiled loop. Leaves of the batch are (steps, ...), or
            (members, steps, ...) with `batch_per_member`; metrics are (members, steps).
        donate: as for `make_train_step`.
        monitor: as for `make_train_step`; every member has a buffer of its own.

    Returns:
        The step, a `jax.jit` function. Every metric has a leading axis of members.

    Raises:
        TypeError, ValueError: as for `make_train_step`. When traced, also: the state is not that of
            a sweep; the batch does not have one entry for each member, or each step.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> x = jnp.arange(6.0).reshape(3, 2)
        >>> rates = {"learning_rate": [0.0, 0.01]}
        >>> state = create_sweep_state(nn.Dense(1), optax.sgd, [0, 0], rates, x)
        >>> loss = lambda y, batch: (y**2).mean()
        >>> step = make_sweep_step(nn.Dense(1), optax.sgd, loss, scan=True)
        >>> state, metrics = step(state, jnp.stack([x, x]))
        >>> metrics["loss"].shape, (metrics["loss"][:, 1] < metrics["loss"][:, 0]).tolist()
        ((2, 2), [False, True])
    """
    operation = "make_sweep_step"
    _check_factory(operation, make_optimizer)
    adapted = (monitor.adapt if monitor else adapt)(operation, model, train_kwargs)
    objective = Objective(operation, adapted, loss_fn, inputs)

    def full_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, Any]:
        swept = dict.fromkeys(state.opt_state.hyperparams, 0.0)  # type: ignore[union-attr]
        optimizer = _injected(operation, make_optimizer, swept)
        return build_train_step(objective, optimizer, skip_nonfinite)(state, batch)

    def mapped(step: Step) -> Step:
        return _over_members(operation, step, batch_per_member)

    compiled = compile_step(
        operation,
        full_step,
        monitor,
        scan=scan,
        donate=donate,
        mapped=mapped,
        members=_MEMBERS,
    )
    if monitor is None:
        return compiled

    def buffers(state: TrainState, batch: Batch) -> Any:
        """The empty buffers of all members."""

        def buffer(state: TrainState, batch: Batch) -> Any:
            first = jax.tree.map(lambda x: x[0], batch) if scan else batch
            return monitor.buffer(full_step, state, first)

        return jax.vmap(buffer, in_axes=_axes(batch_per_member))(state, batch)

    check = functools.partial(_check_sweep, operation, batch_per_member)
    return PreparedStep(operation, compiled, None, buffer=buffers, check=check)


def make_sweep_eval_step(
    model: Any,
    metrics_fn: MetricsFn,
    *,
    batch_per_member: bool = False,
    inputs: InputsFn | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
) -> EvalStep:
    """Make a compiled evaluation of all runs of a sweep: `evaluate(state, batch) -> metrics`.

    Args:
        model: as for `create_sweep_state`.
        metrics_fn: as for `make_eval_step`, written for one member.
        batch_per_member: as for `make_sweep_step`.
        inputs: as for `make_train_step`.
        eval_kwargs: as for `make_eval_step`.

    Returns:
        The evaluation, a `jax.jit` function. Every metric has a leading axis of members.

    Raises:
        TypeError, ValueError: as for `make_eval_step`, and when traced as for `make_sweep_step`.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> x = jnp.ones((3, 2))
        >>> state = create_sweep_state(nn.Dense(1), optax.sgd, [0, 1], {"learning_rate": [1, 1]}, x)
        >>> evaluate = make_sweep_eval_step(nn.Dense(1), lambda y, batch: {"mean": y.mean()})
        >>> evaluate(state, x)["mean"].shape
        (2,)
    """
    operation = "make_sweep_eval_step"
    adapted = adapt(operation, model, eval_kwargs)
    evaluate = build_eval_step(operation, adapted, metrics_fn, inputs)
    return jax.jit(_over_members(operation, evaluate, batch_per_member))


def sweep_member(state: TrainState, member: int) -> TrainState:
    """Copy the state of one run out of a sweep, without the leading axis.

    Its optimizer state is that of `optax.inject_hyperparams(make_optimizer)(...)`. Its `params`,
    `batch_stats` and `model_state` have the form of a single run.

    Args:
        state: the state of a sweep with m members.
        member: the index of the member, 0 <= member < m.

    Returns:
        A TrainState without the axis of members.

    Raises:
        IndexError: the sweep has no such member.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> state = create_sweep_state(
        ...     nn.Dense(2), lambda: optax.sgd(0.1), [0, 1], {}, jnp.ones((1, 3))
        ... )
        >>> sweep_member(state, 1).params["kernel"].shape
        (3, 2)
    """
    members = state.step.shape[0] if state.step.ndim else 0
    if not 0 <= member < members:
        raise IndexError(
            f"sweep_member: member must be one of the sweep's {members}; got {member}. Members "
            "count from 0, and only the state of create_sweep_state has any."
        )
    return jax.tree.map(lambda x: x[member], state)


def _over_members(operation: str, function: Any, batch_per_member: bool) -> Any:
    """`function(state, batch)` under `jax.vmap`, with a check of its arguments before."""
    axes = _axes(batch_per_member)

    def mapped(state: TrainState, batch: Batch) -> Any:
        _check_sweep(operation, batch_per_member, state, batch)
        return jax.vmap(function, in_axes=axes, axis_name=_MEMBERS)(state, batch)

    return mapped


def _axes(batch_per_member: bool) -> tuple[int, int | None]:
    return 0, 0 if batch_per_member else None


def _check_sweep(operation: str, batch_per_member: bool, state: Any, batch: Batch) -> None:
    """Raise a three-part error unless the state is that of a sweep and the batch fits it."""
    swept = isinstance(state, TrainState) and state.step.ndim == 1
    if not swept or not hasattr(state.opt_state, "hyperparams"):
        shown = (
            f"a TrainState with step of shape {state.step.shape}"
            if isinstance(state, TrainState)
            else type(state).__name__
        )
        raise TypeError(
            f"{operation}: the first argument must be the state of a sweep; got {shown}. Make "
            "one with create_sweep_state."
        )
    members = state.step.shape[0]
    if batch_per_member:
        size = leading_size(operation, batch, "with batch_per_member=True, members")
        if size != members:
            raise ValueError(
                f"{operation}: with batch_per_member=True the batch must have one entry for "
                f"each of the {members} members; its leaves have a leading axis of {size}. "
                "Give each member its own, or batch_per_member=False to share one."
            )


def _check_factory(operation: str, make_optimizer: Any) -> None:
    if isinstance(make_optimizer, optax.GradientTransformation) or not callable(make_optimizer):
        raise TypeError(
            f"{operation}: make_optimizer must be a function from hyperparameters to an Optax "
            f"optimizer; got {type(make_optimizer).__name__}. Pass optax.sgd rather than "
            "optax.sgd(0.1), or a function: lambda learning_rate: optax.sgd(learning_rate, 0.9); "
            "for a sweep over seeds alone, lambda: optax.sgd(0.1)."
        )


def _injected(
    operation: str, make_optimizer: MakeOptimizer, hyperparams: Mapping[str, Any]
) -> optax.GradientTransformation:
    """An optimizer with `optax.inject_hyperparams` applied to the swept hyperparameters alone.

    `inject_hyperparams(make_optimizer)` would turn every number in its signature into an array
    (Adam's b1, b2, eps), which changes rounding. It would also call every function in the signature
    as a schedule.
    """
    _check_factory(operation, make_optimizer)
    try:
        inspect.signature(make_optimizer).bind(**hyperparams)
    except TypeError as error:
        raise ValueError(
            f"{operation}: make_optimizer must take the swept hyperparameters by name; it was to "
            f"be called with {', '.join(hyperparams) or 'nothing'}: {error}. Name them as in its "
            "signature, and fix the others: lambda learning_rate: optax.sgd(learning_rate, 0.9)."
        ) from error

    def build(**values: Any) -> optax.GradientTransformation:
        optimizer = make_optimizer(**values)
        check_optimizer(operation, optimizer)
        return optimizer

    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in hyperparams]
    )
    inject = optax.inject_hyperparams(build)

    def init(params: Any) -> optax.OptState:
        # The cast rounds the value as the Python number of a single run is rounded when it meets
        # the parameters. Optax keeps the dtype of an array, which with x64 would be float64.
        dtype = optax.tree.dtype(params, "highest")
        return inject(**{k: _as_hyperparam(v, dtype) for k, v in hyperparams.items()}).init(params)

    return optax.GradientTransformationExtraArgs(init, inject(**hyperparams).update)


def _as_hyperparam(value: Any, dtype: Any) -> jax.Array:
    value = jnp.asarray(value)
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else strong(value)
