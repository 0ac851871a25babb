"""The results of a study: curves, activations, and the three figures that its table shows."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.monitor import Recording
from jaxnorm.monitor.samples.buffer import Buffer

TARGET_SHARE = 0.9  # the share of the network's best accuracy that must be reached
STABLE_SHARE = 0.9  # the share of the normalization's best accuracy that every seed must keep
LEARNED_SHARE = 0.5  # below this share of the network's best accuracy no rate is called stable

DEFINITIONS = {
    "best rate": (
        "the swept learning rate with the highest validation accuracy, mean over seeds and over "
        "the last quarter of the measured steps; of equal ones the lowest"
    ),
    "accuracy": "test accuracy at the end, at the best rate: mean ± deviation over seeds",
    "steps to 90 %": (
        "the first measured step at which the validation accuracy, mean over seeds, is 90 % of the "
        "highest that any normalization of this network ends with; at the swept rate that gets "
        "there first; 'never' where none does"
    ),
    "stable up to": (
        "the highest stable learning rate: the largest swept one at which every seed ends with a "
        "finite loss and with 90 % of this normalization's best validation accuracy; '≥' where it "
        "is the largest swept; 'none' where there is none, or where even the best rate ends with "
        "less than half of the network's best accuracy"
    ),
}


@dataclasses.dataclass(frozen=True)
class Curves:
    """Curves of all runs of one network under one normalization; axes (rates, seeds, samples)."""

    network: str
    normalization: str
    learning_rates: tuple[float, ...]
    steps: tuple[int, ...]  # number of steps made at each sample; the first is 0
    train_loss: np.ndarray  # float64 (rates, seeds, samples - 1): mean since the sample before
    final_loss: np.ndarray  # float64 (rates, seeds): loss of the last step
    validation_accuracy: np.ndarray  # float64 (rates, seeds, samples)
    test_accuracy: np.ndarray  # float64 (rates, seeds)

    @property
    def best(self) -> int:
        """Index of the best learning rate, by validation accuracy in the last quarter.

        One measurement alone would tell little: at a rate so high that training only just holds,
        the accuracy rises and falls with every step, and with the rounding of a sum.
        """
        late = max(1, self.validation_accuracy.shape[-1] // 4)
        return int(np.argmax(self.validation_accuracy[:, :, -late:].mean((1, 2))))


@dataclasses.dataclass(frozen=True)
class StudySummary:
    """One line of the table of a study.

    All fields but the names are None if the network cannot have the normalization.
    """

    network: str
    normalization: str
    best_rate: float | None = None
    accuracy_mean: float | None = None
    accuracy_deviation: float | None = None
    target: float | None = None  # the accuracy that `steps_to_target` is about
    steps_to_target: int | None = None  # None if it is never reached
    fastest_rate: float | None = None  # the rate that reaches it first
    stable_rate: float | None = None  # None if no rate is stable
    stable_is_largest: bool = False  # True if no larger rate was tried

    @property
    def applicable(self) -> bool:
        """True if the network has the axes that the normalization averages over."""
        return self.best_rate is not None


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The monitor's samples of one run: the first seed, at the best rate."""

    network: str
    normalization: str
    settings: dict[str, Any]
    buffer: Buffer


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """The results of a finished study: settings, curves, summaries, samples."""

    settings: dict[str, Any]
    data: dict[str, Any]
    curves: tuple[Curves, ...]
    summaries: tuple[StudySummary, ...]
    recorded: tuple[Recorded, ...]
    seconds: float

    def write_recordings(self, folder: Path) -> dict[tuple[str, str], Recording]:
        """Write the monitor's samples, each run into a folder of its own.

        Args:
            folder: the parent of these folders. Folders of the same names in it are replaced.

        Returns:
            (network, normalization) -> recording, in the order of the curves.

        Raises:
            RecordingError: the folder cannot be written.
        """
        recordings = {}
        for each in self.recorded:
            settings = {
                "data": self.data["name"],
                "network": each.network,
                "normalization": each.normalization,
                **each.settings,
            }
            path = folder / f"{each.network}-{each.normalization}"
            recordings[each.network, each.normalization] = Recording(path, settings, anew=True)
            recordings[each.network, each.normalization].append(each.buffer)
        return recordings

    def to_json(self) -> dict[str, Any]:
        """The result as plain dictionaries, lists and numbers, without the monitor's samples.

        A number that is not finite becomes None.
        """
        plain = {
            "settings": self.settings,
            "data": self.data,
            "seconds": round(self.seconds, 1),
            "definitions": DEFINITIONS,
            "summaries": [dataclasses.asdict(row) for row in self.summaries],
            "curves": [dataclasses.asdict(curves) for curves in self.curves],
        }
        return _json_value(plain)


