"""Checkpoints of a run: saved from one mesh while training goes on, restored onto any other.

Orbax writes and reads the arrays (https://orbax.readthedocs.io). This module adds what makes a
resumed run the same run: the random key with its kind, the position in the data, checksums that do
not depend on the mesh, and errors that say what to do. Use it like this:

    with Checkpoints(folder) as checkpoints:
        data = {}
        if checkpoints.latest() is not None:
            state, data = checkpoints.restore(state)  # the fresh state is the template
        for number in range(int(state.step), steps):
            state, metrics = step(state, batch_of(seed, number))  # data order from (seed, step)
            if (number + 1) % every == 0:
                checkpoints.save(state, data={...})  # training goes on meanwhile

A step draws from `fold_in(state.rng, state.step)`. If the batches depend on (seed, step) alone, a
run that was killed and resumed computes the same bits as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from jaxnorm.training.checksum import checksums
from jaxnorm.training.record import (
    brief,
    check_places,
    check_values,
    differences,
    first_of,
    from_plain,
    has_values,
    make_record,
    named_leaves,
    not_stored,
    read_record,
    structures,
    to_plain,
)
from jaxnorm.training.state import TrainState
from jaxnorm.training.stored import SIZES, read_values, sizes_of_files, zeros_for

_STATE, _RECORD = "state", "record"  # the two items of an Orbax checkpoint
_MOVED = "damaged"  # folder/damaged/<time>/<step>


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read whole: truncated, with missing files, or with changed bits.

    Attributes: step: the step of the checkpoint.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Checkpoints:
    """The checkpoints of one run, in one folder: `folder/<step>`.

    A folder is the history of one run and only grows at its end. No checkpoint is ever overwritten,
    and the oldest ones are deleted if there are more than `keep`. One program at a time may save to
    a folder; it may have many processes, which all call the same methods. Any program may restore.

    A checkpoint is written under another name and renamed when it is complete, so a crash leaves
    none that is half written. A checkpoint holds a checksum of every array, taken on the devices
    before saving and again after restoring, so damage to the files is found too.

    Args:
        folder: the folder of the checkpoints: a path, or a URL that Orbax can write to, such as
            `gs://bucket/run`. The first `save` makes it; nothing is written before that.
        keep: the number of newest checkpoints to keep; None keeps all.

    Raises:
        NotADirectoryError: `folder` is a file.
        ValueError: `keep` is not a positive integer or None.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, optax, tempfile
        >>> from jaxnorm.training import create_train_state
        >>> state = create_train_state(nn.BatchNorm(), optax.sgd(0.1), 0, jnp.ones((4, 3)))
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(state, data={"epoch": 2})
        ...     restored, data = checkpoints.restore(state)
        >>> restored.batch_stats["var"], data
        (Array([1., 1., 1.], dtype=float32), {'epoch': 2})
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None = 3) -> None:
        folder = os.fspath(folder)
        self._folder = folder if "://" in folder else os.path.abspath(folder)
        if os.path.isfile(self._folder):
            raise NotADirectoryError(
                f"Checkpoints: folder must be a folder, or not exist yet; {self._folder} is a "
                "file. Name another."
            )
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(
                f"Checkpoints: keep must be a positive integer, or None to keep all; got "
                f"keep={keep!r}. For example keep=3."
            )
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._damaged: set[int] = set()

    def save(self, state: TrainState, *, data: Mapping[str, Any] | None = None) -> None:
        """Save a state, under the number `state.step`, while training goes on.

        The method returns when the values have left the devices, so that the next step may reuse
        (donate) the buffers. The files are written in the background. A failure to write them is
        raised by the next `save`, `restore` or `wait`, or at the end of the `with` block. If the
        previous `save` has not finished, this one waits for it first.

        Before it returns, it copies the state to the host, and reads it once more on the devices
        for the checksums.

        Args:
            state: the state of a run, or of a sweep. With several processes every leaf must lie on
                a mesh of all devices.
            data: whatever else the run must remember, such as the position in the data: a dict that
                JSON gives back unchanged.

        Raises:
            TypeError: `state` is not a TrainState of arrays with values, or `data` not such a dict.
            ValueError: the folder has this step or a later one already; copies of a replicated
                array differ between devices; the state's buffers were donated.
            OSError: the previous checkpoint could not be written.
        """
        operation = "Checkpoints.save"
        leaves = named_leaves(operation, "state", state)
        check_values(operation, leaves)
        # The shardings come from the leaves, and not from a mesh that is set around the call.
        with jax.set_mesh(None):
            plain = {name: to_plain(leaf) for name, leaf in leaves.items()}
            record = make_record(operation, state, leaves, checksums(operation, plain), data)
            self.wait()
            newest = max(self._steps().keys() - self._damaged, default=-1)
            step = int(np.max(state.step))
            if step <= newest:
                raise ValueError(
                    f"{operation}: the steps of a folder must grow, since nothing is overwritten; "
                    f"got state.step={step}, and {self._folder} has step {newest} already. Go on "
                    "from there with restore(template), or save to a new folder."
                )
            tree = unflatten_dict({name: x for name, x in plain.items() if x.size}, sep="/")
            args = ocp.args.Composite(
                **{_STATE: ocp.args.PyTreeSave(tree), _RECORD: ocp.args.JsonSave(record)}
            )
            with _writing(operation, self._folder):
                self._writer().save(step, args=args, force=True)

    def restore(
        self, template: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Read a saved state with the layout of `template`, and the `data` saved with it.

        Every value comes back bit for bit, on the devices of the template's leaf, whichever mesh it
        was saved from. A leaf without a place (a fresh array that is bound to no device, or a
        ShapeDtypeStruct without a sharding) gives an array that is bound to no device.

        The samples of a monitor are restored if the template has the same monitor on the same
        model. Otherwise they are left out, or the buffer starts empty. All other parts must be as
        they were saved.

        Without a `step`, the newest whole checkpoint is read. A newer one that is damaged is
        skipped with a warning that names it; the next `save` moves it to `folder/damaged`.
        Restoring itself changes nothing on disk.

        Args:
            template: a TrainState of arrays, such as a fresh one, whose values are not used; or one
                of `jax.ShapeDtypeStruct`s with shardings.
            step: the step of the checkpoint. The default is the newest whole one.

        Returns:
            `(state, data)`; `data` is `{}` if none was saved.

        Raises:
            TypeError: `template` is not a TrainState of arrays or ShapeDtypeStructs.
            FileNotFoundError: there is no folder, no checkpoint, or no checkpoint of that step.
            ValueError: the checkpoint is of another model (other leaves, shapes or dtypes); copies
                of a replicated array of the template differ between devices.
            DamagedCheckpointError: the checkpoint of `step`, or every checkpoint, is damaged.
        """
        operation = "Checkpoints.restore"
        leaves = named_leaves(operation, "template", template)
        check_places(operation, leaves)
        with jax.set_mesh(None):
            values = {n: to_plain(leaf) for n, leaf in leaves.items() if has_values(leaf)}
            checksums(operation, values)
            number, (state, data), skipped = self._newest_whole(
                operation, leaves, structures(template), step
            )
        for error in skipped:
            warnings.warn(f"{error} Restored step {number} instead.", stacklevel=2)
        return jax.tree.unflatten(jax.tree.structure(template), state), data

    def _newest_whole(
        self,
        operation: str,
        leaves: Mapping[str, Any],
        optional: Mapping[str, int],
        step: int | None,
    ) -> tuple[int, Any, list[DamagedCheckpointError]]:
        """The step that was read, the content of its checkpoint, and why later ones were not."""
        self.wait()
        found = self._steps()
        if not found or (step is not None and step not in found):
            raise FileNotFoundError(
                f"{operation}: no checkpoint {'' if step is None else f'of step {step} '}in "
                f"{self._folder}, which has {sorted(found) or 'none'}. Look at the path, name one "
                "of these steps, or start anew: latest() is None where there is nothing to restore."
            )
        skipped = []
        for number in sorted(found, reverse=True) if step is None else [step]:
            try:
                return number, _read(operation, found[number], number, leaves, optional), skipped
            except DamagedCheckpointError as error:
                self._damaged.add(number)
                skipped.append(error)
        if len(skipped) == 1:
            raise skipped[0]
        raise DamagedCheckpointError(
            f"{operation}: none of the checkpoints {sorted(found)} in {self._folder} can be read "
            f"whole. Restore a copy of the folder, or start anew in another. The newest: "
            f"{skipped[0]}",
            skipped[0].step,
        ) from skipped[0]

    def latest(self) -> int | None:
        """The newest step that was saved completely, or None. Its files are not read."""
        return max(self._steps(), default=None)

    def wait(self) -> None:
        """Wait until the last `save` is on disk.

        Raises:
            OSError: it could not be written. Earlier checkpoints are untouched.
        """
        if self._manager is not None:
            with _writing("Checkpoints.wait", self._folder):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last `save`, and end the threads that write; leaving `with` does it too."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with _writing("Checkpoints.close", self._folder):
                manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _steps(self) -> dict[int, Any]:
        """Finished checkpoints: step -> path. Orbax knows an unfinished one by its name."""
        found = ocp.path.step.standard_name_format().find_all(self._folder)
        return {step.step: step.path for step in found}

    def _writer(self) -> ocp.CheckpointManager:
        if self._damaged:
            # Move damaged checkpoints away. They would count among those to keep, and their
            # numbers could not be saved again.
            away = f"{_MOVED}/{time.time_ns()}"
            options = ocp.CheckpointManagerOptions(create=False, todelete_subdir=away)
            with ocp.CheckpointManager(self._folder, options=options) as mover:
                for step in sorted(self._damaged):
                    mover.delete(step)
            self._damaged.clear()
            if self._manager is not None:
                self._manager.reload()
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
                cleanup_tmp_directories=True,  # delete what a crash left unfinished
            )
            handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
            handlers.add(_STATE, ocp.args.PyTreeSave, _StateHandler())
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, handler_registry=handlers
            )
        return self._manager


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """An Orbax handler that writes the sizes of its files before the checkpoint is renamed.

    With the sizes every process finds a truncated file before it reads any array. TensorStore finds
    it only on the processes that need the lost part.
    """

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        (directory / SIZES).write_text(json.dumps(sizes_of_files(directory)))


@contextlib.contextmanager
def _writing(operation: str, folder: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from the file system, TensorStore or the runtime
        raise OSError(
            f"{operation}: a checkpoint could not be written to {folder}: {brief(error)}. Earlier "
            "ones are untouched. Look at the free space and the permissions, and save again."
        ) from error


def _read(
    operation: str,
    path: Any,
    step: int,
    leaves: Mapping[str, Any],
    optional: Mapping[str, int],
) -> tuple[list[jax.Array], dict[str, Any]]:
    """The leaves of a checkpoint in the order of `leaves`, and its data.

    An optional field that was saved in another form becomes zeros, which is its empty state.
    """

    def damaged(why: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{operation}: the checkpoint of step {step}, {path}, is damaged: {why}. Take "
            "another: restore(template) takes the newest that is whole.",
            step,
        )

    record, values, different, empty, error = {}, {}, "", set(), None
    try:
        record = read_record(ocp.JsonCheckpointHandler().restore(path / _RECORD))
        different = differences(record, leaves)
        empty = not_stored(record, leaves, optional)
        read = {name: leaf for name, leaf in leaves.items() if name not in empty}
        values = {} if different else read_values(path / _STATE, read)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # such an error says nothing about the files
    except Exception as caught:  # of any class: TensorStore raises a bare Exception
        error = caught
    if _on_any_process(error is not None):
        raise damaged(brief(error) if error else "another process could not read it") from error
    if different:
        raise ValueError(
            f"{operation}: the template must have the leaves of the checkpoint, {path}; "
            f"{different}. Build it with the model and the optimizer that the checkpoint was saved "
            "with, or name that model's folder."
        )
    found = checksums(operation, values)
    wrong = [name for name in values if found[name] != record["leaves"][name]["checksum"]]
    if wrong:
        raise damaged(f"{first_of(wrong)} came back with other bits than were saved")
    state = [
        zeros_for(leaves[name])
        if name in empty
        else from_plain(values[name], record["leaves"][name])
        for name in leaves
    ]
    return state, record["data"]


def _on_any_process(failed: bool) -> bool:
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
