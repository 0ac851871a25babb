"""Steps that a monitor looks at and steps that it does not: two programs, taken in turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxnorm._jax import is_traced
from jaxnorm.training.layout import Layout, keep_state
from jaxnorm.training.objective import Batch, Metrics
from jaxnorm.training.programs import Made, Monitor, Step, build_loop
from jaxnorm.training.state import TrainState


def compile_step(
    operation: str,
    made: Made,
    monitor: Monitor | None,
    *,
    scan: bool,
    donate: bool,
    layout: Layout | None = None,
    mapped: Callable[[Step], Step] = lambda step: step,
    members: str | None = None,
) -> Any:
    """A step, compiled; where there is a monitor it looks when it is time.

    Args:
        operation: its name in errors.
        made: the step of one run.
        monitor: what to look at, if at anything.
        scan: whether it is a loop over many batches.
        donate: whether a state is given up for the new one.
        layout: of the state.
        mapped: makes the step of a run that of a sweep.
        members: the axis of the sweep.
    """

    def compiled(step: Step) -> Any:
        step = build_loop(operation, step) if scan else step
        return jax.jit(mapped(step), donate_argnums=(0,) if donate else ())

    def plain(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new, metrics, _ = made(state, batch)
        return new, metrics

    def kept(step: Step) -> Step:
        def keeping(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            new, metrics = step(state, batch)
            return keep_state(layout, new), metrics

        return keeping

    if monitor is None:
        return compiled(plain)
    looking = kept(monitor.looking(made))
    if monitor.every == 1:
        return compiled(looking)
    choosing = compiled(kept(monitor.choosing(made, members)))
    if scan:
        return choosing
    return Turns(monitor.every, compiled(plain), compiled(looking), choosing)


class Turns:
    """A step in two programs, with a look and without.

    The host knows which is next, since it counts: it reads the number of a state's step from the
    device only where no call has returned the state. So the steps without a look are exactly those
    of a run without a monitor. In a larger program, which may be any number of steps old by the
    time it runs, there is a third one that chooses on the device.
    """

    def __init__(self, every: int, plain: Any, looking: Any, choosing: Any) -> None:
        self._every = every
        self.plain = plain
        self.looking = looking
        self._choosing = choosing
        self.lower, self.trace = choosing.lower, choosing.trace
        # Several runs may take turns with one step. A state given up is known by its identity.
        self._numbers: deque[tuple[Any, int]] = deque(maxlen=8)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """New state and metrics."""
        if any(is_traced(leaf) for leaf in jax.tree.leaves((state, batch))):
            return self._choosing(state, batch)
        bare, number = state.replace(monitor=None), self._number(state)
        if not self._numbers:
            # Both now: no step of a run is to be late for it, nor to be the first to fail.
            self.looking.lower(state, batch).compile()
            self.plain.lower(bare, batch).compile()
        if number % self._every == 0:
            new, metrics = self.looking(state, batch)
        else:
            new, metrics = self.plain(bare, batch)
            new = new.replace(monitor=state.monitor)
        self._numbers.append((new.step, number + 1))
        return new, metrics

    def _number(self, state: TrainState) -> int:
        """The number of the step to be made; in a sweep that of the furthest member."""
        for step, number in self._numbers:
            if step is state.step:
                return number
        return int(np.max(jax.device_get(state.step)))
