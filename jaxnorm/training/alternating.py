"""A step that alternates between two compiled programs: one takes a sample, one does not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxnorm._jax import is_traced
from jaxnorm.training.layout import Layout, keep_state
from jaxnorm.training.objective import Batch, Metrics
from jaxnorm.training.programs import Step, StepMonitor, StepWithGradients, build_loop
from jaxnorm.training.state import TrainState


def compile_step(
    operation: str,
    step_with_gradients: StepWithGradients,
    monitor: StepMonitor | None,
    *,
    scan: bool,
    donate: bool,
    layout: Layout | None = None,
    mapped: Callable[[Step], Step] = lambda step: step,
    members: str | None = None,
) -> Any:
    """Compile a training step; with a monitor the step also takes samples.

    Args:
        operation: the name that errors begin with.
        step_with_gradients: the step of one run, uncompiled.
        monitor: the monitor that takes the samples, or None.
        scan: True if the step is a loop over many batches.
        donate: True if the new state may reuse the buffers of the old one.
        layout: the layout of the state, or None.
        mapped: a function that turns the step of one run into the step of a sweep.
        members: the name of the sweep's mapped axis, or None.
    """

    def compiled(step: Step) -> Any:
        step = build_loop(operation, step) if scan else step
        return jax.jit(mapped(step), donate_argnums=(0,) if donate else ())

    def unmonitored(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new, metrics, _ = step_with_gradients(state, batch)
        return new, metrics

    def kept(step: Step) -> Step:
        def keeping(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            new, metrics = step(state, batch)
            return keep_state(layout, new), metrics

        return keeping

    if monitor is None:
        return compiled(unmonitored)
    sampling = kept(monitor.sampling(step_with_gradients))
    if monitor.every == 1:
        return compiled(sampling)
    conditional = compiled(kept(monitor.conditional(step_with_gradients, members)))
    if scan:
        return conditional
    return AlternatingStep(monitor.every, compiled(unmonitored), compiled(sampling), conditional)


class AlternatingStep:
    """A training step in two compiled programs: one takes a sample, the other does not.

    The host knows which program is next, because it counts the steps. It reads the step number
    from the device only for a state that none of its own calls has returned. So the steps without
    a sample run exactly the program of a run without a monitor. A larger program that contains
    this step cannot know at trace time which step number it will meet. For that case there is a
    third program, the conditional step, which decides on the device.
    """

    def __init__(self, every: int, unmonitored: Any, sampling: Any, conditional: Any) -> None:
        self._every = every
        self.unmonitored = unmonitored
        self.sampling = sampling
        self._conditional = conditional
        self.lower, self.trace = conditional.lower, conditional.trace
        # Several runs may alternate on one step. A returned state is recognized by the identity of
        # its step counter.
        self._numbers: deque[tuple[Any, int]] = deque(maxlen=8)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Make one step and return the new state and the metrics."""
        if any(is_traced(leaf) for leaf in jax.tree.leaves((state, batch))):
            return self._conditional(state, batch)
        bare, number = state.replace(monitor=None), self._number(state)
        if not self._numbers:
            # Compile both programs now. Otherwise a later step would stop for the compiler, and an
            # error of the second program would show only there.
            self.sampling.lower(state, batch).compile()
            self.unmonitored.lower(bare, batch).compile()
        if number % self._every == 0:
            new, metrics = self.sampling(state, batch)
        else:
            new, metrics = self.unmonitored(bare, batch)
            new = new.replace(monitor=state.monitor)
        self._numbers.append((new.step, number + 1))
        return new, metrics

    def _number(self, state: TrainState) -> int:
        """The number of the next step; in a sweep that of the member that is furthest ahead."""
        for step, number in self._numbers:
            if step is state.step:
                return number
        return int(np.max(jax.device_get(state.step)))
