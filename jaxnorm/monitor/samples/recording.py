"""The samples of a run on disk: a folder that can be read while it grows, and after a crash.

`recording.json` says what was observed; each `append` adds one file of NumPy arrays. A file is
written whole or not at all, so a run that is killed loses only the samples since the last `append`.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.files import write_whole
from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.observations import Observation
from jaxnorm.monitor.samples.buffer import Buffer
from jaxnorm.monitor.samples.figures import figures, last_sample
from jaxnorm.monitor.samples.gradient_shift import GradientShift
from jaxnorm.monitor.samples.schema import ParameterSummary, Schema
from jaxnorm.monitor.samples.tensorboard import add_scalars

FORMAT = 1
_HEAD, _CHUNK = "recording.json", "samples-{:08d}.npz"


class RecordingError(ValueError):
    """A recording that cannot be read or written; the message says why, and what to do."""


class Recording:
    """The samples of a monitor, step by step, in a folder.

    Args:
        folder: the folder of the recording. The first `append` makes a new one; a recording that
            is there is continued, if it is of the same model.
        settings: settings of the run for the report, a dict that JSON can hold. None: those stored.
        anew: True to begin anew; the first `append` deletes a recording that is there.

    Raises:
        RecordingError: the folder holds something else, or a recording of another version; a file
            of it is damaged.

    Example:
        >>> import tempfile, flax.linen as nn, jax.numpy as jnp, optax
        >>> from jaxnorm.monitor import Monitor, Recording
        >>> from jaxnorm.training import create_train_state, make_train_step
        >>> model, optimizer = nn.Sequential([nn.Dense(4), nn.LayerNorm()]), optax.sgd(0.1)
        >>> x = jnp.arange(6.0).reshape(3, 2)
        >>> state = create_train_state(model, optimizer, 0, x)
        >>> step = make_train_step(
        ...     model, optimizer, lambda y, b: (y**2).mean(), monitor=Monitor(every=2)
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recording = Recording(folder)
        ...     for _ in range(5):
        ...         state, metrics = step(state, x)
        ...     _ = recording.append(state)
        ...     again = Recording(folder)
        >>> again.steps.tolist(), again["layers_1:input"].value.moments.mean.shape
        ([0, 2, 4], (3,))
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.schema: Schema | None = None
        """The meaning of the numbers; None before the first sample."""
        self.lost = 0
        """Samples that were overwritten on the device before they were read."""
        self._settings = dict(settings or {})
        self._chunks = 0
        self._steps = np.zeros(0, np.int64)
        self._rows = np.zeros((0, 0), np.float32)
        if self.folder.is_file():
            raise RecordingError(
                f"Recording: a recording is a folder; got '{folder}', which is a file. Name "
                "another, which need not exist yet."
            )
        head = self.folder / _HEAD
        if head.exists():
            if not anew:
                self._load(head)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise RecordingError(
                f"Recording: the folder must be empty, or hold a recording; got '{folder}' with "
                f"other files and no {_HEAD}. Choose another folder."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return dict(self._settings)

    @property
    def steps(self) -> np.ndarray:
        """The sampled steps in order, int64 of shape (samples,)."""
        return self._steps

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that were observed, in the order of a forward pass."""
        return () if self.schema is None else self.schema.places

    @property
    def observations(self) -> dict[str, Observation]:
        """Name of a place -> its observation; each array has a leading axis of samples."""
        schema, arrays = self.schema, self._arrays()
        return {} if schema is None else {name: schema.observation(arrays, name) for name in self}

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """The loss and the other metrics of the sampled steps, shape (samples,) each."""
        arrays = self._arrays()
        return {
            path.split("|", 1)[1]: array
            for path, array in arrays.items()
            if path.startswith("metrics|")
        }

    @property
    def parameters(self) -> dict[str, ParameterSummary]:
        """Norms of each array of parameters, its gradient and its update, shape (samples,)."""
        arrays = self._arrays()
        paths = () if self.schema is None else self.schema.parameters
        return {
            path: ParameterSummary(
                *(arrays[f"parameters|{field}"][:, i] for field in ParameterSummary._fields)
            )
            for i, path in enumerate(paths)
        }

    @property
    def shift(self) -> GradientShift | None:
        """Internal covariate shift, shape (samples, layers); None unless `Monitor(shift=True)`."""
        return None if self.schema is None else self.schema.shift(self._arrays())

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[str]:
        return (place.name for place in self.places)

    def __getitem__(self, name: str) -> Observation:
        """The observations of one place, each array with a leading axis of samples.

        Args:
            name: of the place, such as "BatchNorm_0:input".

        Raises:
            KeyError: there is no such place; the message says which there are.
        """
        names = list(self)
        if name not in names:
            raise KeyError(
                f"Recording: a place must be one of {', '.join(names) or '(none)'}; got {name!r}. "
                "Use one of these names."
            )
        assert self.schema is not None
        return self.schema.observation(self._arrays(), name)

    def _repr_html_(self) -> str:
        name, steps, metrics = self.folder.name, self.steps, self.metrics
        return last_sample(name, steps, metrics, self.observations, self.lost)

    def append(self, state: Any) -> int:
        """Read the samples that wait on the device, and write them down.

        Args:
            state: a `TrainState` with a monitor, or its buffer.

        Returns:
            The number of new samples.

        Raises:
            TypeError: there is no buffer in it.
            RecordingError: it is of another model than the recording, or cannot be written.
        """
        buffer = state if isinstance(state, Buffer) else getattr(state, "monitor", None)
        if not isinstance(buffer, Buffer):
            raise TypeError(
                f"Recording: a state must have a monitor's buffer; got {type(state).__name__} "
                "without one. Make the step with monitor=, and call it once."
            )
        if buffer.steps.ndim != 1:
            raise TypeError(
                f"Recording: a recording is of one run; got a sweep of {buffer.steps.shape[0]}. "
                "Take one out with sweep_member."
            )
        steps, rows, overwritten = buffer.read()
        if self.schema is None:
            self._start(buffer.schema)
        elif self.schema != buffer.schema:
            raise RecordingError(
                f"Recording: all samples must be of one model; got a state whose places or "
                f"parameters are not those in '{self.folder}'. Record it in another folder."
            )
        new = ~self._has(steps, rows)
        if not new.any():
            return 0
        # A sample that was read before it was overwritten is not lost.
        earlier = int((self._steps < steps[0]).sum())
        lost = max(0, overwritten - earlier - self.lost)
        self.lost += lost
        self._write(_CHUNK.format(self._chunks), _packed(steps[new], rows[new], lost))
        self._chunks += 1
        self._add(steps[new], rows[new])
        return int(new.sum())

    def numbers(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Each sample as one flat dict of numbers, for trackers and data frames.

        Returns:
            Pairs of a step and its numbers: "metrics/loss", "BatchNorm_0:input/mean", ....
        """
        table: dict[str, Any] = {f"metrics/{name}": a for name, a in self.metrics.items()}
        for name, observation in self.observations.items():
            table |= {f"{name}/{field}": array for field, array in figures(observation)}
        for path, norms in self.parameters.items():
            for field, array in zip(ParameterSummary._fields, norms):
                table[f"{path}/{field}_norm"] = array
        if (shift := self.shift) is not None:
            for i, layer in enumerate(shift.layers):
                table[f"shift/{layer}/l2"] = shift.l2[:, i]
                table[f"shift/{layer}/cosine"] = shift.cosine[:, i]
        for i, step in enumerate(self.steps):
            yield int(step), {name: float(array[i]) for name, array in table.items()}

    def to_dataframe(self) -> Any:
        """A row for each step and place, as a `pandas.DataFrame`.

        Returns:
            Columns "step", "place", "layer", "kind", "side" and one for each figure.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "Recording: a data frame needs pandas; got an environment without it. Install it: "
                "pip install pandas."
            ) from None
        frames, observations = [], self.observations
        for place in self.places:
            columns = {"step": self.steps, "place": place.name, "layer": place.layer}
            columns |= {"kind": place.kind, "side": place.side}
            columns |= dict(figures(observations[place.name]))
            frames.append(pandas.DataFrame(columns))
        return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()

    def report_to(
        self, callback: Callable[[int, dict[str, float]], Any], *, after: int = -1
    ) -> None:
        """Hand each sample to a tracker: ``callback(step, numbers)``.

        Args:
            callback: such as ``lambda step, numbers: wandb.log(numbers, step=step)``.
            after: the last step that the tracker has; only later samples are handed over. Use it
                in a further call, while the run goes on or after a restart.
        """
        for step, numbers in self.numbers():
            if step > after:
                callback(step, numbers)

    def to_tensorboard(self, folder: str | os.PathLike[str]) -> None:
        """Write every number of every sample as a scalar that TensorBoard shows.

        A further call, while the run goes on or after a restart, adds new samples; repeated steps
        replace the earlier ones.

        Args:
            folder: for this recording's event files, such as "runs/first". Those of other
                programs in it are left alone.

        Raises:
            ModuleNotFoundError: tensorboard is not installed.
            ValueError: the folder holds the scalars of another recording.
        """
        add_scalars(folder, list(self.numbers()))

    def _arrays(self) -> dict[str, Any]:
        return {} if self.schema is None else self.schema.split(self._rows)

    def _has(self, steps: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """A mask of the samples that are recorded already, whether before or after a restart."""
        if not len(self._steps):
            return np.zeros(len(steps), bool)
        at = np.searchsorted(self._steps, steps).clip(max=len(self._steps) - 1)
        # Compared by their bits, since what is not a number equals nothing.
        same = (self._rows[at].view(np.uint32) == rows.view(np.uint32)).all(1)
        return same & (self._steps[at] == steps)

    def _add(self, steps: np.ndarray, rows: np.ndarray) -> None:
        """Add samples in order of steps; a repeated step, after a restart, replaces the earlier."""
        if not self._rows.size:
            self._rows = np.zeros((0, rows.shape[1]), np.float32)
        rows = rows.astype(np.float32, copy=False)
        steps, rows = np.concatenate([self._steps, steps]), np.concatenate([self._rows, rows])
        last = len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]
        self._steps, self._rows = steps[last], rows[last]

    def _files(self) -> list[Path]:
        """The files of samples, in order."""
        return sorted(self.folder.glob(_CHUNK.replace("{:08d}", "*")))

    def _start(self, schema: Schema) -> None:
        self.schema = schema
        for old in self._files():
            old.unlink()
        head = {"format": FORMAT, "settings": self._settings, "schema": schema.to_json()}
        text = json.dumps(head, indent=1, allow_nan=False, default=str)
        self._write(_HEAD, text.encode())

    def _load(self, head: Path) -> None:
        try:
            stored = json.loads(head.read_text("utf-8"))
            found = stored["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(head, error) from None
        if found != FORMAT:
            raise RecordingError(
                f"Recording: '{self.folder}' must be of format {FORMAT}; got format {found!r}, of "
                "another version of jaxnorm. Read it with that version."
            )
        try:
            self.schema = Schema.from_json(stored["schema"])
            self._settings = {**stored["settings"], **self._settings}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(head, error) from None
        self._rows = np.zeros((0, self.schema.width), np.float32)
        for path in self._files():
            try:
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as chunk:
                    steps, rows, lost = chunk["steps"], chunk["rows"], int(chunk["lost"])
                    if rows.shape != (len(steps), self.schema.width):
                        raise ValueError(f"rows of shape {rows.shape}")
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise _damaged(path, error) from None
            self._add(steps, rows)
            self.lost += lost
            self._chunks = int(path.stem.rsplit("-", 1)[1]) + 1

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_whole(self.folder, {name: content})
        except OSError as error:
            raise RecordingError(
                f"Recording: the folder must be writable; got '{self.folder}': "
                f"{error.strerror or error}. Choose another, or make room."
            ) from None


def _packed(steps: np.ndarray, rows: np.ndarray, lost: int) -> bytes:
    file = io.BytesIO()
    np.savez(file, steps=steps, rows=rows, lost=np.int64(lost))
    return file.getvalue()


def _damaged(path: Path, error: Exception) -> RecordingError:
    return RecordingError(
        f"Recording: every file of a recording must be whole; got '{path}', which cannot be read "
        f"({type(error).__name__}: {error}). Move that file away to read the rest."
    )