def summarize_curves(curves: Sequence[Curves], normalizations: Sequence[str]) -> list[StudySummary]:
    """Compute the lines of the table for one network, by the `DEFINITIONS` above.

    Args:
        curves: the curves of one network, one for each normalization that applies to it.
        normalizations: the lines of the table, in order. Those without curves do not apply.

    Returns:
        One `StudySummary` for each of `normalizations`.

    Raises:
        Nothing of its own.
    """
    if not curves:
        return []
    highest = max(float(each.validation_accuracy[each.best, :, -1].mean()) for each in curves)
    found = {each.normalization: each for each in curves}
    return [
        _summary(found[name], highest) if name in found else StudySummary(curves[0].network, name)
        for name in normalizations
    ]


def steps_to_reach(steps: Sequence[int], accuracy: np.ndarray, target: float) -> int | None:
    """The first measured step with the target accuracy, or None.

    Example:
        >>> steps_to_reach([0, 10, 20], np.array([0.1, 0.8, 0.9]), 0.8)
        10
    """
    reached = np.flatnonzero(accuracy >= target)
    return int(steps[reached[0]]) if len(reached) else None


def highest_stable(
    rates: Sequence[float], final_loss: np.ndarray, final_accuracy: np.ndarray, least: float
) -> float | None:
    """The largest rate at which every seed ends with a finite loss and 90 % of the best accuracy.

    Args:
        rates: r learning rates, in any order.
        final_loss: (r, seeds).
        final_accuracy: (r, seeds).
        least: the mean accuracy that the best rate must end with.

    Returns:
        The rate. None if the best rate ends with less than `least`, or if no rate qualifies.

    Raises:
        Nothing of its own.

    Example:
        >>> losses, accuracy = np.array([[0.2], [0.1], [np.nan]]), np.array([[0.9], [0.95], [0.95]])
        >>> highest_stable([0.1, 0.3, 1.0], losses, accuracy, least=0.5)
        0.3
    """
    best = float(final_accuracy.mean(1).max())
    if best < least:
        return None
    enough = (final_accuracy >= STABLE_SHARE * best).all(1)
    stable = np.asarray(np.isfinite(final_loss).all(1) & enough).tolist()
    return max((rate for rate, ok in zip(rates, stable, strict=True) if ok), default=None)


def _summary(curves: Curves, highest: float) -> StudySummary:
    target = TARGET_SHARE * highest
    test = curves.test_accuracy[curves.best]
    reached = [
        (step, rate)
        for rate, accuracy in zip(
            curves.learning_rates, curves.validation_accuracy.mean(1), strict=True
        )
        if (step := steps_to_reach(curves.steps, accuracy, target)) is not None
    ]
    steps, fastest = min(reached, default=(None, None))
    stable = highest_stable(
        curves.learning_rates,
        curves.final_loss,
        curves.validation_accuracy[:, :, -1],
        LEARNED_SHARE * highest,
    )
    return StudySummary(
        network=curves.network,
        normalization=curves.normalization,
        best_rate=curves.learning_rates[curves.best],
        accuracy_mean=float(test.mean()),
        accuracy_deviation=float(test.std()),
        target=target,
        steps_to_target=steps,
        fastest_rate=fastest,
        stable_rate=stable,
        stable_is_largest=stable == max(curves.learning_rates),
    )


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, np.ndarray):
        return _json_value(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
