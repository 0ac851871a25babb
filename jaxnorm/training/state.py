"""The train state: parameters, batch statistics, optimizer state, random key, step counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.experimental import multihost_utils

from jaxnorm.training.layout import Layout, check_layout, put
from jaxnorm.training.models import Variables, initialize

Tree = TypeVar("Tree")

# Folded into the seed for the key that training draws from, so that the seed itself can be the key
# of `model.init`: the parameters are those of plain Flax with the same seed.
_TRAINING_STREAM = 0x747261696E % 2**31  # "train"


class TrainState(struct.PyTreeNode):
    """All that a training run carries from step to step: an immutable pytree of arrays.

    Every field changes its values over a step and never its structure, shapes or dtypes, so a
    compiled step traces once and can reuse (donate) the buffers. In a sweep every leaf has a
    leading axis of members.

    The trained values go back where they came from: a Linen model is applied to
    `{"params": state.params, "batch_stats": state.batch_stats, **state.model_state}`, an NNX model
    is updated with `nnx.update(model, state.params, state.batch_stats, state.model_state)`.

    Attributes:
      step: steps made so far, skipped ones included. int32, shape ().
      params: what is trained. Linen: the `params` collection. NNX: the State of `nnx.Param`.
      batch_stats: running statistics. Linen: the `batch_stats` collection, `{}` where the model
        has none. NNX: the State of `nnx.BatchStat`.
      model_state: all further variables that the model writes. Linen: a dict of its other
        collections. NNX: the State of its other variables, without random state and without sown
        intermediates.
      opt_state: the Optax state.
      rng: typed random key, shape (). Never changes; a step draws from `fold_in(rng, step)`, so a
        run that resumes from a stored state continues with the numbers it would have drawn.
      nonfinite_step: the first step whose loss was not finite, or -1. int32, shape (). See
        `check_finite`.
      monitor: what `jaxnorm.monitor` saw and nobody has read yet; None without a monitor.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax
      >>> state = create_train_state(nn.BatchNorm(), optax.sgd(0.1), 0, jnp.ones((4, 3)))
      >>> int(state.step), state.batch_stats["mean"].shape
      (0, (3,))
      >>> state.replace(batch_stats={**state.batch_stats, "var": jnp.zeros(3)}).batch_stats["var"]
      Array([0., 0., 0.], dtype=float32)
    """

    step: jax.Array  # int32, ()
    params: Any
    batch_stats: Any
    model_state: Any
    opt_state: optax.OptState
    rng: jax.Array  # typed key, ()
    nonfinite_step: jax.Array  # int32, ()
    monitor: Any = None

    @property
    def variables(self) -> Variables:
        """The model's part of the state: `(params, batch_stats, model_state)`."""
        return Variables(self.params, self.batch_stats, self.model_state)


class NonFiniteLossError(FloatingPointError):
    """A training loss was infinite or not a number.

    Attributes:
      steps: member of the sweep -> first step with such a loss. A single run is member 0.
      step: the earliest of these steps.
    """

    def __init__(self, message: str, steps: Mapping[int, int]) -> None:
        super().__init__(message)
        self.steps = dict(steps)
        self.step = min(steps.values())


