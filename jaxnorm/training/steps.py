"""Compiled training and evaluation steps of a single run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxnorm.models.adapt import adapt
from jaxnorm.training.alternating import compile_step
from jaxnorm.training.create import check_optimizer
from jaxnorm.training.layout import Layout, check_layout
from jaxnorm.training.objective import InputsFn, LossFn, Objective, Policy
from jaxnorm.training.precision import compute_dtype_of
from jaxnorm.training.prepared import PreparedStep
from jaxnorm.training.programs import (
    EvalStep,
    MetricsFn,
    Step,
    StepMonitor,
    build_eval_step,
    build_train_step,
)


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
    layout: Layout | None = None,
    accumulate: int = 1,
    statistics: str = "micro_batch",
    remat: bool | Policy = False,
    compute_dtype: Any = None,
    monitor: StepMonitor | None = None,
) -> Step:
    """Make a compiled training step: `step(state, batch) -> (state, metrics)`.

    With parameters `p`, statistics `s`, optimizer state `o` and the batch `b` of step `t`:

        outputs, s' = model(p, s, inputs(b); training mode, random key fold_in(rng, t))
        loss, metrics = loss_fn(outputs, b);   u, o' = optimizer(d loss / d p, o, p);   p' = p + u

    The statistics are those of the one forward pass whose loss is returned, and they are stored
    once. Neither rematerialization nor a line search nor a retry of the step counts a batch twice.
    The random key depends on the state alone, so the same state and batch give the same result.

    The state is donated: its buffers are reused for the new state and must not be read again. The
    step is a `jax.jit` function, with `lower` and the rest. With a layout or a monitor it is a
    callable with `lower`, which also takes `jax.ShapeDtypeStruct`s.

    Args:
        model: a Linen module, an NNX module, or a function `rngs -> nnx.Module`, as in
            `create_train_state`. Of an NNX instance only the structure is used. Its values come
            from the state, and so do those of its random streams.
        optimizer: any `optax.GradientTransformation`. One that takes further arguments gets
            `value`, `grad` and `value_fn` (optax.lbfgs, polyak_sgd, contrib.reduce_on_plateau).
        loss_fn: `(outputs, batch) -> loss` or `-> (loss, metrics)`. `loss` is a floating scalar,
            and `metrics` is a dict of arrays without the key "loss".
        inputs: a function that takes the model's inputs out of a batch. It returns a tuple of
            positional inputs, a dict of keyword inputs, or a single array. The default is
            `batch["x"]` of a mapping, `batch[0]` of a tuple or list, and an array itself.
        train_kwargs: keyword arguments for the model's call. The mode is found without them if the
            call takes `train`, `training`, `is_training`, `deterministic` or `use_running_average`
            (a Linen module may have such a field instead). These arguments win over what is found.
            An NNX model is switched by `.train()` and `nnx.view`. This also switches layers that a
            user froze with `use_running_average=True`, as `.train()` always does.
        skip_nonfinite: True leaves parameters, statistics and optimizer state unchanged in a step
            whose loss is not finite. Otherwise the update is applied, NaN or not. In both cases the
            step counts, and it is recorded in `state.nonfinite_step`. Only the loss is checked; for
            gradients see `optax.apply_if_finite`.
        scan: True runs many steps in one compiled loop. Every leaf of the batch then has a leading
            axis of steps, and so have the metrics. This helps if a step is so small that its
            dispatch takes most of the time.
        donate: False keeps the old state readable, at the cost of its memory.
        layout: run over the layout's mesh. The numbers are those of one device with the whole
            batch, up to rounding. The state must be placed (`create_train_state(...,
            layout=layout)`), and every leaf of the new state keeps the sharding of the old one. A
            batch that is not yet on the mesh is placed by `layout.batch`.
        accumulate: k > 1 makes one update from k micro-batches, one after another. Rows j, j + k, j
            + 2k and so on of every leaf of the batch are micro-batch j, on any number of devices.
            Loss, gradient and metrics are means over the micro-batches; the gradient is summed in
            float32 at least. Leaves of shape () go to each micro-batch.
        statistics: used with `accumulate`. "micro_batch": every micro-batch is normalized with its
            own statistics, running statistics are updated k times, and the activations of one
            micro-batch are in memory at a time. "exact": statistics, gradient and the one running
            update are those of the whole batch. A layer's statistics need the earlier layers on all
            rows, so this is one forward pass over the whole batch and takes its memory; `remat`
            lowers that.
        remat: keep less for the backward pass, and compute the rest again there. True: a forward
            pass with n products and convolutions is cut at about sqrt(n) places where the fewest
            bytes are alive. Only the values at the cuts are kept, and sums, so that no statistics
            are computed again or summed over devices again. The cost is most of a second forward
            pass. A policy of `jax.checkpoint_policies`: the whole pass is one `jax.checkpoint` with
            it. This lowers what is kept, but seldom the peak, because the backward pass begins by
            computing everything again. In both cases random numbers are the same, and statistics
            are counted once.
        compute_dtype: bfloat16 casts parameters and floating inputs for the forward pass.
            Parameters of normalization layers are cast too: a float32 scale would turn the layer's
            output into float32 (Flax's rule), and with it the rest of the network. Statistics are
            computed in float32 from any input. Parameters in the state, optimizer state, running
            statistics and gradient keep their dtypes, and `loss_fn` gets float32 outputs. float16
            is refused, because it would need loss scaling.
        monitor: a `jaxnorm.monitor.Monitor`, which takes a sample at every k-th step and keeps it
            in `state.monitor`. Two programs are compiled before the first step, one that takes a
            sample and one that does not. The host counts the steps and chooses the program. It
            reads the device once for a state that comes from elsewhere, such as a checkpoint or
            another function.

    Returns:
        The step. `metrics` holds "loss", of shape () or (steps,) with `scan`, and the metrics of
        `loss_fn`.

    Raises:
        TypeError: `model` or `optimizer` is of another kind, or the model does not know
            `train_kwargs`. When the step is traced: `state` is not a TrainState; the loss is not
            floating, or `loss_fn` returned something else; a leaf of the state changed its shape or
            dtype.
        ValueError: `accumulate`, `statistics` or `compute_dtype` is none of those above. When the
            step is called: the state does not lie where the layout puts it; the number of rows is
            no multiple of micro-batches times devices. When the step is traced: the loss is not a
            scalar; the batch shows no inputs; a model with batch statistics has no argument for the
            mode; the state belongs to another model.

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
    compute_dtype = compute_dtype_of(operation, compute_dtype)
    objective = Objective(
        operation,
        (monitor.adapt if monitor else adapt)(operation, model, train_kwargs, compute_dtype),
        loss_fn,
        inputs,
        layout=check_layout(operation, layout),
        accumulate=accumulate,
        statistics=statistics,
        remat=remat,
        compute_dtype=compute_dtype,
    )
    step = build_train_step(objective, optimizer, skip_nonfinite)
    compiled = compile_step(operation, step, monitor, scan=scan, donate=donate, layout=layout)
    if layout is None and monitor is None:
        return compiled
    buffer = functools.partial(monitor.buffer, step) if monitor else None
    return PreparedStep(operation, compiled, layout, scan=scan, buffer=buffer)


def make_eval_step(
    model: Any,
    metrics_fn: MetricsFn,
    *,
    inputs: InputsFn | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    compute_dtype: Any = None,
) -> EvalStep:
    """Make a compiled evaluation: `evaluate(state, batch) -> metrics`.

    The model runs in evaluation mode on the stored statistics. Nothing is written: a Linen model is
    applied with `mutable=False`, and everything that an NNX model writes is dropped. The state is
    not donated, and no new state is returned.

    Args:
        model: as for `make_train_step`.
        metrics_fn: `(outputs, batch) -> dict of arrays`.
        inputs: as for `make_train_step`.
        eval_kwargs: keyword arguments for the model's call, as `train_kwargs` of `make_train_step`.
        layout: as for `make_train_step`.
        compute_dtype: as for `make_train_step`.

    Returns:
        The evaluation: a `jax.jit` function, or with a layout a callable with `lower`. Its metrics
        are those of `metrics_fn`.

    Raises:
        TypeError: `model` is of another kind, or does not know `eval_kwargs`. When traced: `state`
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
    dtype = compute_dtype_of(operation, compute_dtype)
    adapted = adapt(operation, model, eval_kwargs, dtype)
    layout = check_layout(operation, layout)
    compiled = jax.jit(build_eval_step(operation, adapted, metrics_fn, inputs, layout, dtype))
    return compiled if layout is None else PreparedStep(operation, compiled, layout)
