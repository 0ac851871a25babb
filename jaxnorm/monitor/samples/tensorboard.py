"""Event files of TensorBoard with the numbers of samples as scalars."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Numbers = Mapping[str, float]

_SUFFIX = ".jaxnorm"  # of the event files that are written here; others are left alone


def add_scalars(folder: str | os.PathLike[str], samples: Sequence[tuple[int, Numbers]]) -> None:
    """Add to a folder the samples that its event files do not hold yet.

    If a step has other numbers now, since a restart repeated it, all samples are written anew and
    the earlier files are deleted.

    Args:
        folder: the folder of one run; event files of other programs in it are left alone.
        samples: pairs of a step and its numbers, in order of steps.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
        ValueError: the folder holds another run's samples.
    """
    try:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Recording: TensorBoard's files are written by tensorboard; got an environment "
            "without it. Install it: pip install tensorboard."
        ) from None
    earlier = sorted(Path(folder).glob(f"*{_SUFFIX}"))
    shown = _read(earlier)
    given = dict(samples)
    same = [step in given and _same(numbers, given[step]) for step, numbers in shown.items()]
    if shown and not any(same):
        raise ValueError(
            f"Recording.to_tensorboard: the folder must be of this run; got '{folder}', which "
            "holds scalars of another, with no sample in common. Name another folder, or delete "
            f"its files *{_SUFFIX}."
        )
    if all(same):
        earlier = []
    else:
        shown = {}
    new = [(step, numbers) for step, numbers in samples if step not in shown]
    if new:
        writer = EventFileWriter(os.fspath(folder), filename_suffix=_SUFFIX)
        for step, numbers in new:
            event = event_pb2.Event(wall_time=time.time(), step=step)  # pyright: ignore
            for name, number in numbers.items():
                event.summary.MergeFrom(scalar_pb(name, number))
            writer.add_event(event)
        writer.close()
    for path in earlier:
        path.unlink()


def _read(files: Sequence[Path]) -> dict[int, dict[str, np.ndarray]]:
    """Read event files: step -> name -> number."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = (event for path in files for event in EventFileLoader(str(path)).Load())
    return {
        event.step: {value.tag: make_ndarray(value.tensor) for value in event.summary.value}
        for event in events
        if event.HasField("summary")
    }


def _same(shown: Mapping[str, np.ndarray], numbers: Numbers) -> bool:
    """True if these numbers are shown, as far as float32 tells them apart."""
    return shown.keys() == numbers.keys() and all(
        np.array_equal(shown[name], np.float32(number), equal_nan=True)
        for name, number in numbers.items()
    )
