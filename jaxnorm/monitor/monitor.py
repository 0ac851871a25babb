"""The monitor of a training run: the places it observes, and how often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._jax import run_program
from jaxnorm.models.adapt import Model
from jaxnorm.models.select import Selection
from jaxnorm.monitor.probe.attach import adapted
from jaxnorm.monitor.probe.observe import observe_program
from jaxnorm.monitor.samples.buffer import Buffer
from jaxnorm.monitor.samples.gradient_shift import shift_of
from jaxnorm.monitor.samples.schema import ParameterSummary, Sample, Schema


@dataclass(frozen=True)
class Monitor:
    """Settings of a monitor: which layers it samples, and at which steps.

    Args:
        every: sample each step whose number is a multiple of this. The other steps run the
            program that they would run without a monitor.
        capacity: samples that wait on the device until they are read; older ones are lost.
        layers: the layers and nonlinearities to observe: a pattern of their paths with * for
            anything, a class of layers, several of these, or a function of a path and the name of
            a class or nonlinearity. None: all normalization layers and all nonlinearities.
        elements: about how many elements of an array to sample, evenly distributed; None for all.
            All channels of a batch norm's input are sampled, at a thousand positions or more.
        gradients: True to observe gradients, too.
        shift: True to measure `internal_covariate_shift` from each sampled step to the parameters
            after it, on its own batch. That costs a gradient for each layer.
        channels: True to observe each channel, too, at every place: along the feature axes of a
            batch norm, along the last axis elsewhere. A channel has no histogram.

    Raises:
        TypeError, ValueError: an argument is none of those above.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax
        >>> from jaxnorm.monitor import Monitor
        >>> from jaxnorm.training import create_train_state, make_train_step
        >>> model, optimizer = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)]), optax.sgd(0.1)
        >>> x = jnp.arange(6.0).reshape(3, 2)
        >>> state = create_train_state(model, optimizer, 0, x)
        >>> step = make_train_step(
        ...     model, optimizer, lambda y, b: (y**2).mean(), monitor=Monitor(every=2)
        ... )
        >>> for _ in range(5):
        ...     state, metrics = step(state, x)
        >>> steps, rows, lost = state.monitor.read()
        >>> steps.tolist(), lost
        ([0, 2, 4], 0)
    """

    every: int = 64
    capacity: int = 256
    layers: Any = None
    elements: int | None = 4096
    gradients: bool = True
    shift: bool = False
    channels: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "capacity", "elements"):
            value = getattr(self, name)
            optional = name == "elements" and value is None
            if not optional and (type(value) is not int or value < 1):
                raise ValueError(
                    f"Monitor: {name} must be an int of at least 1; got {name}={value!r}. "
                    f"For example {name}={type(self).__dataclass_fields__[name].default}."
                )
        Selection.of("Monitor", self.layers)

    def adapt(
        self,
        operation: str,
        model: Any,
        mode_kwargs: Mapping[str, Any] | None = None,
        compute_dtype: Any = None,
    ) -> Model:
        """The model as a training step takes it, with marks."""
        selection = Selection.of("Monitor", self.layers)
        return adapted(operation, selection, model, mode_kwargs, compute_dtype)

    def sampling(self, step_with_gradients: Callable) -> Callable:
        """A step that takes a sample.

        Args:
            step_with_gradients: `(state, batch) -> (state, metrics, (gradient, update))`.

        Returns:
            `(state, batch) -> (state, metrics)`; the state has a buffer.
        """

        def step(state: Any, batch: Any) -> Any:
            bare = state.replace(monitor=None)
            traced = _Traced(step_with_gradients, bare, batch)
            new, metrics, row = self._row(traced, bare, batch, state.monitor)
            return new.replace(monitor=state.monitor.push(state.step, row, True)), metrics

        return step

    def conditional(self, step_with_gradients: Callable, members: str | None = None) -> Callable:
        """A step that takes a sample when it is time.

        Args:
            step_with_gradients: as for `sampling`.
            members: the axis of a `vmap` around it whose members all make the same step.

        Returns:
            As `sampling`.
        """

        def step(state: Any, batch: Any) -> Any:
            bare = state.replace(monitor=None)
            traced = _Traced(step_with_gradients, bare, batch)

            def unmonitored(bare: Any, row: Any) -> Any:
                new, metrics, _ = traced.run(jax.tree.leaves((bare, batch)))
                return new, metrics, row

            def sampling(bare: Any, row: Any) -> Any:
                return self._row(traced, bare, batch, state.monitor)

            now = state.step if members is None else lax.pmax(state.step, members)
            taken = now % self.every == 0
            row = jnp.zeros(state.monitor.schema.width, jnp.float32)
            new, metrics, row = _either(taken, sampling, unmonitored, bare, row)
            return new.replace(monitor=state.monitor.push(state.step, row, taken)), metrics

        return step

    def buffer(self, step_with_gradients: Callable, state: Any, batch: Any) -> Buffer:
        """An empty buffer for the samples of a step; nothing is computed."""

        def sampled(state: Any, batch: Any) -> Sample:
            return self._sample(_Traced(step_with_gradients, state, batch), state, batch)[2]

        sample = jax.eval_shape(sampled, state, batch)
        return Buffer.empty(Schema.of(sample, state.params), self.capacity)

    def _row(self, traced: _Traced, bare: Any, batch: Any, buffer: Buffer) -> tuple[Any, Any, Any]:
        """The step's results, and the row of a sample of it."""
        new, metrics, sample = self._sample(traced, bare, batch)
        _check_same(buffer.schema, Schema.of(sample, bare.params))
        return new, metrics, sample.row

    def _sample(self, traced: _Traced, state: Any, batch: Any) -> tuple[Any, Any, Sample]:
        """The step's results, and a sample of it."""
        leaves = jax.tree.leaves((state, batch))
        results, observations = observe_program(
            traced.program, leaves, self.elements, self.gradients, self.channels
        )
        new, metrics, (gradient, update) = jax.tree.unflatten(traced.results, results)
        numbers = {name: m for name, m in metrics.items() if jnp.ndim(m) == 0}

        def gradient_at(params: Any) -> Any:
            # The compiler leaves out the rest of the step, which nothing uses.
            return traced.run(jax.tree.leaves((state.replace(params=params), batch)))[2][0]

        shift = None
        if self.shift:  # one by one, in the memory of one
            shift = shift_of(gradient_at, state.params, new.params, gradient, batch_size=1)
        norms = _norms(state.params, gradient, update)
        return new, metrics, Sample(observations, norms, numbers, shift)


