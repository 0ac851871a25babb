"""Moments of what each batch norm is given, gathered inside the traced pass.

A norm's moments lie beside its running statistics, as four more variables of the same shape. So
they go wherever the statistics go: through `scan`, `vmap`, `remat` and `jit` of Flax, stacked or
carried as those are. A norm that is called again merges what it sees with what is there.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen, nnx

from jaxnorm.core import arguments as check
from jaxnorm.core.measure import Measurement
from jaxnorm.core.moments import Moments, promoted
from jaxnorm.core.normalize import measured_moments
from jaxnorm.core.slices import Slices
from jaxnorm.distributed.axes import is_bound, named_axis
from jaxnorm.models.calls import Path

BATCH_NORMS = (linen.BatchNorm, nnx.BatchNorm)
FIELDS = ("moments_origin", "moments_count", "moments_mean", "moments_m2")
"""The names of the variables that hold the moments of a norm's inputs."""


class FromOrigin(NamedTuple):
    """Moments of numbers that lie around an origin, whose mean would not fit one float32.

    At 1e4 a float32 mean is rounded by 5e-4. The distances between the means of batches, which are
    part of the variance, would have that error.
    """

    origin: Any
    moments: Moments

    def merge(self, other: FromOrigin) -> FromOrigin:
        """Moments of both sets, from the origin of the first that is not empty."""
        first = self.moments.count > 0
        distance = jnp.where(first, other.origin - self.origin, 0)
        moved = other.moments._replace(mean=other.moments.mean + distance)
        origin = jnp.where(first, self.origin, other.origin)
        return FromOrigin(origin, self.moments.merge(moved))


class _NormsCalled(threading.local):
    """The norms whose calls are being traced, innermost last: path, and True once measured."""

    def __init__(self) -> None:
        self.norms: list[list[Any]] = []


_present = _NormsCalled()


@dataclass(eq=False)
class Collecting:
    """The hook that measures the inputs of batch norms; see `jaxnorm.models.calls`.

    Attributes:
        operation: the public function that is being called; errors begin with it.
        training: whether the norms that are measured normalize with the statistics of the batch.
        norms: paths of the norms to be measured; None: nothing is measured.
        seen: every batch norm that was called, by its path, with the number of its axes of
            features, which tells whether its statistics are stacked.
        others: names and modules of the other layers that were called.
    """

    operation: str
    training: bool
    norms: frozenset[Path] | None = None
    seen: dict[Path, tuple[Any, int]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    def __call__(self, call, path: Path, module: Any, args, kwargs):
        """Call a layer. A batch norm's input is measured where its innermost `__call__` runs.

        A subclass may call that of its parent, or be wrapped by `nn.remat`: then both are hooked.
        """
        if not isinstance(module, BATCH_NORMS):
            if self.norms is None:
                kept = module.clone(parent=None) if isinstance(module, linen.Module) else module
                self.others["/".join(path) or type(module).__name__] = kept
            return call(*args, **kwargs)
        bound = inspect.signature(call).bind(*args, **kwargs)
        inner = _present.norms
        entry = [path, False]
        inner.append(entry)
        try:
            with self._mode(path, module, bound):
                result = call(*bound.args, **bound.kwargs)
        finally:
            inner.pop()
        if not entry[1]:
            self._measure(path, module, bound)
        if inner and inner[-1][0] == path:
            inner[-1][1] = True
        return result

    @contextlib.contextmanager
    def _mode(self, path: Path, module: Any, bound: inspect.BoundArguments) -> Iterator[None]:
        """A context in which the norm uses the statistics that this pass wants it to use."""
        frozen = not (self.training and self.norms is not None and path in self.norms)
        changed: dict[str, Any] = {"use_running_average": frozen}
        if bound.arguments.get("use_running_average") is not None:
            bound.arguments["use_running_average"] = frozen
            changed["use_running_average"] = None
        name = module.axis_name
        if not frozen and name is not None and not is_bound(name):
            # The axis is that of the caller's `pmap` or `shard_map`. Here the batch is whole.
            if module.axis_index_groups is not None:
                raise ValueError(
                    f"{self.operation}: a norm with axis_index_groups needs its axis; got the norm "
                    f"{'/'.join(path)} with axis_name={name!r}, which is not bound. Pass "
                    "sequential=True, in which norms use running statistics and no axis."
                )
            changed["axis_name"] = None
        before = {name: getattr(module, name) for name in changed}
        try:
            for name, value in changed.items():
                # Past Flax: a Linen module is frozen. It is a copy that this trace owns.
                object.__setattr__(module, name, value)
            yield
        finally:
            for name, value in before.items():
                object.__setattr__(module, name, value)

    def _measure(self, path: Path, module: Any, bound: inspect.BoundArguments) -> None:
        given = bound.arguments
        x = given["x"] if "x" in given else next(iter(given.values()))
        x = jnp.asarray(x)
        axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
        features = {a % x.ndim for a in axes}
        if self.norms is None:
            kept = module.clone(parent=None) if isinstance(module, linen.Module) else module
            self.seen.setdefault(path, (kept, len(features)))
            return
        if path not in self.norms:
            return
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(jnp.float32)
        total = _read(module)
        here = _measured(self.operation, module, x, features, given.get("mask"))
        here = FromOrigin(
            here.origin.astype(total.origin.dtype),
            Moments(*(a.astype(b.dtype) for a, b in zip(here.moments, total.moments))),
        )
        _write(self.operation, path, module, total.merge(here))


def _measured(operation: str, module: Any, x: Any, features: set[int], mask: Any) -> FromOrigin:
    """The moments of an array, over the axes and the replicas that the norm itself uses."""
    name = module.axis_name if is_bound(module.axis_name) else None
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    check.not_empty(operation, x, reduced)
    slices = Slices(reduced, replicas=named_axis(operation, name))
    found = measured_moments(x, Measurement(slices), check.mask_of(operation, mask, x))
    moments, local = found.as_moments(reduced), found.local
    return FromOrigin(
        jnp.squeeze(local.origin, reduced), moments._replace(mean=jnp.squeeze(local.mean, reduced))
    )


def empty(mean: Any) -> dict[str, Any]:
    """The variables of a norm before anything is measured.

    Args:
        mean: its running mean, or what tells its shape and dtype.
    """
    moments = Moments.empty(mean.shape, promoted(mean.dtype, jnp.float32))
    return dict(zip(FIELDS, (moments.mean, *moments)))


def collected(values: Any) -> FromOrigin:
    """The moments in the variables of a norm, given by their names."""
    origin, *moments = (values[name] for name in FIELDS)
    return FromOrigin(origin, Moments(*moments))


def _read(module: Any) -> FromOrigin:
    if isinstance(module, nnx.Module):
        return collected({name: getattr(module, name)[...] for name in FIELDS})
    return collected({name: module.get_variable("batch_stats", name) for name in FIELDS})


def _write(operation: str, path: Path, module: Any, total: FromOrigin) -> None:
    values = dict(zip(FIELDS, (total.origin, *total.moments)))
    if isinstance(module, nnx.Module):
        for name, value in values.items():
            getattr(module, name)[...] = value
        return
    if not module.is_mutable_collection("batch_stats"):
        raise ValueError(
            f"{operation}: a norm must be called where its statistics can be written; got the norm "
            f"{'/'.join(path)} under a transformation that makes batch_stats constant. Give that "
            'transformation variable_axes={"batch_stats": 0} or variable_carry="batch_stats".'
        )
    for name, value in values.items():
        module.put_variable("batch_stats", name, value)
