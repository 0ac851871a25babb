"""Rules about the statistics of batch normalization."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from jaxnorm.monitor.diagnosis.evidence import LEAST_INDEPENDENT, Evidence, symmetric_divergence
from jaxnorm.monitor.diagnosis.findings import Finding, Severity
from jaxnorm.monitor.probe.marks import Place

SHIFTED = 0.25
"""Nats between two distributions from which they are called shifted: Siddiqi, Credit Risk
Scorecards, 2006, for the population stability index; `symmetric_divergence` is its form without
bins."""
FAR = 1.0
"""Nats from which an evaluation means nothing: the means differ by a whole deviation."""

LEAST_EXAMPLES = 8
"""Fewest examples of a batch. Wu & He 2018, Figure 1: the error of a ResNet-50 rises by 1.2 points
at 8 images a worker, by 3.7 at 4 and by 11 at 2."""

LOWEST_MOMENTUM = 0.5
"""Lowest factor of the old value: with less, only two or three batches are remembered. PyTorch
calls one minus this factor momentum, 0.1 by default."""

HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative rounding errors of the half-precision dtypes."""

DIVERGENCE = "train/eval divergence (nats)"
"""The name of the divergence in the evidence of a finding."""

IOFFE = "https://arxiv.org/abs/1502.03167"
WU_JOHNSON = "https://arxiv.org/abs/2105.07576"


def never_updated(evidence: Evidence) -> Iterator[Finding]:
    """Running statistics that are the same in every sample, or those of initialization."""
    stuck = [place for place in _shifted(evidence) if _is_stuck(evidence, place)]
    if not stuck:
        return
    momentum = evidence.facts[stuck[0].name].get("momentum")
    single = len(evidence.steps) == 1
    cause = "The training loop drops the batch_stats that the model returns."
    if momentum == 1:
        cause = "momentum=1 keeps the old value whole."
    elif single:
        cause = "The model was never trained, or its training loop drops the batch_stats."
    yield Finding(
        "never-updated",
        "warning" if single else "critical",
        _layers(stuck),
        "Running statistics are at their initial values."
        if single
        else "Running statistics were never updated.",
        cause,
        "Store what apply(..., mutable=['batch_stats']) returns, as make_train_step does; for a "
        "trained model, recompute them over the training data before it is evaluated.",
        IOFFE,
        _divergence(evidence, stuck),
    )


def train_eval_divergence(evidence: Evidence) -> Iterator[Finding]:
    """Running statistics that differ from those of the batches they stand for."""
    shifted = [place for place in _shifted(evidence) if not evidence.is_frozen(place)]
    norms = [place for place in shifted if not _is_stuck(evidence, place)]
    if not norms:
        return
    left = [_after_recalibration(evidence, place) for place in norms]
    numbers = _divergence(evidence, norms)
    if np.isnan(left).any():
        verdict = "There are too few samples to tell whether recalibration would mend it."
        remedy = "Watch more steps; if the batches agree among themselves, recalibrate."
    else:
        numbers["after recalibration (nats)"] = max(left)
        if max(left) < SHIFTED:
            verdict = "The batches agree among themselves: the running statistics lag behind."
            remedy = (
                "Recalibrate: recompute them over a part of the training data before evaluation. "
                "Or choose a lower momentum."
            )
        else:
            verdict = "The batches differ as much among themselves: they are too small, or not "
            verdict += "drawn alike."
            remedy = (
                "Recalibration would not mend it. Make batches larger or better mixed, "
                "synchronize statistics across devices, or use a norm without batch statistics."
            )
    yield Finding(
        "train-eval-divergence",
        _severity(numbers),
        _layers(norms),
        "Evaluation will not see what training saw: running and batch statistics differ.",
        verdict,
        remedy,
        WU_JOHNSON,
        numbers,
    )


def frozen_on_shifted(evidence: Evidence) -> Iterator[Finding]:
    """Running statistics in use on data from another distribution."""
    shifted = [place for place in _shifted(evidence) if evidence.is_frozen(place)]
    norms = [place for place in shifted if not _is_stuck(evidence, place)]
    if norms:
        numbers = _divergence(evidence, norms)
        yield Finding(
            "frozen-on-shifted",
            _severity(numbers),
            _layers(norms),
            "Frozen statistics are used on data that they are not of.",
            "The data come from another domain than the one that the statistics were taken of.",
            "Recompute the statistics on the new data, or let them be updated while fine-tuning.",
            "https://arxiv.org/abs/2006.16971",
            numbers,
        )


def small_batch(evidence: Evidence) -> Iterator[Finding]:
    """Statistics of too few numbers."""
    few: list[tuple[float, float, Place]] = []
    for place in evidence.batch_norms:
        if evidence.is_frozen(place):
            continue
        batch = evidence.batches[place.name]
        independent = evidence.typical(np.asarray(batch.independent))
        examples = evidence.typical(batch.examples)
        virtual = evidence.facts[place.name].get("virtual_batch_size")
        if virtual and virtual < examples:
            independent, examples = independent * virtual / examples, virtual
        if independent < LEAST_INDEPENDENT or examples < LEAST_EXAMPLES:
            few.append((independent, examples, place))
    if few:
        independent, examples, _ = min(few, key=lambda each: each[0])
        yield Finding(
            "small-batch",
            "critical" if independent < LEAST_INDEPENDENT / 4 else "warning",
            _layers([place for _, _, place in few]),
            "Batch statistics come from too few examples.",
            "The batch of a device, or a virtual batch, is small; positions of one example tell "
            "much the same.",
            "Enlarge the batch, synchronize across devices (axis_name, or one mesh), or use group "
            "or layer normalization, which do not depend on it.",
            "https://arxiv.org/abs/1803.08494",
            {
                "independent numbers per channel": independent,
                "threshold": LEAST_INDEPENDENT,
                "examples": examples,
                "fewest examples": LEAST_EXAMPLES,
            },
        )