def create_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    rng: int | jax.Array,
    *inputs: Any,
    layout: Layout | None = None,
    **call_kwargs: Any,
) -> TrainState:
    """The state before the first step.

    The parameters are those of plain Flax with the same seed: `model.init(rng, *inputs)` for
    Linen, `factory(nnx.Rngs(rng))` for a factory of NNX modules. All arrays of the result are
    fresh copies: donating the state to a step deletes neither `rng` nor the arrays of an NNX
    instance, which is not changed in any way.

    Args:
      model: a `flax.linen.Module`; a `flax.nnx.Module`, whose present values are the initial ones;
        or a function `rngs -> flax.nnx.Module`.
      optimizer: any `optax.GradientTransformation`.
      rng: a seed, or a random key, typed of shape () or old-style uint32 of shape (2,).
      *inputs: example inputs of a Linen module, arrays or `jax.ShapeDtypeStruct`s; only shapes
        and dtypes matter to most models. NNX models need none.
      layout: where the state is to lie on a mesh. The values are the same as without one; every
        device computes its part of them, and none holds a whole copy on the way.
      **call_kwargs: further keyword arguments of a Linen module's call. The mode is set to
        training without being asked (see `make_train_step`).

    Returns:
      TrainState at step 0.

    Raises:
      TypeError: `model` is not a model, `optimizer` not an Optax optimizer, `rng` not a seed or
        key, or the model cannot be called with the inputs.

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


def check_finite(state: TrainState) -> None:
    """Raise if any training loss so far was infinite or not a number.

    A step records this on the device and does not wait for it; this function waits, so call it
    every so often rather than after every step. It reads one integer per member.

    Args:
      state: of a single run, or of a sweep.

    Raises:
      NonFiniteLossError: with the first such step; in a sweep with the step of each such member.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax
      >>> state = create_train_state(nn.Dense(2), optax.sgd(0.1), 0, jnp.ones((1, 3)))
      >>> check_finite(state)
      >>> try:
      ...     check_finite(state.replace(step=jnp.int32(20), nonfinite_step=jnp.int32(7)))
      ... except NonFiniteLossError as error:
      ...     print(error.step, str(error)[:80])
      7 training: every loss must be finite; that of step 7 (of 20 made) was not. Steps
    """
    first = np.asarray(state.nonfinite_step)
    if (first < 0).all():
        return
    made = np.asarray(state.step).max()
    advice = (
        "Steps count from 0 and the parameters are spoiled from that step on, unless the step was "
        "made with skip_nonfinite=True. Look at that step's batch, lower the learning rate, or "
        "clip the gradient (optax.clip_by_global_norm)."
    )
    if first.ndim == 0:
        found = {0: int(first)}
        what = f"that of step {int(first)} (of {made} made) was not"
    else:
        found = {int(i): int(first[i]) for i in np.flatnonzero(first >= 0)}
        shown = ", ".join(f"member {i} at step {step}" for i, step in list(found.items())[:8])
        more = ", ..." if len(found) > 8 else ""
        what = f"{len(found)} of {first.size} members had one that was not: {shown}{more}"
    raise NonFiniteLossError(f"training: every loss must be finite; {what}. {advice}", found)


def initial_state(
    operation: str,
    model: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    inputs: tuple[Any, ...],
    call_kwargs: Mapping[str, Any],
) -> TrainState:
    """The traceable part of `create_train_state`; a sweep maps it over keys."""
    variables = initialize(operation, model, key, inputs, call_kwargs)
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
    """A typed key from a seed, a typed key or an old-style one."""
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
    """Three-part ValueError if processes were given different seeds."""
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
    """Three-part TypeError for anything that is not an Optax optimizer."""
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
    """Zeros for every `jax.ShapeDtypeStruct`; all else as it is."""

    def zeros(x: Any) -> Any:
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(zeros, inputs)


def own(state: TrainState) -> TrainState:
    """A copy that shares no buffer with anything, not even leaf with leaf: safe to donate."""
    return jax.tree.map(lambda x: jnp.array(strong(x), copy=True), state)


def strong(x: Any) -> jax.Array:
    """`x` as an array without JAX's weak type, which would count as a change of the input."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    return jax.lax.convert_element_type(x, x.dtype)


def same_kind(operation: str, old: Tree, new: Tree) -> Tree:
    """`new`, a state or a part of one, which must have the structure, shapes and dtypes of `old`.

    Otherwise the next call would trace and compile again, and no buffer could be reused.
    """
    advice = (
        "A state keeps its structure, shapes and dtypes: cast where the leaf is written (Flax's "
        "BatchNorm stores float64 statistics for float64 inputs, jaxnorm's does not), and keep "
        "what grows from call to call, such as sown values, out of the carried variables."
    )
    new = jax.tree.map(strong, new)
    before, after = _leaves(old), _leaves(new)
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path, "absent"), after.get(path, "absent")
        if was != now:
            raise TypeError(
                f"{operation}: a step must return the state it was given; state{path} was {was} "
                f"and became {now}. {advice}"
            )
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise TypeError(
            f"{operation}: a step must return the state it was given; all leaves agree, their "
            f"containers do not: {jax.tree.structure(old)} became {jax.tree.structure(new)}. "
            + advice
        )
    return new


def _leaves(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): jax.typeof(leaf).str_short()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
