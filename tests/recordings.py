"""Recordings of networks that were never trained: any size and any names, made at once."""

import numpy as np

from jaxnorm.monitor import Recording
from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.summary import BINS, EDGES
from jaxnorm.monitor.samples.buffer import Buffer
from jaxnorm.monitor.samples.schema import Schema

FIELDS = ("size", "moments|count", "moments|mean", "moments|m2", "minimum", "maximum", "nonfinite")
VALUES = ("zeros", "saturated", "dead")
CHANNELS = ("moments|count", "moments|mean", "moments|m2", "running_mean", "running_var")


def invent(
    folder, layers=3, samples=12, *, norm="BatchNorm", nonlinearity="relu", prefix="", channels=16,
    settings=None, spoil=None, lost=0, shift=0,
):  # fmt: skip
    """A recording whose every layer sees a normal distribution that widens with depth.

    `norm` and `nonlinearity` may be "", for none; `spoil(arrays)` may change what is recorded;
    `shift` layers have a gradient-based shift.
    """
    kinds = [kind for kind in (norm, nonlinearity) if kind]
    places = tuple(
        Place(
            f"{prefix}{kind}_{i}", kind, side, is_norm=kind == norm,
            facts=(("epsilon", 1e-5),) if kind == norm else (),
        )
        for i in range(layers) for kind in kinds for side in ("input", "output")
    )  # fmt: skip
    parameters = tuple(f"{prefix}Dense_{i}/{name}" for i in range(layers) for name in "wb")
    rng, n, k = np.random.default_rng(0), samples, len(places)
    time = np.linspace(0, 1, n)[:, None] + np.zeros((n, k))
    mean = 0.2 * np.sin(6 * time + np.arange(k)) + rng.normal(size=(n, k)) * 0.01
    deviation = (1 + time) * 1.1 ** np.arange(k)
    values = mean[..., None] + deviation[..., None] * rng.normal(size=(n, k, 256))
    arrays = {f"observations|values|{name}": np.zeros((n, k)) for name in FIELDS + VALUES}
    arrays["observations|values|size"] += 4096
    arrays["observations|values|moments|count"] += 256
    arrays["observations|values|moments|mean"] += mean
    arrays["observations|values|moments|m2"] += 256 * deviation**2
    arrays["observations|values|minimum"], arrays["observations|values|maximum"] = (
        values.min(-1),
        values.max(-1),
    )
    for name in VALUES:
        arrays[f"observations|values|{name}"] += rng.uniform(size=(n, k))
    bins = np.searchsorted(EDGES, values)
    bins += BINS * np.arange(n * k).reshape(n, k, 1)
    counts = np.bincount(bins.ravel(), minlength=n * k * BINS).astype(float)
    arrays["observations|values|histogram"] = counts.reshape(n, k, BINS)
    for name in FIELDS:
        arrays[f"observations|gradients|{name}"] = arrays[f"observations|values|{name}"] * 1e-3
    for place in places:
        if place.kind == "BatchNorm" and place.side == "input":
            for name in CHANNELS:
                shown = np.exp(0.3 * rng.normal(size=(n, channels)))
                arrays[f"observations|batches|{place.name}|{name}"] = shown
            for name in ("examples", "independent"):
                arrays[f"observations|batches|{place.name}|{name}"] = np.full(n, 64.0)
    for name, size in (("weight", 1.0), ("gradient", 0.1), ("update", 1e-3)):
        shown = size * np.exp(rng.normal(size=(n, len(parameters))))
        arrays[f"parameters|{name}"] = shown
    arrays["metrics|loss"] = 2 * np.exp(-time[:, 0]) if k else np.linspace(2, 1, n)
    if shift:
        arrays["shift|l2"] = np.exp(rng.normal(size=(n, shift)))
        arrays["shift|cosine"] = np.tanh(arrays["shift|l2"])
    if spoil is not None:
        spoil(arrays)
    columns = tuple((path, array.shape[1:]) for path, array in arrays.items())
    with_gradient = tuple(place.name for place in places)
    of_shift = tuple(f"{prefix}Dense_{i}" for i in range(shift))
    schema = Schema(columns, places, with_gradient, parameters, of_shift)
    rows = np.concatenate([a.reshape(n, -1) for a in arrays.values()], 1).astype(np.float32)
    recording = Recording(folder, settings or {"learning rate": 0.1})
    free = np.zeros((1, rows.shape[1]), np.float32)  # the row that a buffer keeps for the next
    recording.append(Buffer(np.concatenate([rows, free]), np.arange(n + 1) * 4, n, schema))
    recording.lost += lost
    return recording