def imported_momentum(evidence: Evidence) -> Iterator[Finding]:
    """A momentum that looks like PyTorch's."""
    # A momentum of None averages all batches.
    momenta = [evidence.facts[place.name].get("momentum") for place in evidence.batch_norms]
    low = [isinstance(m, int | float) and m < LOWEST_MOMENTUM for m in momenta]
    norms = [place for place, is_low in zip(evidence.batch_norms, low) if is_low]
    if norms:
        momentum = float(evidence.facts[norms[0].name]["momentum"])
        yield Finding(
            "imported-momentum",
            "warning",
            _layers(norms),
            f"momentum={momentum:g} looks imported from another framework.",
            "Flax multiplies the old value by it; PyTorch multiplies the new one. As it stands the "
            "running statistics are those of the last batch or two.",
            f"Write momentum={1 - momentum if momentum else 0.9:g}.",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
            {"momentum": momentum, "threshold": LOWEST_MOMENTUM},
        )


def half_precision(evidence: Evidence) -> Iterator[Finding]:
    """Statistics that are kept or computed in half precision."""
    found = []
    for place in evidence.places:
        facts = evidence.facts[place.name]
        kept = facts.get("running_dtype")
        computed = facts.get("input_dtype") if not facts.get("force_float32_reductions", 1) else ""
        dtype = kept if kept in HALF else computed
        if place.is_norm and place.side == "input" and dtype in HALF:
            found.append((place.layer, dtype))
    if found:
        dtype = found[0][1]
        yield Finding(
            "half-precision",
            "warning",
            tuple(layer for layer, _ in found),
            f"Statistics are in {dtype}.",
            "The running statistics were cast along with the parameters, or "
            "force_float32_reductions=False was set. Updates smaller than the rounding error are "
            "lost: the statistics stop moving.",
            "Keep batch_stats in float32, and leave force_float32_reductions on.",
            "https://arxiv.org/abs/1710.03740",
            {"rounding error": HALF[dtype], "that of float32": 2.0**-24},
        )


def idle_bias(evidence: Evidence) -> Iterator[Finding]:
    """A bias that is subtracted again with the mean of the batch norm right after it."""
    fed = [
        str(evidence.facts[place.name]["fed_by"])
        for place in evidence.batch_norms
        if evidence.facts[place.name].get("fed_by_bias") and not evidence.is_frozen(place)
    ]
    if fed:
        yield Finding(
            "idle-bias",
            "advice",
            tuple(dict.fromkeys(fed)),
            "A bias right before a batch norm does nothing.",
            "The batch's mean, which holds it, is subtracted; its gradient is zero but for "
            "rounding.",
            "Set use_bias=False in these layers: the norm has a bias of its own.",
            f"{IOFFE}v3#section.3.2",
            {"layers": float(len(fed))},
        )


def _shifted(evidence: Evidence) -> list[Place]:
    """The batch norms whose running statistics are far from those of their batches."""
    return [
        place
        for place in evidence.batch_norms
        if evidence.typical(evidence.train_eval_divergence[place.name]) > SHIFTED
    ]


def _is_stuck(evidence: Evidence, place: Place) -> bool:
    """True if nothing was ever written to a norm's running statistics."""
    batch = evidence.batches[place.name]
    mean, var = np.asarray(batch.running_mean), np.asarray(batch.running_var)
    initial = not mean[-1].any() and (var[-1] == 1).all()
    if len(mean) == 1 or evidence.is_frozen(place):
        return bool(initial)
    return bool((mean == mean[0]).all() and (var == var[0]).all())


def _after_recalibration(evidence: Evidence, place: Place) -> float:
    """The divergence between the batches of one sample and the next."""
    late = jax.tree.map(evidence.late, evidence.batches[place.name].moments)
    if len(late.mean) < 4:
        return float("nan")
    # Only neighbours are compared: meanwhile the network learns, and its activations move.
    now, before = jax.tree.map(lambda a: a[1:], late), jax.tree.map(lambda a: a[:-1], late)
    noise = 2 * evidence.late(evidence.noise[place.name])[1:]
    return float(np.median(symmetric_divergence(now, before, noise)))


def _divergence(evidence: Evidence, norms: list[Place]) -> dict[str, float]:
    worst = max(evidence.typical(evidence.train_eval_divergence[place.name]) for place in norms)
    return {DIVERGENCE: worst, "threshold": SHIFTED}


def _severity(numbers: dict[str, float]) -> Severity:
    return "critical" if numbers[DIVERGENCE] > FAR else "warning"


def _layers(norms: list[Place]) -> tuple[str, ...]:
    return tuple(place.layer for place in norms)
