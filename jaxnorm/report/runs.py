"""The content of a page on runs: their packed numbers, and sentences about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxnorm.monitor.diagnosis.findings import SEVERITIES, Finding, listed
from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.nonlinearities import NAMES, PRIMITIVES
from jaxnorm.monitor.probe.summary import BINS, EDGES
from jaxnorm.monitor.samples.measures import MEASURES, Series, measure, quantiles, running_kl
from jaxnorm.monitor.samples.recording import Recording
from jaxnorm.report.pack import Packer
from jaxnorm.report.scales import CHANNELS, FREE, STYLES, UPDATES

KINDS = {
    "norm-input": "into normalizations",
    "norm-output": "out of normalizations",
    "nonlinearity-input": "into nonlinearities",
    "nonlinearity-output": "out of nonlinearities",
    "other-input": "into other layers",
    "other-output": "out of other layers",
}
SHARES = (0.15, 0.5, 0.85)
# The largest number of columns for a screen, and of stops for a slider. Large recordings get fewer
# of them, so that the page stays small.
COLUMNS, FEWEST_COLUMNS, COLUMN_BUDGET = 250, 60, 800_000
STOPS, FEWEST_STOPS, STOP_BUDGET = 100, 20, 800_000
MOST_CHANNELS = 48


@dataclass(frozen=True)
class Run:
    """One recording, with the name under which a page shows it.

    Attributes:
        name: the name of the run, such as its normalization, or the name of its folder.
        group: the name of the group of runs that it is compared with, such as those of one network;
            "" for a single group.
        recording: the samples of a monitor.
        findings: the findings of `jaxnorm.monitor.diagnose`, which the page lists.

    Example:
        >>> import tempfile
        >>> from jaxnorm.monitor import Recording
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Run("batch norm", "", Recording(folder))
        >>> run.name, run.findings
        ('batch norm', ())
    """

    name: str
    group: str
    recording: Recording
    findings: Sequence[Finding] = ()


@dataclass(frozen=True)
class Collected:
    """The material for the sections of a page on runs."""

    data: dict[str, Any]
    """Data for the script of the page: runs with packed numbers, and the words for measures."""
    colours: dict[str, dict[float, str]]
    """Measure -> value -> colour, the same for all runs."""
    diagnoses: list[dict[str, Any]]
    """For each group: the runs with findings, and the names of the runs without."""
    facts: list[dict[str, Any]]
    """For each run: its settings, its samples, and which of them the page leaves out."""
    differences: list[str]
    """Sentences about layers that not every run of a group has."""


def collect(runs: Sequence[Run]) -> Collected:
    """Collect everything that a page shows about runs.

    Args:
        runs: any number of runs, of any models.

    Returns:
        The `Collected` material.

    Raises:
        Nothing of its own.
    """
    measured = [measure(run.recording) for run in runs]
    series = sum(len(places) for found in measured for places in found.values())
    places = sum(len(run.recording.places) for run in runs)
    most = _most(COLUMN_BUDGET, series, COLUMNS, FEWEST_COLUMNS)
    stops = _most(STOP_BUDGET, BINS * places, STOPS, FEWEST_STOPS)
    packed = [_packed(run, found, most, stops) for run, found in zip(runs, measured, strict=True)]
    present = [name for name in MEASURES if any(name in found for found in measured)]
    return Collected(
        data={
            "runs": packed,
            "kinds": KINDS,
            "edges": [float(f"{edge:.5g}") for edge in EDGES],
            "measures": {
                name: {
                    "label": STYLES[name].label,
                    "definition": MEASURES[name],
                    "good": STYLES[name].good,
                    "bad": STYLES[name].bad,
                    "compares": STYLES[name].compares,
                }
                for name in present
            },
        },
        colours={name: _colours(name, measured) for name in present},
        diagnoses=[_diagnosis(group, of_group) for group, of_group in _groups(runs).items()],
        facts=[_facts(run, each) for run, each in zip(runs, packed, strict=True)],
        differences=[text for of_group in _groups(runs).values() for text in _differ(of_group)],
    )


def _packed(run: Run, measured: dict[str, Series], most: int, stops: int) -> dict[str, Any]:
    recording, packer = run.recording, Packer()
    kept = _evenly_spaced(len(recording), most)
    frames = _evenly_spaced(len(kept), stops)
    shown = kept[frames]
    index = {place.name: i for i, place in enumerate(recording.places)}
    bands, histograms, channels = {}, {}, {}
    for name, i in index.items():
        observation = recording[name]
        counts = np.asarray(observation.value.histogram)
        lowest, highest = observation.value.minimum, observation.value.maximum
        band = quantiles(counts, SHARES, minimum=lowest, maximum=highest)
        bands[i] = packer.add(band[kept].T, "linear")
        histograms[i] = packer.add(counts[shown], "sqrt")
        if observation.batch is not None:
            divergence = running_kl(observation.batch)
            rows = _most_divergent(divergence)
            packed = packer.add(divergence[shown][:, rows].T, CHANNELS.mode)
            channels[i] = {"rows": rows.tolist(), "at": packed}
    shift = recording.shift
    return {
        "name": run.name,
        "group": run.group,
        "steps": recording.steps[kept].tolist(),
        "frames": frames.tolist(),
        "places": [
            {"layer": place.layer, "side": place.side, "kind": _kind(place)}
            for place in recording.places
        ],
        "measures": {
            name: {index[place]: packer.add(a[kept], STYLES[name].mode) for place, a in of.items()}
            for name, of in measured.items()
        },
        "bands": bands,
        "histograms": histograms,
        "channels": channels,
        "metrics": {
            name: packer.add(np.asarray(a)[kept], "linear") for name, a in recording.metrics.items()
        },
        "updates": {
            path: packer.add(np.asarray(norms.update_ratio)[kept], UPDATES.mode)
            for path, norms in recording.parameters.items()
        },
        "shift": shift
        and {
            "layers": list(shift.layers),
            "l2": [packer.add(np.asarray(a)[kept], "log") for a in np.asarray(shift.l2).T],
            "cosine": [
                packer.add(np.asarray(a)[kept], "linear") for a in np.asarray(shift.cosine).T
            ],
        },
        "numbers": packer.text(),
    }


def _most(budget: int, each: int, most: int, fewest: int) -> int:
    return int(np.clip(budget // max(each, 1), fewest, most))


def _evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _most_divergent(divergence: np.ndarray) -> np.ndarray:
    """The channels with the largest divergence at any step, in ascending order."""
    highest = np.nan_to_num(divergence, nan=np.inf).max(0, initial=0)
    return np.sort(np.argsort(-highest, kind="stable")[:MOST_CHANNELS])


def _kind(place: Place) -> str:
    if place.is_norm:
        return f"norm-{place.side}"
    known = place.kind in NAMES or place.kind in PRIMITIVES.values()
    return f"{'nonlinearity' if known else 'other'}-{place.side}"


def _colours(name: str, measured: Sequence[dict[str, Series]]) -> dict[float, str]:
    """The colours of a measure; without a good value they cover the range of its values."""
    colours = STYLES[name].colours
    if colours is not None:
        return colours
    values = [a for found in measured for a in found.get(name, {}).values()]
    usable = np.concatenate([np.asarray(a)[np.isfinite(a) & (np.asarray(a) > 0)] for a in values])
    low, high = (usable.min(), usable.max()) if usable.size else (1.0, 10.0)
    stops = np.geomspace(low, max(high, 1.01 * low), len(FREE))
    return {float(f"{stop:.3g}"): colour for stop, colour in zip(stops, FREE, strict=True)}


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def _diagnosis(group: str, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "group": group,
        "ill": [
            {
                "name": run.name,
                "findings": sorted(run.findings, key=lambda f: SEVERITIES.index(f.severity)),
            }
            for run in runs
            if run.findings
        ],
        "well": [run.name for run in runs if not run.findings and len(run.recording)],
        "empty": [run.name for run in runs if not run.findings and not len(run.recording)],
    }


def _differ(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run with layers that another run of its group does not have."""
    layers = {i: [p.layer for p in run.recording.places] for i, run in enumerate(runs)}
    common = set.intersection(*map(set, layers.values()))
    found = []
    for i, run in enumerate(runs):
        own = tuple(dict.fromkeys(layer for layer in layers[i] if layer not in common))
        if own:
            before = f"{run.group}, " if run.group else ""
            found.append(f"{before}{run.name}: {listed(own)}")
    return found


def _facts(run: Run, packed: dict[str, Any]) -> dict[str, Any]:
    recording = run.recording
    rows = {name: _text(value) for name, value in recording.settings.items()}
    steps = recording.steps
    if len(steps):
        rows["samples"] = f"{len(steps)}, from step {steps[0]} to step {steps[-1]}"
    else:
        rows["samples"] = "none: nothing was appended to the recording"
    rows["observed"] = (
        f"{len(recording.places)} places, {len(recording.parameters)} arrays of parameters"
    )
    if len(packed["steps"]) < len(steps):
        rows["shown"] = (
            f"{len(packed['steps'])} of the samples, evenly spaced, and {len(packed['frames'])} "
            "histograms of each place; findings use all samples"
        )
    rows["lost"] = (
        f"{recording.lost} samples, overwritten before they were read: append more often, or "
        "give the monitor a larger capacity"
        if recording.lost
        else "nothing"
    )
    return {"name": run.name, "group": run.group, "rows": rows}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str).strip('"')
