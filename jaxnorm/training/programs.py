"""Training and evaluation as pure functions `(state, batch) -> ...`, to be compiled.

`steps.py` compiles them for one run. `sweep.py` maps the same functions over members. So a member
of a sweep and a single run are one computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxnorm.models.adapt import Model
from jaxnorm.training.layout import Layout, keep_batch, keep_parameters, keep_state
from jaxnorm.training.objective import Batch, InputsFn, Metrics, Objective, take_inputs
from jaxnorm.training.precision import narrowed, widened
from jaxnorm.training.state import TrainState, same_kind

MetricsFn = Callable[[Any, Batch], Mapping[str, Any]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
StepWithGradients = Callable[[TrainState, Batch], tuple[TrainState, Metrics, Any]]
"""A step that also returns the gradient and the update of the parameters."""
EvalStep = Callable[[TrainState, Batch], Metrics]


class StepMonitor(Protocol):
    """The part of `jaxnorm.monitor.Monitor` that a training step uses."""

    def adapt(
        self, operation: str, model: Any, mode_kwargs: Any = None, compute_dtype: Any = None
    ) -> Model:
        """The model with marks at the places that are observed."""
        ...

    @property
    def every(self) -> int:
        """The number of steps from one sample to the next."""
        ...

    def sampling(self, step_with_gradients: StepWithGradients, /) -> Step:
        """A step that always takes a sample and keeps it in the state."""
        ...

    def conditional(
        self, step_with_gradients: StepWithGradients, /, members: str | None = None
    ) -> Step:
        """A step that decides on the device whether it takes a sample."""
        ...

    def buffer(
        self, step_with_gradients: StepWithGradients, /, state: TrainState, batch: Batch
    ) -> Any:
        """The empty buffer that `state.monitor` is before the first step."""
        ...


def build_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, skip_nonfinite: bool
) -> StepWithGradients:
    """The pure function that `make_train_step` and `make_sweep_step` compile.

    Besides the state and the metrics it returns the gradient and the update, for a monitor.
    """
    operation, layout = objective.operation, objective.layout
    update = optax.with_extra_args_support(optimizer).update
    taken = inspect.signature(update).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, Any]:
        check_single(operation, state)
        batch = keep_batch(operation, layout, batch, objective.accumulate)
        key = jax.random.fold_in(state.rng, state.step)
        result, grads = objective.value_and_grad(state.variables, key, batch)
        loss, (metrics, written) = result
        grads = keep_parameters(layout, grads)
        extra = {
            "value": loss,
            "grad": grads,
            "value_fn": lambda params: objective.value(params, state.variables, key, batch),
        }
        given = {name: value for name, value in extra.items() if takes_all or name in taken}
        updates, opt_state = update(grads, state.opt_state, state.params, **given)
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
        new = same_kind(operation, state, new)
        if skip_nonfinite:
            kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            new = kept.replace(step=new.step, nonfinite_step=new.nonfinite_step)
        return keep_state(layout, new), {"loss": loss, **metrics}, (grads, updates)

    return step


def build_eval_step(
    operation: str,
    model: Model,
    metrics_fn: MetricsFn,
    inputs: InputsFn | None,
    layout: Layout | None = None,
    compute_dtype: Any = None,
) -> EvalStep:
    """The pure function that `make_eval_step` and `make_sweep_eval_step` compile."""

    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        check_single(operation, state)
        batch = keep_batch(operation, layout, batch)
        args, kwargs = narrowed(take_inputs(operation, inputs, batch), compute_dtype)
        params = keep_parameters(layout, narrowed(state.params, compute_dtype), gathered=True)
        key = jax.random.fold_in(state.rng, state.step)
        variables = state.variables._replace(params=params)
        outputs = model.evaluate(variables, key, args, kwargs)
        metrics = metrics_fn(widened(outputs) if compute_dtype else outputs, batch)
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"{operation}: metrics_fn must return a dict of arrays; got "
                f"{type(metrics).__name__}. Return one, such as "
                '{"accuracy": (outputs.argmax(-1) == batch["y"]).mean()}.'
            )
        return dict(metrics)

    return evaluate


def build_loop(operation: str, step: Step) -> Step:
    """A function that makes `step` over batches stacked on a leading axis, in one `lax.scan`."""

    def loop(state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
        leading_size(operation, batches, "with scan=True, steps")
        return jax.lax.scan(step, state, batches)

    return loop


def leading_size(operation: str, batch: Batch, what: str) -> int:
    """The common size of the leading axis of all leaves, or a three-part ValueError."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) == 1 and None not in sizes:
        return shapes[0][0]
    raise ValueError(
        f"{operation}: every leaf of the batch must have the same leading axis, {what}; got leaves "
        f"of shape {', '.join(map(str, shapes)) or '(none)'}. Stack the batches: "
        "jax.tree.map(lambda *x: jnp.stack(x), *batches)."
    )


def check_single(operation: str, state: Any) -> None:
    """Raise a three-part TypeError for anything but the state of one run."""
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
