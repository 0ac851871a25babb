"""Single numbers of an observation, and the table of the last sample of a recording."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from jaxnorm.monitor.markup import Cell, block, escape, table
from jaxnorm.monitor.probe.observations import Observation

_LABELS = {"nonfinite": "not finite", "gradient_norm": "gradient norm"}


def figures(observation: Observation) -> Iterator[tuple[str, np.ndarray]]:
    """Each figure of a place that is one number, as an array of the shape of the observation."""
    summary = observation.value
    yield "mean", np.asarray(summary.moments.mean)
    yield "variance", np.asarray(summary.moments.m2) / np.maximum(summary.moments.count, 1)
    for field in ("minimum", "maximum", "nonfinite", "zeros", "saturated", "dead"):
        value = getattr(summary, field)
        if value is not None:
            yield field, np.asarray(value)
    if observation.gradient is not None:
        yield "gradient_norm", np.asarray(observation.gradient.norm)


def last_sample(
    title: str,
    steps: np.ndarray,
    metrics: Mapping[str, np.ndarray],
    observations: Mapping[str, Observation],
    lost: int,
) -> str:
    """The last sample of a recording as HTML: a line of text, and a row for each place.

    Args:
        title: the name of the recording.
        steps: the sampled steps, shape (samples,).
        metrics: the loss and other numbers, shape (samples,) each.
        observations: name of a place -> its observation, with a leading axis of samples.
        lost: the number of samples that were never read.
    """
    count = len(steps)
    heading = f"<p><b>Recording</b> <code>{escape(title)}</code></p>"
    if not count:
        return block(heading, '<p class="quiet">It has no samples yet.</p>')
    facts = [f"{count} sample{'s' if count > 1 else ''}, steps {steps[0]} to {steps[-1]}"]
    facts += [f"{lost} lost"] if lost else []
    facts += [f"{escape(name)} {array[-1]:.3g}" for name, array in metrics.items()]
    rows: list[dict[str, Cell]] = []
    for name, observation in observations.items():
        numbers = {field: float(array[-1]) for field, array in figures(observation)}
        rows.append({"place": name, **numbers})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not any(row.get("nonfinite") for row in rows):
        columns = [column for column in columns if column != "nonfinite"]
    shown = table(
        [_LABELS.get(column, column) for column in columns],
        [[row.get(column) for column in columns] for row in rows],
    )
    return block(heading, f'<p class="quiet">{" · ".join(facts)}; the last sample:</p>', shown)
