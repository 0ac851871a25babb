"""Rules about the steps that parameters take, and what they do to activations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxnorm.monitor.diagnosis.evidence import Evidence
from jaxnorm.monitor.diagnosis.findings import Finding
from jaxnorm.monitor.samples.measures import later

LARGEST_UPDATE, SMALLEST_UPDATE = 0.05, 1e-6
"""Norm of an update over that of the array. The notes of Stanford's CS231n hold 1e-3 to be about
right, and the demo's normalized networks lie between 4e-5 and 0.014. At 0.05 an array is another
after twenty steps, at 1e-6 hardly after a million."""
CS231N = "https://cs231n.github.io/neural-networks-3/"

DROP = 2.5
"""The least factor by which updates fall when a schedule drops the learning rate. In He et al. 2016
it is 10, and hardly ever less than this."""
WINDOW = 3
"""The least number of samples on either side of a drop."""
DRIFT = 0.1
"""Deviations by which means move between one sample and the next, less what chance brings."""


def update_ratio(evidence: Evidence) -> Iterator[Finding]:
    """Updates that are out of proportion to the parameters."""
    large, small = [], []
    for path, norms in evidence.parameters.items():
        weight, update = np.asarray(norms.weight), np.asarray(norms.update)
        name = path.removesuffix("/value").rsplit("/", 1)[-1]  # NNX names the value, too
        # An array that starts at zero has no proportion; scales and biases are few numbers.
        if name in ("bias", "scale") or not (weight[: evidence.healthy] > 0).all():
            continue
        ratio = evidence.typical(update / np.where(weight > 0, weight, 1))
        if ratio > LARGEST_UPDATE:
            large.append((ratio, path))
        elif 0 < ratio < SMALLEST_UPDATE:
            small.append((ratio, path))
    for found, word, threshold in (
        (large, "large", LARGEST_UPDATE),
        (small, "small", SMALLEST_UPDATE),
    ):
        if found:
            ratio = (max if word == "large" else min)(found)[0]
            yield Finding(
                f"{word}-updates",
                "warning",
                tuple(path for _, path in found),
                f"Updates are too {word} for the parameters.",
                "The learning rate is too "
                + ("high." if word == "large" else "low, or the gradient has vanished."),
                f"{'Lower' if word == 'large' else 'Raise'} the learning rate, about a thousandth "
                "of a parameter's norm at a step is usual.",
                CS231N,
                {"update / weight": ratio, "threshold": threshold},
            )


def drift_after_drop(evidence: Evidence) -> Iterator[Finding]:
    """Means that move on when the learning rate has been dropped."""
    updates = [np.asarray(norms.update) for norms in evidence.parameters.values()]
    if not updates or evidence.healthy < 2 * WINDOW + 1:
        return
    size = np.sqrt(np.square(np.stack(updates)[:, : evidence.healthy]).sum(0))
    at, factor = _drop(size)
    if factor < DROP:
        return
    found = []
    for place in evidence.places:
        if place.is_norm != (place.side == "input"):
            continue
        drift = _drift(evidence, place.name)
        before, after = np.median(drift[1:at]), np.median(drift[at + 1 :])
        # Smaller steps move the means less, unless something else moves them; and chance moves
        # them as much before as after.
        if after > max(DRIFT, 2 * before):
            found.append((float(after), float(before), place.layer))
    if found:
        after, before, _ = max(found)
        yield Finding(
            "drift-after-drop",
            "warning",
            tuple(layer for _, _, layer in found),
            f"Means go on drifting after the learning rate dropped at step {evidence.steps[at]}.",
            "Not the steps move them: the data change, or weight decay shrinks kernels before a "
            "norm, which raises their effective learning rate again.",
            "Look whether the data are drawn alike before and after; leave scale-invariant "
            "kernels out of weight decay, or drop it with the learning rate.",
            "https://arxiv.org/abs/2010.02916",
            {
                "drift after (deviations)": after,
                "drift before (deviations)": before,
                "threshold": DRIFT,
                "updates fell by": factor,
            },
        )


def _drift(evidence: Evidence, name: str) -> np.ndarray:
    """The drift of the mean between samples, in deviations; of a batch norm's channels together."""
    batch = evidence.batches.get(name)
    if batch is None:
        deviation = evidence.measures["deviation"][name]
        drift = evidence.measures["mean_drift"][name] / np.where(deviation > 0, deviation, 1)
    else:
        mean, var = np.asarray(batch.moments.mean), np.asarray(batch.moments.var)
        moved = np.square(np.diff(mean, axis=0)) / np.where(var > 0, var, 1)[1:]
        drift = later(np.sqrt(np.maximum(moved.mean(-1) - evidence.noise[name][1:], 0)))
    return drift[: evidence.healthy]


def _drop(size: np.ndarray) -> tuple[int, float]:
    """The sample from which on updates are smaller for good, and by what factor."""
    places = range(WINDOW, len(size) - WINDOW + 1)
    floor = max(1e-6 * float(size.max()), 1e-30)  # to nothing at all it falls by a million
    factors = [size[at - WINDOW : at].min() / max(float(size[at:].max()), floor) for at in places]
    best = int(np.argmax(factors))
    return places[best], float(factors[best])
