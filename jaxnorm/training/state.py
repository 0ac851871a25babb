"""The train state: parameters, batch statistics, optimizer state, random key, step counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxnorm.models.adapt import Variables

Tree = TypeVar("Tree")


class TrainState(struct.PyTreeNode):
    """All that a training run carries from step to step: an immutable pytree of arrays.

    Every field changes its values over a step and never its structure, shapes or dtypes, so a
    compiled step traces once and can reuse (donate) the buffers. In a sweep every leaf has a
    leading axis of members.

    To use the trained values, apply a Linen model to
    `{"params": state.params, "batch_stats": state.batch_stats, **state.model_state}`. Update an NNX
    model with `nnx.update(model, state.params, state.batch_stats, state.model_state)`.

    Attributes:
        step: number of steps that were made, skipped ones included. int32, shape ().
        params: the trained parameters. Linen: the `params` collection. NNX: the State of
            `nnx.Param`.
        batch_stats: running statistics. Linen: the `batch_stats` collection, or `{}` if the model
            has none. NNX: the State of `nnx.BatchStat`.
        model_state: all other variables that the model writes. Linen: a dict of its other
            collections. NNX: the State of its other variables, without random state and without
            sown intermediates.
        opt_state: the state of the Optax optimizer.
        rng: typed random key, shape (). It never changes: a step draws from `fold_in(rng, step)`.
            So a run that resumes from a stored state continues with the random numbers of an
            uninterrupted run.
        nonfinite_step: the first step whose loss was not finite, or -1. int32, shape (). See
            `check_finite`.
        monitor: the samples of `jaxnorm.monitor` that nobody has read yet. None without a monitor.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> from jaxnorm.training import create_train_state
        >>> state = create_train_state(nn.BatchNorm(), optax.sgd(0.1), 0, jnp.ones((4, 3)))
        >>> int(state.step), state.batch_stats["mean"].shape
        (0, (3,))
        >>> state.replace(batch_stats={**state.batch_stats, "var": jnp.zeros(3)}).batch_stats["var"]
        Array([0., 0., 0.], dtype=float32)
    """

    step: jax.Array  # shape=(), dtype=jnp.int32
    params: Any  # a tree of arrays; shapes and dtypes are the model's
    batch_stats: Any  # a tree of arrays of shape (features,), float32 in jaxnorm's layers
    model_state: Any  # a tree of arrays; shapes and dtypes are the model's
    opt_state: optax.OptState  # a tree of arrays; shapes and dtypes are the optimizer's
    rng: jax.Array  # shape=(), a typed random key
    nonfinite_step: jax.Array  # shape=(), dtype=jnp.int32
    monitor: Any = None  # a jaxnorm.monitor.samples.buffer.Buffer: samples, float32; steps, int32

    @property
    def variables(self) -> Variables:
        """The model's part of the state: `(params, batch_stats, model_state)`."""
        return Variables(self.params, self.batch_stats, self.model_state)


class NonFiniteLossError(FloatingPointError):
    """A training loss was infinite or not a number.

    Attributes:
        steps: member of the sweep -> first step with such a loss. A single run has the one member
            0.
        step: the earliest of these steps.
    """

    def __init__(self, message: str, steps: Mapping[int, int]) -> None:
        super().__init__(message)
        self.steps = dict(steps)
        self.step = min(steps.values())


def check_finite(state: TrainState) -> None:
    """Raise if any training loss so far was infinite or not a number.

    A step records such a loss on the device and does not wait for it. This function waits for the
    device. So call it now and then, rather than after every step. It reads one integer per member.

    Args:
        state: the state of a single run, or of a sweep.

    Raises:
        NonFiniteLossError: a loss was not finite. The error holds the first such step; in a sweep
            it holds the first such step of each member.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> from jaxnorm.training import create_train_state
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


def own(state: TrainState) -> TrainState:
    """A copy that shares no buffer with any other array, so that it is safe to donate.

    No two leaves of the copy share a buffer either.
    """
    return jax.tree.map(lambda x: jnp.array(strong(x), copy=True), state)


def strong(x: Any) -> jax.Array:
    """`x` as an array without JAX's weak type, which would count as a change of the input type."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    return jax.lax.convert_element_type(x, x.dtype)


def same_kind(operation: str, old: Tree, new: Tree) -> Tree:
    """Return `new` if it has the structure, shapes and dtypes of `old`; raise otherwise.

    Both are states, or the same part of a state. If the kind of a state could change, the next call
    would trace and compile again, and no buffer could be reused.
    """
    advice = (
        "A state keeps its structure, shapes and dtypes: cast where the leaf is written (Flax's "
        "BatchNorm stores float64 statistics for float64 inputs, jaxnorm's does not), and keep "
        "values that grow from call to call, such as sown ones, out of the carried variables."
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
