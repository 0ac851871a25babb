"""The first state of a run: parameters from a seed, fresh statistics, a fresh optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from jaxnorm.models.adapt import initial_variables
from jaxnorm.training.layout import Layout, check_layout, put
from jaxnorm.training.state import TrainState, own

# Folded into the seed to make the key of the training steps. The seed itself stays the key of
# `model.init`, so that the parameters are those of plain Flax with the same seed.
_TRAINING_STREAM = 0x747261696E % 2**31  # "train"


def create_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    rng: int | jax.Array,
    *inputs: Any,
    layout: Layout | None = None,
    **call_kwargs: Any,
) -> TrainState:
    """Create the state of a run before its first step.

    The parameters are those of plain Flax with the same seed: `model.init(rng, *inputs)` for Linen,
    `factory(nnx.Rngs(rng))` for a factory of NNX modules. All arrays of the result are fresh
    copies. So donating the state to a step deletes neither `rng` nor the arrays of an NNX instance.
    The instance itself is not changed in any way.

    Args:
        model: a `flax.linen.Module`; or a `flax.nnx.Module`, whose present values are the initial
            ones; or a function `rngs -> flax.nnx.Module`.
        optimizer: any `optax.GradientTransformation`.
        rng: a seed, or a random key, typed of shape () or old-style uint32 of shape (2,).
        *inputs: example inputs of a Linen module, arrays or `jax.ShapeDtypeStruct`s. Only shapes
            and dtypes matter to most models. NNX models need none.
        layout: the placement of the state on a mesh. The values are the same as without a layout.
            Every device computes its own part of them, and no device ever holds a whole copy.
        **call_kwargs: further keyword arguments of a Linen module's call. The mode is set to
            training by itself (see `make_train_step`).

    Returns:
        The TrainState at step 0.

    Raises:
        TypeError: `model` is not a model, `optimizer` is not an Optax optimizer, `rng` is not a
            seed or key, or the model cannot be called with the inputs.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> state = create_train_state(nn.Dense(2), optax.adam(1e-3), 0, jnp.ones((1, 3)))
        >>> state.params["kernel"].shape, state.batch_stats
        ((3, 2), {})
    """
    operation = "create_train_state"
    check_optimizer(operation, optimizer)
    check_layout(operation, layout)
    key = as_key(operation, rng)
    inputs = concrete(inputs)

    def init(key: jax.Array, inputs: Any) -> TrainState:
        return initial_state(operation, model, optimizer, key, inputs, call_kwargs)

    if layout is None:
        return own(jax.jit(init)(key, inputs))
    with layout.context():
        _check_same_seed(operation, layout, key)
        key, inputs = jax.tree.map(lambda x: put(x, layout.rows(0)), (key, inputs))
        shardings = layout.shardings(jax.eval_shape(init, key, inputs))
        return own(jax.jit(init, out_shardings=shardings)(key, inputs))


def initial_state(
    operation: str,
    model: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    inputs: tuple[Any, ...],
    call_kwargs: Mapping[str, Any],
) -> TrainState:
    """The traceable part of `create_train_state`, which a sweep maps over its keys."""
    variables = initial_variables(operation, model, key, inputs, call_kwargs)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables.params,
        batch_stats=variables.batch_stats,
        model_state=variables.model_state,
        opt_state=optimizer.init(variables.params),
        rng=jax.random.fold_in(key, _TRAINING_STREAM),
        nonfinite_step=jnp.full((), -1, jnp.int32),
    )


def as_key(operation: str, rng: Any) -> jax.Array:
    """A typed random key from a seed, a typed key or an old-style key."""
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        return jax.random.key(int(rng))
    if isinstance(rng, jax.Array | np.ndarray):
        if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.shape == ():
            return rng  # type: ignore[return-value]
        if rng.dtype == jnp.uint32 and rng.ndim == 1:
            return jax.random.wrap_key_data(jnp.asarray(rng))
        if jnp.issubdtype(rng.dtype, jnp.integer) and rng.shape == ():
            return jax.random.key(rng)
        shown = f"an array of shape {rng.shape} and dtype {rng.dtype}"
    else:
        shown = repr(rng)
    raise TypeError(
        f"{operation}: rng must be an integer seed or one random key; got {shown}. Pass a seed "
        "such as 0, or jax.random.key(0)."
    )


def _check_same_seed(operation: str, layout: Layout, key: jax.Array) -> None:
    """Raise a three-part ValueError if the processes were given different seeds."""
    if layout.rows(0).is_fully_addressable:
        return
    mine = np.asarray(jax.random.key_data(key))
    seeds = multihost_utils.process_allgather(mine)
    if (seeds != seeds[0]).any():
        raise ValueError(
            f"{operation}: every process must start from the same rng, or their parts of the state "
            f"do not fit together; got {len(np.unique(seeds, axis=0))} different ones over "
            f"{len(seeds)} processes. Give all of them the same seed: only their shares of the "
            "data differ."
        )


def check_optimizer(operation: str, optimizer: Any) -> None:
    """Raise a three-part TypeError for anything that is not an Optax optimizer."""
    if isinstance(optimizer, optax.GradientTransformation):
        return
    if isinstance(optimizer, optax.MultiSteps):
        do = "Pass optimizer.gradient_transformation()."
    elif callable(optimizer):
        do = "Call it with its hyperparameters first, as in optax.sgd(0.1)."
    else:
        do = "Pass one, such as optax.sgd(0.1)."
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    raise TypeError(
        f"{operation}: optimizer must be an optax.GradientTransformation; got {name}. {do}"
    )


def concrete(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with zeros in place of every `jax.ShapeDtypeStruct`."""

    def zeros(x: Any) -> Any:
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(zeros, inputs)
