"""Rules about what flows through a network, forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxnorm.monitor.diagnosis.evidence import Evidence
from jaxnorm.monitor.diagnosis.findings import Finding, Severity
from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.samples.measures import NEAR_EPSILON

SATURATED = 0.5
"""Share of flat units from which more than half of a layer hands on next to no gradient. Glorot &
Bengio 2010, section 3.1, see it come about in the top layer of deep sigmoid networks."""
DEAD = 0.4
"""Share of dead units that the notes of Stanford's CS231n name as what a learning rate that is too
high leads to."""
FEWEST_EXAMPLES = 32
"""Examples for which a unit must be flat: then it is flat for 9 in 10 with 95 % certainty (the rule
of three)."""

FEWEST_LAYERS = 4
"""Layers that a law is fitted to, at least."""
FACTOR = 2.0
"""Factor per layer. He et al. 2015, section 2.2: a proper initialization keeps it at 1; batch
normalization alone brings that of gradients to 1.21 (Yang et al. 2019)."""
WHOLE_FACTOR = 32.0
"""Factor from the first to the last layer."""
FIT = 0.8
"""Share of the variance of the logarithm that a straight line must explain."""

KARPATHY = "https://cs231n.github.io/neural-networks-1/"


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """The first value that is infinite or not a number."""
    at = evidence.healthy
    steps = evidence.steps
    if at == len(steps):
        return
    place, what, share = _first_nonfinite(evidence, at)
    numbers = {"step": float(steps[at])}
    if at:
        numbers["last finite step seen"] = float(steps[at - 1])
        ends = [evidence.measures[name].get(place) for name in ("minimum", "maximum")]
        largest = [abs(float(end[at - 1])) for end in ends if end is not None]
        numbers["largest value there before"] = max(largest, default=math.nan)
    numbers["share"] = share
    first = not at and what == "value" and place == evidence.places[0].name
    yield Finding(
        "nonfinite",
        "critical",
        (place,),
        f"A {what} is not finite at step {steps[at]}.",
        "The input or the parameters hold it from the start."
        if first
        else "Something grew beyond what its dtype holds: a learning rate that is too high, a "
        "division by zero, a logarithm of zero.",
        "Check the data for NaN."
        if first
        else "Look at the steps before it, from this layer on: lower the learning rate, warm it "
        "up, or clip gradients. make_train_step(skip_nonfinite=True) keeps the last good state; "
        "jax_debug_nans=True stops at the operation.",
        "https://docs.jax.dev/en/latest/debugging/flags.html",
        {name: value for name, value in numbers.items() if math.isfinite(value)},
    )


def near_epsilon(evidence: Evidence) -> Iterator[Finding]:
    """Channels that hardly vary, so that epsilon decides how they are scaled."""
    found: list[tuple[float, float, str]] = []
    for place in evidence.batch_norms:
        epsilon = evidence.facts[place.name].get("epsilon")
        if epsilon is not None:
            var = evidence.late(np.asarray(evidence.batches[place.name].moments.var))
            share = float((var < NEAR_EPSILON * epsilon).all(0).mean()) if len(var) else 0.0
            found.append((share, epsilon, place.layer))
    for place in evidence.places:
        epsilon = evidence.facts[place.name].get("epsilon")
        if not place.is_norm or place.side != "input" or epsilon is None:
            continue
        if place.name in evidence.batches or evidence.facts[place.name].get("masked"):
            continue
        size = evidence.typical(_power(evidence, place))
        found.append((float(size < NEAR_EPSILON * epsilon), epsilon, place.layer))
    found = [each for each in found if each[0] > 0]
    if found:
        share, epsilon, _ = max(found)
        yield Finding(
            "near-epsilon",
            "warning",
            tuple(layer for _, _, layer in found),
            "Channels hardly vary: epsilon decides how they are scaled.",
            "They are constant or nearly so: dead units before the norm, an input channel without "
            "content, or activations that have vanished.",
            "Find out why they are constant; scale the input, or lower epsilon if so small a "
            "signal is meant.",
            "https://arxiv.org/abs/1502.03167",
            {
                "share of channels": share,
                "variance below": NEAR_EPSILON * epsilon,
                "epsilon": epsilon,
            },
        )


def dead_units(evidence: Evidence) -> Iterator[Finding]:
    """Units that are flat for every example, and get no gradient."""
    found = []
    for name, series in evidence.measures.get("dead", {}).items():
        # A dead unit stays dead, so the smallest share of all samples counts.
        place, share = _place(evidence, name), float(evidence.late(series).min(initial=1))
        # The numbers in a channel; the subsample has FEWEST_EXAMPLES of them if there are as many.
        rows = math.prod(evidence.facts[name].get("shape", (1,))[:-1])
        if place.kind.startswith("relu") and rows >= FEWEST_EXAMPLES and share > DEAD:
            found.append((share, place.layer))
    if found:
        share = max(found)[0]
        yield Finding(
            "dead-units",
            _severity(share > 0.9),
            tuple(layer for _, layer in found),
            "Units are dead: zero for every sampled example, and without a gradient.",
            "A step that was too large, or a bias that is far below zero, moved them where no "
            "example reaches.",
            "Lower or warm up the learning rate, normalize before the nonlinearity, or use one "
            "with a slope below zero.",
            "https://arxiv.org/abs/1903.06733",
            {"share of units": share, "threshold": DEAD},
        )


def saturated(evidence: Evidence) -> Iterator[Finding]:
    """Sigmoids and the like on their flat parts."""
    found = []
    for name, series in evidence.measures.get("saturated", {}).items():
        place, share = _place(evidence, name), evidence.typical(series)
        # What a model returns as a probability should be near 0 or 1.
        returned = evidence.facts[name].get("returned", False)
        if not place.kind.startswith("relu") and share > SATURATED and not returned:
            found.append((share, place.layer))
    if found:
        share = max(found)[0]
        yield Finding(
            "saturated",
            _severity(share > 0.9),
            tuple(layer for _, layer in found),
            "Nonlinearities are saturated: they hand on next to no gradient.",
            "Their inputs are too large: kernels that start too wide, or a learning rate that "
            "drove them out.",
            "Normalize before the nonlinearity, lower the learning rate, or start with smaller "
            "kernels.",
            "https://proceedings.mlr.press/v9/glorot10a.html",
            {"share of units": share, "threshold": SATURATED},
        )


def depth(evidence: Evidence) -> Iterator[Finding]:
    """Activations or gradients that grow or vanish by a factor with every layer."""
    for measure, what in (("deviation", "Activations"), ("gradient_norm", "Gradients")):
        worst = max(_laws(evidence, measure), key=lambda law: abs(law.rate), default=None)
        if worst is None:
            continue
        backwards = measure == "gradient_norm"
        # Gradients go from the last layer to the first.
        factor = math.exp(-worst.rate if backwards else worst.rate)
        verb = "grow" if factor > 1 else "vanish"
        total = factor ** (len(worst.layers) - 1)
        yield Finding(
            "depth-gradients" if backwards else "depth-activations",
            _severity(abs(math.log(total)) > 2 * math.log(WHOLE_FACTOR)),
            worst.layers,
            f"{what} {verb} with every layer{', towards the first' if backwards else ''}.",
            "Kernels that start too wide or too narrow for the nonlinearity, with nothing that "
            "normalizes between them."
            if not backwards
            else "Each layer multiplies the gradient by its kernel and its slope; a sigmoid's is a "
            "quarter at most.",
            "Normalize between the layers, start with kernels that fit the nonlinearity (He or "
            "Glorot), or add residual connections.",
            "https://arxiv.org/abs/1502.01852"
            if not backwards
            else "https://proceedings.mlr.press/v9/glorot10a.html",
            {
                "factor per layer": factor,
                "factor over all": total,
                "layers": float(len(worst.layers)),
                "threshold": FACTOR,
            },
        )


class _Law(NamedTuple):
    """A figure that goes with depth as ``exp(rate * layer)``."""

    rate: float
    layers: tuple[str, ...]


def _laws(evidence: Evidence, measure: str) -> Iterator[_Law]:
    """One for each kind of place of which there are enough, if they follow one."""
    chains: dict[tuple[str, str], list[Place]] = {}
    for place in evidence.places if evidence.healthy else ():
        if place.name in evidence.measures.get(measure, {}) and (
            place.is_norm == (place.side == "input")
        ):
            chains.setdefault((place.kind, place.side), []).append(place)
    for chain in chains.values():
        series = (evidence.measures[measure][place.name] for place in chain)
        values = np.array([np.median(s[: evidence.healthy]) for s in series])
        if len(chain) < FEWEST_LAYERS or not (values > 0).all():
            continue
        logs, index = np.log(values), np.arange(len(chain))
        rate, start = np.polyfit(index, logs, 1)
        unexplained = np.square(logs - start - rate * index).sum()
        if (
            abs(rate) >= math.log(FACTOR)
            and abs(rate) * index[-1] >= math.log(WHOLE_FACTOR)
            and 1 - unexplained / np.square(logs - logs.mean()).sum() >= FIT
        ):
            yield _Law(float(rate), tuple(place.layer for place in chain))


def _first_nonfinite(evidence: Evidence, at: int) -> tuple[str, str, float]:
    """The first place with values that are not finite, their kind, and their share."""
    for name, series in evidence.measures.get("nonfinite", {}).items():
        if series[at] > 0:
            return name, "value", float(series[at])
    for place in reversed(evidence.places):  # as the backward pass goes
        gradient = evidence.observations[place.name].gradient
        if gradient is not None and np.asarray(gradient.nonfinite)[at] > 0:
            return place.name, "gradient", float(np.asarray(gradient.nonfinite)[at])
    return "loss", "metric", 1.0


def _power(evidence: Evidence, place: Place) -> np.ndarray:
    """The squared divisor of a norm for the whole array: no less than that of a slice."""
    square = np.square(evidence.measures["deviation"][place.name])
    if place.kind == "RMSNorm":
        square = square + np.square(evidence.measures["mean"][place.name])
    return square


def _place(evidence: Evidence, name: str) -> Place:
    return next(place for place in evidence.places if place.name == name)


def _severity(severe: bool) -> Severity:
    return "critical" if severe else "warning"
