"""Preparation of a step's arguments on the host, before a compiled step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from jaxnorm._jax import is_traced
from jaxnorm.training.layout import Layout, check_placed, place_batch
from jaxnorm.training.objective import Batch
from jaxnorm.training.programs import check_single
from jaxnorm.training.state import TrainState


class PreparedStep:
    """A compiled step that checks and completes its arguments before it runs.

    With a monitor, a state without a buffer gets an empty one. With a layout, the batch is placed,
    and the state must lie where the layout puts it.
    """

    def __init__(
        self,
        operation: str,
        compiled: Any,
        layout: Layout | None,
        *,
        scan: bool = False,
        buffer: Callable[[TrainState, Batch], Any] | None = None,
        check: Callable[[Any, Batch], None] | None = None,
    ) -> None:
        self._operation = operation
        self.compiled = compiled
        self._layout = layout
        self._scan = scan
        self._buffer = buffer
        self._check = check or (lambda state, batch: check_single(operation, state))

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        """Run the step. A training step returns (state, metrics), an evaluation returns metrics."""
        return self._run(self.compiled, state, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step before compilation. The arguments may be `jax.ShapeDtypeStruct`s."""
        return self._run(self.compiled.lower, state, batch)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """The step before lowering. The arguments may be `jax.ShapeDtypeStruct`s."""
        return self._run(self.compiled.trace, state, batch)

    def _run(self, function: Callable[..., Any], state: Any, batch: Any) -> Any:
        self._check(state, batch)
        layout, missing = self._layout, self._buffer is not None and state.monitor is None
        if layout is None and not missing:
            return function(state, batch)
        given = jax.tree.leaves((state, batch))
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in given)
        with contextlib.nullcontext() if layout is None else layout.context():
            if missing:
                state = state.replace(monitor=self._empty(state, batch, abstract))
            if layout is None:
                return function(state, batch)
            if missing or abstract:
                state = layout.place(state)
            if not any(is_traced(leaf) for leaf in given):
                check_placed(self._operation, layout, state)
                batch = place_batch(self._operation, layout, batch, self._scan)
            return function(state, batch)

    def _empty(self, state: TrainState, batch: Batch, abstract: bool) -> Any:
        """An empty buffer, or its shapes if the state is made of shapes."""
        assert self._buffer is not None
        first = jax.tree.map(lambda x: x[0], batch) if self._scan else batch
        buffer = self._buffer(state, first)
        return jax.eval_shape(lambda: buffer) if abstract else buffer
