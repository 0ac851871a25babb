"""The meaning of a sample's numbers, on the device and on disk."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxnorm.core.moments import Moments
from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.observations import Sight, Sights
from jaxnorm.monitor.probe.summary import BatchSummary, Summary
from jaxnorm.monitor.samples.gradient_shift import GradientShift


class ParameterSummary(NamedTuple):
    """Euclidean norms of an array of parameters in one step."""

    weight: Float[Array, ""]
    gradient: Float[Array, ""]
    update: Float[Array, ""]

    @property
    def update_ratio(self) -> Float[Array, ""]:
        """Length of the update over that of the weights; infinite where these are all zero."""
        return jnp.where(self.weight == 0, jnp.inf, jnp.divide(self.update, self.weight))


class Sample(NamedTuple):
    """All that was seen in one step."""

    sights: Sights
    parameters: ParameterSummary
    """With an axis of arrays of parameters."""
    metrics: dict[str, Float[Array, ""]]
    """The loss, and what else of the step's metrics is a number."""
    shift: GradientShift | None = None


@dataclass(frozen=True)
class Schema:
    """The meaning of a sample's numbers."""

    columns: tuple[tuple[str, tuple[int, ...]], ...]
    """Path and shape of each array, in the order in which they lie one behind the other."""
    places: tuple[Place, ...]
    """In the order in which a forward pass comes by."""
    with_gradient: tuple[str, ...]
    """Names of the places whose gradients were looked at."""
    parameters: tuple[str, ...]
    """Paths of the arrays of parameters."""
    shift_layers: tuple[str, ...] = ()
    """Paths of the layers in the order of the gradients' shift, if that was looked at."""

    @property
    def width(self) -> int:
        """Numbers in a sample."""
        return sum(math.prod(shape) for _, shape in self.columns)

    @classmethod
    def of(cls, sample: Sample, params: Any) -> Schema:
        """The schema of a sample, or of its shapes, of a model with these parameters."""
        leaves = jax.tree_util.tree_leaves_with_path(sample)
        paths = jax.tree_util.tree_leaves_with_path(params)
        return cls(
            tuple((_path(path, "|"), jnp.shape(leaf)) for path, leaf in leaves),
            sample.sights.places,
            sample.sights.with_gradient,
            tuple(_path(path, "/") for path, _ in paths),
            () if sample.shift is None else sample.shift.layers,
        )

    def split(self, rows: np.ndarray) -> dict[str, Any]:
        """The arrays of many samples, of shape (samples, width), by their paths."""
        arrays, start = {}, 0
        for path, shape in self.columns:
            size = math.prod(shape)
            arrays[path] = rows[:, start : start + size].reshape(len(rows), *shape)
            start += size
        return arrays

    def sight(self, arrays: dict[str, Any], name: str) -> Sight:
        """The observation of one place, from the arrays that `split` returned."""
        at = [place.name for place in self.places].index(name)
        value = _summary(arrays, "sights|values", at)
        gradient = None
        if name in self.with_gradient:
            gradient = _summary(arrays, "sights|gradients", self.with_gradient.index(name))
        batch, prefix = None, f"sights|batches|{name}"
        if f"{prefix}|examples" in arrays:
            rest = (arrays[f"{prefix}|{field}"] for field in BatchSummary._fields[1:])
            batch = BatchSummary(_moments(arrays, f"{prefix}|moments"), *rest)
        prefixes = (f"sights|{of}|{name}" for of in ("channels", "channel_gradients"))
        by_channel = (_summary(arrays, p) if f"{p}|size" in arrays else None for p in prefixes)
        return Sight(value, gradient, batch, *by_channel)

    def shift(self, arrays: dict[str, Any]) -> GradientShift | None:
        """The shift of the gradients, from the arrays that `split` returned."""
        if not self.shift_layers:
            return None
        return GradientShift(self.shift_layers, arrays["shift|l2"], arrays["shift|cosine"])

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Schema:
        """A schema from the object that `to_json` returned."""
        places = [
            Place(
                **{
                    **place,
                    "scans": tuple((int(n), bool(layers)) for n, layers in place["scans"]),
                    "facts": tuple((name, _tuples(value)) for name, value in place["facts"]),
                }
            )
            for place in stored["places"]
        ]
        return cls(
            tuple((path, tuple(shape)) for path, shape in stored["columns"]),
            tuple(places),
            tuple(stored["with_gradient"]),
            tuple(stored["parameters"]),
            tuple(stored.get("shift_layers", ())),  # which earlier recordings have not
        )


def _summary(arrays: dict[str, Any], prefix: str, at: Any = ...) -> Summary:
    """The one at some place of an axis after that of samples, or all of it."""
    fields = {
        field: arrays[f"{prefix}|{field}"][:, at]
        for field in Summary._fields
        if f"{prefix}|{field}" in arrays
    }
    moments = (a[:, at] for a in _moments(arrays, f"{prefix}|moments"))
    return Summary(**fields, moments=Moments(*moments))


def _moments(arrays: dict[str, Any], prefix: str) -> Moments:
    return Moments(*(arrays[f"{prefix}|{field}"] for field in Moments._fields))


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path(path: Any, separator: str) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=separator)
