"""One sample: all that was observed in one step, as arrays and as a row of numbers."""

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
from jaxnorm.monitor.probe.observations import Observation, Observations
from jaxnorm.monitor.probe.summary import BatchSummary, Summary
from jaxnorm.monitor.samples.gradient_shift import GradientShift

# The name of the observations in recordings of format 1.
_STORED_AS = "sights"


class ParameterSummary(NamedTuple):
    """Euclidean norms of an array of parameters in one step.

    In a sample there is an axis of arrays of parameters, in a recording one of samples.
    """

    weight: Float[Array, ""]  # float32, shape ()
    gradient: Float[Array, ""]  # float32, shape ()
    update: Float[Array, ""]  # float32, shape ()

    @property
    def update_ratio(self) -> Float[Array, ""]:
        """Norm of the update over that of the weights; infinite where these are all zero."""
        return jnp.where(self.weight == 0, jnp.inf, jnp.divide(self.update, self.weight))


class Sample(NamedTuple):
    """All numbers that were observed in one step.

    Attributes:
        observations: of all places in the model.
        parameters: norms of all arrays of parameters.
        metrics: the loss, and the other metrics of the step that are single numbers.
        shift: internal covariate shift of the step; None unless `Monitor(shift=True)`.
    """

    observations: Observations
    parameters: ParameterSummary  # float32, shape (arrays of parameters,) each
    metrics: dict[str, Float[Array, ""]]  # shape () each
    shift: GradientShift | None = None  # float32, shape (layers,) each

    @property
    def row(self) -> Float[Array, " width"]:  # float32
        """All numbers, one after the other."""
        return jnp.concatenate([jnp.ravel(a).astype(jnp.float32) for a in jax.tree.leaves(self)])


@dataclass(frozen=True)
class Schema:
    """The meaning of the numbers in a row.

    Attributes:
        columns: path and shape of each array of a sample, in the order of the row.
        places: the places in the order of a forward pass.
        with_gradient: names of the places whose gradients were observed.
        parameters: paths of the arrays of parameters.
        shift_layers: paths of the layers of the gradients' shift, if that was observed.
    """

    columns: tuple[tuple[str, tuple[int, ...]], ...]
    places: tuple[Place, ...]
    with_gradient: tuple[str, ...]
    parameters: tuple[str, ...]
    shift_layers: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """The number of numbers in a row."""
        return sum(math.prod(shape) for _, shape in self.columns)

    @classmethod
    def of(cls, sample: Sample, params: Any) -> Schema:
        """The schema of a sample, or of its shapes, of a model with these parameters."""
        leaves = jax.tree_util.tree_leaves_with_path(sample)
        paths = jax.tree_util.tree_leaves_with_path(params)
        return cls(
            tuple((_path(path, "|"), jnp.shape(leaf)) for path, leaf in leaves),
            sample.observations.places,
            sample.observations.with_gradient,
            tuple(_path(path, "/") for path, _ in paths),
            () if sample.shift is None else sample.shift.layers,
        )

    def split(self, rows: np.ndarray) -> dict[str, Any]:
        """Split the rows of many samples into arrays.

        Args:
            rows: float32, shape (samples, width).

        Returns:
            Path -> array with a leading axis of samples.
        """
        arrays, start = {}, 0
        for path, shape in self.columns:
            size = math.prod(shape)
            arrays[path] = rows[:, start : start + size].reshape(len(rows), *shape)
            start += size
        return arrays

    def observation(self, arrays: dict[str, Any], name: str) -> Observation:
        """The observation of one place, from the arrays that `split` returned."""
        at = [place.name for place in self.places].index(name)
        value = _summary(arrays, "observations|values", at)
        gradient = None
        if name in self.with_gradient:
            at = self.with_gradient.index(name)
            gradient = _summary(arrays, "observations|gradients", at)
        prefixes = (f"observations|{of}|{name}" for of in ("channels", "channel_gradients"))
        by_channel = (_summary(arrays, p) if f"{p}|size" in arrays else None for p in prefixes)
        return Observation(value, gradient, _batch(arrays, name), *by_channel)

    def shift(self, arrays: dict[str, Any]) -> GradientShift | None:
        """The shift of the gradients, from the arrays that `split` returned."""
        if not self.shift_layers:
            return None
        return GradientShift(self.shift_layers, arrays["shift|l2"], arrays["shift|cosine"])

    def to_json(self) -> dict[str, Any]:
        """An object for `from_json`."""
        columns = [(_renamed(path, "observations", _STORED_AS), a) for path, a in self.columns]
        return asdict(self) | {"columns": columns}

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
        columns = ((_renamed(path, _STORED_AS, "observations"), a) for path, a in stored["columns"])
        return cls(
            tuple((path, tuple(shape)) for path, shape in columns),
            tuple(places),
            tuple(stored["with_gradient"]),
            tuple(stored["parameters"]),
            tuple(stored.get("shift_layers", ())),  # earlier recordings have none
        )


def _renamed(path: str, old: str, new: str) -> str:
    first, bar, rest = path.partition("|")
    return f"{new}{bar}{rest}" if first == old else path


def _summary(arrays: dict[str, Any], prefix: str, at: Any = ...) -> Summary:
    """A summary from the arrays below a path.

    Args:
        arrays: as `Schema.split` returns them.
        prefix: the path.
        at: the entry of the axis after that of samples; ... for all of them.
    """
    fields = {
        field: arrays[f"{prefix}|{field}"][:, at]
        for field in Summary._fields
        if f"{prefix}|{field}" in arrays
    }
    moments = (a[:, at] for a in _moments(arrays, f"{prefix}|moments"))
    return Summary(**fields, moments=Moments(*moments))


def _batch(arrays: dict[str, Any], name: str) -> BatchSummary | None:
    prefix = f"observations|batches|{name}"
    if f"{prefix}|examples" not in arrays:
        return None
    fields = ("running_mean", "running_var", "examples", "independent")
    rest = {field: arrays[f"{prefix}|{field}"] for field in fields}
    return BatchSummary(_moments(arrays, f"{prefix}|moments"), **rest)


def _moments(arrays: dict[str, Any], prefix: str) -> Moments:
    return Moments(*(arrays[f"{prefix}|{field}"] for field in Moments._fields))


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path(path: Any, separator: str) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=separator)
