"""Compiled training and evaluation steps of one run.

The functions here build pure functions `(state, batch) -> ...` and jit them; `sweep.py` maps the
same pure functions over members, so that a member of a sweep and a run alone are one computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnorm.training.models import Model, Variables, adapt
from jaxnorm.training.state import TrainState, check_optimizer, strong

Batch = Any
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], Any]
MetricsFn = Callable[[Any, Batch], Mapping[str, Any]]
InputsFn = Callable[[Batch], Any]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], Metrics]


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    inputs: InputsFn | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    skip_nonfinite: bool = False,
    scan: bool = False,
    donate: bool = True,
) -> Step:
    """A compiled training step: `step(state, batch) -> (state, metrics)`.

    With parameters `p`, statistics `s`, optimizer state `o` and the batch `b` of step `t`:

        outputs, s' = model(p, s, inputs(b); training mode, random key fold_in(rng, t))
        loss, metrics = loss_fn(outputs, b);   u, o' = optimizer(d loss / d p, o, p);   p' = p + u

    The statistics are those of the one forward pass whose loss is returned, stored once: neither
    rematerialization nor a line search nor a retry of the step counts a batch twice. The random
    key depends on the state alone, so the same state and batch give the same result.

    The state is donated: its buffers are reused for the new state and must not be read again.
    The step is a `jax.jit` function, with `lower` and the rest.

    Args:
      model: a Linen module, an NNX module, or a function `rngs -> nnx.Module`, as in
        `create_train_state`. Of an NNX instance only the structure is used: its values, those of
        its random streams too, come from the state.
      optimizer: any `optax.GradientTransformation`. One that takes further arguments gets
        `value`, `grad` and `value_fn` (optax.lbfgs, polyak_sgd, contrib.reduce_on_plateau).
      loss_fn: `(outputs, batch) -> loss` or `-> (loss, metrics)`: `loss` a floating scalar,
        `metrics` a dict of arrays without the key "loss".
      inputs: takes the model's inputs out of a batch: a tuple of positional inputs, a dict of
        keyword inputs, or a single array. Default: `batch["x"]` of a mapping, `batch[0]` of a
        tuple or list, an array itself.
      train_kwargs: keyword arguments for the model's call. The mode is found without them where
        the call takes `train`, `training`, `is_training`, `deterministic` or
        `use_running_average` (a Linen module may have such a field instead); these win. An NNX
        model is switched by `.train()` and `nnx.view`, which turns on the layers that a user froze
        with `use_running_average=True` too, as `.train()` does everywhere.
      skip_nonfinite: leave parameters, statistics and optimizer state untouched by a step whose
        loss is not finite. Otherwise the update is applied, NaN or not. The step counts and is
        recorded in `state.nonfinite_step` either way. Only the loss is looked at; for gradients
        see `optax.apply_if_finite`.
      scan: run many steps in one compiled loop: every leaf of the batch has a leading axis of
        steps, and so have the metrics. Worth it where a step is so small that dispatch dominates.
      donate: False keeps the old state readable, at the price of its memory.

    Returns:
      The step. `metrics` holds "loss", shape (), or (steps,) with `scan`, and what `loss_fn` adds.

    Raises:
      TypeError: `model` or `optimizer` is of another kind, or `train_kwargs` unknown to the model.
        When the step is traced: `state` is not a TrainState; the loss is not floating, or
        `loss_fn` returned something else; a leaf of the state changed its shape or dtype.
      ValueError: when the step is traced: the loss is not a scalar; the batch shows no inputs; a
        model with batch statistics has no argument for the mode; the state is another model's.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax
      >>> from jaxnorm.training import check_finite, create_train_state, make_train_step
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         return nn.Dense(1)(nn.BatchNorm(not train)(x))
      >>> batch = {"x": jnp.arange(6.0).reshape(3, 2), "y": jnp.ones((3, 1))}
      >>> state = create_train_state(Net(), optax.sgd(0.1), 0, batch["x"])
      >>> step = make_train_step(Net(), optax.sgd(0.1), lambda y, b: ((y - b["y"]) ** 2).mean())
      >>> for _ in range(3):
      ...     state, metrics = step(state, batch)
      >>> check_finite(state)
      >>> [f"{mean:.4f}" for mean in state.batch_stats["BatchNorm_0"]["mean"]]
      ['0.0594', '0.0891']
      >>> [f"{mean * (1 - 0.99**3):.4f}" for mean in batch["x"].mean(0)]
      ['0.0594', '0.0891']
    """
    operation = "make_train_step"
    check_optimizer(operation, optimizer)
    adapted = adapt(operation, model, train_kwargs)
    step = build_train_step(operation, adapted, optimizer, loss_fn, inputs, skip_nonfinite)
    step = build_loop(operation, step) if scan else step
    return jax.jit(step, donate_argnums=(0,) if donate else ())


def make_eval_step(
    model: Any,
    metrics_fn: MetricsFn,
    *,
    inputs: InputsFn | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
) -> EvalStep:
    """A compiled evaluation: `evaluate(state, batch) -> metrics`.

    The model runs in evaluation mode on the stored statistics. Nothing is written: a Linen model
    is applied with `mutable=False`, what an NNX model writes is dropped, and the state, which is
    not donated, goes in and does not come out.

    Args:
      model: as for `make_train_step`.
      metrics_fn: `(outputs, batch) -> dict of arrays`.
      inputs: as for `make_train_step`.
      eval_kwargs: as `train_kwargs` of `make_train_step`, for evaluation.

    Returns:
      The evaluation, a `jax.jit` function. Metrics as `metrics_fn` returns them.

    Raises:
      TypeError: `model` is of another kind, or `eval_kwargs` unknown to it. When traced: `state`
        is not a TrainState; `metrics_fn` did not return a dict.
      ValueError: when traced: the batch shows no inputs; a model with batch statistics has no
        argument for the mode, or writes its statistics in evaluation mode.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax
      >>> from jaxnorm.training import create_train_state, make_eval_step
      >>> x = jnp.arange(6.0).reshape(3, 2)
      >>> state = create_train_state(nn.BatchNorm(epsilon=0.0), optax.sgd(0.1), 0, x)
      >>> evaluate = make_eval_step(nn.BatchNorm(epsilon=0.0), lambda y, b: {"mean": y.mean()})
      >>> evaluate(state, x)["mean"]
      Array(2.5, dtype=float32)
    """
    operation = "make_eval_step"
    adapted = adapt(operation, model, eval_kwargs)
    return jax.jit(build_eval_step(operation, adapted, metrics_fn, inputs))


def build_train_step(
    operation: str,
    model: Model,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    inputs: InputsFn | None,
    skip_nonfinite: bool,
) -> Step:
    """The pure function that `make_train_step` and `make_sweep_step` compile."""
    update = optax.with_extra_args_support(optimizer).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_state(operation, state)
        args, kwargs = _take_inputs(operation, inputs, batch)
        key = jax.random.fold_in(state.rng, state.step)

        def forward(params: Any) -> tuple[jax.Array, tuple[Metrics, Variables]]:
            variables = state.variables._replace(params=params)
            outputs, written = model.train(variables, key, args, kwargs)
            loss, metrics = _take_loss(operation, loss_fn(outputs, batch))
            return loss, (metrics, written)

        (loss, (metrics, written)), grads = jax.value_and_grad(forward, has_aux=True)(state.params)
        updates, opt_state = update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=lambda params: forward(params)[0],
        )
        finite = jnp.isfinite(loss)
        new = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=written.batch_stats,
            model_state=written.model_state,
            opt_state=opt_state,
            nonfinite_step=jnp.where(
                finite | (state.nonfinite_step >= 0), state.nonfinite_step, state.step
            ),
        )
        new = _same_kind(operation, state, new)
        if skip_nonfinite:
            kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            new = kept.replace(step=new.step, nonfinite_step=new.nonfinite_step)
        return new, {"loss": loss, **metrics}

    return step


def build_eval_step(
    operation: str, model: Model, metrics_fn: MetricsFn, inputs: InputsFn | None
) -> EvalStep:
    """The pure function that `make_eval_step` and `make_sweep_eval_step` compile."""

    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        _check_state(operation, state)
        args, kwargs = _take_inputs(operation, inputs, batch)
        key = jax.random.fold_in(state.rng, state.step)
        metrics = metrics_fn(model.evaluate(state.variables, key, args, kwargs), batch)
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"{operation}: metrics_fn must return a dict of arrays; got "
                f"{type(metrics).__name__}. Return one, such as "
                '{"accuracy": (outputs.argmax(-1) == batch["y"]).mean()}.'
            )
        return dict(metrics)

    return evaluate


def build_loop(operation: str, step: Step) -> Step:
    """`step` over batches stacked on a leading axis, in one `lax.scan`."""

    def loop(state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
        leading_size(operation, batches, "with scan=True, steps")
        return jax.lax.scan(step, state, batches)

    return loop


def leading_size(operation: str, batch: Batch, what: str) -> int:
    """The common size of the leading axis of all leaves; three-part ValueError if none."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) == 1 and None not in sizes:
        return shapes[0][0]
    raise ValueError(
        f"{operation}: every leaf of the batch must have the same leading axis, {what}; got leaves "
        f"of shape {', '.join(map(str, shapes)) or '(none)'}. Stack the batches: "
        "jax.tree.map(lambda *x: jnp.stack(x), *batches)."
    )