class _Traced:
    """The program of a step, and the structure of its results."""

    def __init__(self, step: Callable, *args: Any):
        self.program, shape = jax.make_jaxpr(step, return_shape=True)(*args)
        self.results = jax.tree.structure(shape)

    def run(self, leaves: list[Any]) -> Any:
        """Run the traced step on these leaves."""
        return jax.tree.unflatten(self.results, run_program(self.program, leaves))


def _either(taken: Any, sampling: Callable, unmonitored: Callable, state: Any, row: Any) -> Any:
    """The results of one of two steps, chosen on the device."""

    def branch(state: Any, row: Any) -> Any:
        return lax.cond(taken, sampling, unmonitored, state, row)

    def iterations(state: Any, row: Any) -> Any:
        metrics = jax.eval_shape(unmonitored, state, row)[1]
        results = state, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics), row
        for step, times in ((unmonitored, ~taken), (sampling, taken)):
            results = lax.fori_loop(
                0, times.astype(jnp.int32), lambda _, r, step=step: step(r[0], r[2]), results
            )
        return results

    # On CPUs the results of a branch are copied to where the state was: thirty small copies are a
    # few percent of a small step. A loop of one iteration, or of none, changes the state in place.
    return lax.platform_dependent(state, row, cpu=iterations, default=branch)


def _norms(*trees: Any) -> ParameterSummary:
    """Euclidean norms of all arrays of parameters, of their gradient and of their update."""
    rows = [_squares(*arrays) for arrays in zip(*map(jax.tree.leaves, trees))]
    squares = jnp.stack(rows, 1) if rows else jnp.zeros((len(trees), 0))
    return ParameterSummary(*jnp.sqrt(squares))


def _squares(*arrays: Any) -> Any:
    wide = [jnp.abs(a).astype(jnp.float32).reshape(-1) for a in arrays]
    if arrays[0].size > _SMALL:
        return jnp.stack([jnp.vdot(a, a) for a in wide])
    return lax.square(jnp.stack(wide)).sum(1)


_SMALL = 2**12  # up to here one operation on three copies costs less than three


def _check_same(was: Schema, now: Schema) -> None:
    if was == now:
        return
    before, after = dict(was.columns), dict(now.columns)
    differing = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    raise ValueError(
        "Monitor: every sample of a run must show the same; the state's buffer and this step "
        f"differ in {', '.join(differing[:4])}. Take the buffer out, state.replace(monitor=None), "
        "and the step makes a new one."
    )
