"""The loss of a batch as a function of the parameters, and its gradient.

This module decides how the loss is computed: which part of the batch is the input, precision,
rematerialization, and the accumulation over micro-batches. It does not decide what is done with the
gradient. The statistics that it returns are those of one pass over the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.models.adapt import Model, Variables
from jaxnorm.training.layout import Layout, keep_batch, keep_parameters
from jaxnorm.training.precision import narrowed, widened
from jaxnorm.training.rematerialize import in_segments
from jaxnorm.training.state import same_kind, strong

Batch = Any
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], Any]
InputsFn = Callable[[Batch], Any]
Policy = Callable[..., Any]
Result = tuple[jax.Array, tuple[Metrics, Variables]]  # (loss, (metrics, new variables))


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a batch; the fields are arguments of `make_train_step`."""

    operation: str
    model: Model
    loss_fn: LossFn
    inputs: InputsFn | None = None
    layout: Layout | None = None
    accumulate: int = 1
    statistics: str = "micro_batch"
    remat: bool | Policy = False
    compute_dtype: Any = None

    def __post_init__(self) -> None:
        if self.statistics not in ("micro_batch", "exact"):
            raise ValueError(
                f"{self.operation}: statistics must be 'micro_batch' (each micro-batch is "
                "normalized with its own) or 'exact' (all with those of the whole batch); got "
                f"statistics={self.statistics!r}. Choose one of the two."
            )
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise ValueError(
                f"{self.operation}: accumulate must be the number of micro-batches of a batch, an "
                f"int of at least 1; got accumulate={self.accumulate!r}. For example accumulate=4."
            )
        if not isinstance(self.remat, bool) and not callable(self.remat):
            raise TypeError(
                f"{self.operation}: remat must be a bool or a policy of jax.checkpoint; got "
                f"remat={self.remat!r}. For example remat=True, or "
                "remat=jax.checkpoint_policies.nothing_saveable."
            )

    def value(self, params: Any, variables: Variables, key: jax.Array, batch: Batch) -> jax.Array:
        """The loss at `params`, which an optimizer with a line search asks for."""
        if not self._accumulates:
            return self._pass(params, variables, key, batch)[0]

        @jax.checkpoint  # under differentiation one micro-batch is kept at a time
        def micro_batch(variables: Variables, i: jax.Array) -> tuple[Variables, jax.Array]:
            loss, (_, written) = self._micro_batch(params, variables, key, batch, i)
            return written, loss

        return lax.scan(micro_batch, variables._replace(params=None), self._indices)[1].mean()

    def value_and_grad(
        self, variables: Variables, key: jax.Array, batch: Batch
    ) -> tuple[Result, Any]:
        """The result at `variables.params`, and the gradient of the loss there."""
        params, carried = variables.params, variables._replace(params=None)
        if not self._accumulates:
            return jax.value_and_grad(self._pass, has_aux=True)(params, carried, key, batch)

        def micro_batch(carry: Any, i: jax.Array) -> tuple[Any, Any]:
            total, variables = carry

            def loss_of(params: Any) -> Result:
                return self._micro_batch(params, variables, key, batch, i)

            loss, back, (metrics, written) = jax.vjp(loss_of, params, has_aux=True)
            # The cotangent is this micro-batch's share of the step's loss. So all gradients inside,
            # which a monitor may sample, are gradients of the step's loss too.
            (grads,) = back(jnp.full_like(loss, 1 / self.accumulate))
            total = jax.tree.map(jnp.add, total, widened(grads))
            return (keep_parameters(self.layout, total), written), (loss, metrics)

        zeros = keep_parameters(self.layout, widened(jax.tree.map(jnp.zeros_like, params)))
        (total, written), (losses, metrics) = lax.scan(micro_batch, (zeros, carried), self._indices)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), total, params)
        return (losses.mean(), (_mean(metrics), written)), grads

    @property
    def _accumulates(self) -> bool:
        return self.accumulate > 1 and self.statistics == "micro_batch"

    @property
    def _indices(self) -> jax.Array:
        return jnp.arange(self.accumulate)

    def _micro_batch(
        self, params: Any, variables: Variables, key: jax.Array, batch: Batch, i: jax.Array
    ) -> Result:
        """The forward pass of a step over micro-batch `i`."""
        key, batch = jax.random.fold_in(key, i), self._part("the batch", batch, i)
        outputs, written = self._forward(params, variables, key, batch)
        loss, metrics = take_loss(self.operation, self.loss_fn(outputs, batch))
        return loss, (metrics, same_kind(self.operation, variables, written))

    def _pass(self, params: Any, variables: Variables, key: jax.Array, batch: Batch) -> Result:
        """One forward pass over the whole batch; the loss is the mean over the micro-batches."""
        outputs, written = self._forward(params, variables, key, batch)
        if self.accumulate == 1:
            loss, metrics = take_loss(self.operation, self.loss_fn(outputs, batch))
            return loss, (metrics, written)

        def micro_batch(i: jax.Array) -> tuple[jax.Array, Metrics]:
            parts = self._part("the outputs", outputs, i), self._part("the batch", batch, i)
            return take_loss(self.operation, self.loss_fn(*parts))

        losses, metrics = lax.map(micro_batch, self._indices)
        return losses.mean(), (_mean(metrics), written)

    def _forward(
        self, params: Any, variables: Variables, key: jax.Array, batch: Batch
    ) -> tuple[Any, Variables]:
        """Outputs of the model, and its variables after the pass without the parameters."""
        args, kwargs = narrowed(take_inputs(self.operation, self.inputs, batch), self.compute_dtype)

        def forward(params: Any) -> tuple[Any, Variables]:
            # The cast comes first, so that half the bytes are gathered.
            params = narrowed(params, self.compute_dtype)
            params = keep_parameters(self.layout, params, gathered=True)
            given = variables._replace(params=params)
            outputs, written = self.model.train(given, key, args, kwargs)
            return outputs, written._replace(params=None)

        if self.remat is True:
            forward = in_segments(forward)
        elif self.remat:
            forward = jax.checkpoint(forward, policy=self.remat)
        outputs, written = forward(params)
        return widened(outputs) if self.compute_dtype else outputs, written

    def _part(self, what: str, tree: Any, i: jax.Array) -> Any:
        """Rows i, i + k, i + 2k and so on of a tree, which are micro-batch i of k.

        A micro-batch is not a run of neighbouring rows. Such a run would lie on a few devices, and
        the rows of a micro-batch would depend on the number of devices.
        """
        sizes = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf)}
        if len(sizes) != 1 or min(sizes) % self.accumulate:
            shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))
            raise ValueError(
                f"{self.operation}: accumulate={self.accumulate} splits {what} into as many equal "
                f"parts along the leading axis; got arrays of shape {shapes or '(none)'}. Make the "
                "number of rows equal in all arrays and a multiple of accumulate."
            )

        def split(leaf: Any) -> Any:
            if not jnp.ndim(leaf):
                return leaf
            size, *rest = jnp.shape(leaf)
            return jnp.reshape(leaf, (size // self.accumulate, self.accumulate, *rest))

        def select(leaf: Any) -> Any:
            return lax.dynamic_index_in_dim(leaf, i, 1, keepdims=False) if jnp.ndim(leaf) else leaf

        halves = keep_batch(self.operation, self.layout, jax.tree.map(split, tree))
        return keep_batch(self.operation, self.layout, jax.tree.map(select, halves))


def _mean(metrics: Metrics) -> Metrics:
    return jax.tree.map(lambda x: x.mean(0), metrics)


def take_inputs(
    operation: str, inputs: InputsFn | None, batch: Batch
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The positional and the keyword inputs of the model, taken from a batch."""
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


def take_loss(operation: str, result: Any) -> tuple[jax.Array, Metrics]:
    """Loss and metrics from the value that `loss_fn` returned."""
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