def _check_state(operation: str, state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{operation}: the first argument of the step must be a TrainState; got "
            f"{type(state).__name__}. Make one with create_train_state or create_sweep_state and "
            "call step(state, batch)."
        )
    if state.step.ndim:
        raise TypeError(
            f"{operation}: the state must be that of one run; got a sweep of "
            f"{state.step.shape[0]} members. Use make_sweep_step and make_sweep_eval_step, or take "
            "one run out with sweep_member."
        )


def _take_inputs(
    operation: str, inputs: InputsFn | None, batch: Batch
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword inputs of the model."""
    if inputs is None:
        return (_default_input(operation, batch),), {}
    taken = inputs(batch)
    if isinstance(taken, tuple):
        return taken, {}
    if isinstance(taken, Mapping):
        return (), taken
    if hasattr(taken, "shape"):
        return (taken,), {}
    raise ValueError(
        f"{operation}: inputs(batch) must return the model's inputs; got {type(taken).__name__}. "
        'Return a tuple, as in inputs=lambda batch: (batch["x"], batch["mask"]), or a dict of '
        "keyword inputs."
    )


def _default_input(operation: str, batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        if "x" in batch:
            return batch["x"]
        got = "a dict with the keys " + (", ".join(map(repr, batch)) or "(none)")
    elif isinstance(batch, tuple | list):
        if batch:
            return batch[0]
        got = f"an empty {type(batch).__name__}"
    elif hasattr(batch, "shape"):
        return batch
    else:
        got = type(batch).__name__
    raise ValueError(
        f'{operation}: the model\'s input is batch["x"] of a dict, batch[0] of a tuple or a batch '
        f"that is one array; got {got}. Say where it is: inputs=lambda batch: (...,)."
    )


def _take_loss(operation: str, result: Any) -> tuple[jax.Array, Metrics]:
    """Loss and metrics from what `loss_fn` returned."""
    pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)
    loss, metrics = result if pair else (result, {})
    if not hasattr(loss, "dtype") and not isinstance(loss, float):
        shown = type(loss).__name__
        if isinstance(loss, tuple):
            kinds = ("array" if hasattr(x, "dtype") else type(x).__name__ for x in loss)
            shown = f"a tuple of {', '.join(kinds)}"
        raise TypeError(
            f"{operation}: loss_fn must return loss or (loss, metrics); got {shown}. "
            'Return a scalar array, or such an array and a dict: loss, {"accuracy": accuracy}.'
        )
    loss = strong(loss)
    if loss.shape != ():
        raise ValueError(
            f"{operation}: the loss must be a scalar; loss_fn returned shape {loss.shape}. Reduce "
            "it: loss.mean()."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"{operation}: the loss must be floating; loss_fn returned {loss.dtype}. Compute it "
            "from the model's outputs in floating point."
        )
    if "loss" in metrics:
        raise ValueError(
            f'{operation}: metrics["loss"] is the loss itself; the metrics of loss_fn have the key '
            '"loss" too. Rename that metric.'
        )
    return loss, dict(metrics)


def _same_kind(operation: str, old: TrainState, new: TrainState) -> TrainState:
    """`new`, which must have the structure, shapes and dtypes of `old`.

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
