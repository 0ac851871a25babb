"""Passes over data: batches in, pooled moments out, in float64 on the host."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.sharding import NamedSharding, PartitionSpec

from jaxnorm.core.moments import Moments
from jaxnorm.models.calls import Path
from jaxnorm.tools.recalibrate.collect import FromOrigin
from jaxnorm.training.layout import Layout, place_batch
from jaxnorm.training.objective import InputsFn, take_inputs

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
Progress = Callable[[int, int | None], None]


@dataclass
class Batches:
    """The data of a recalibration, as the model's inputs.

    Attributes:
        operation: the public function that is being called; errors begin with it.
        batches: the iterable that was given.
        inputs: takes the model's inputs out of a batch; None: as the training steps do.
        number: how many batches are read at most; None: all.
        layout: where they are placed, if anywhere.
        again: whether they are read more than once.
    """

    operation: str
    batches: Iterable[Any]
    inputs: InputsFn | None
    number: int | None
    layout: Layout | None
    again: bool

    def __post_init__(self) -> None:
        if isinstance(self.batches, Mapping | str) or not isinstance(self.batches, Iterable):
            raise TypeError(
                f"{self.operation}: batches must be an iterable of batches; got "
                f"{type(self.batches).__name__}. For example a list of arrays, [x1, x2], or a "
                "data loader."
            )
        iterator = iter(self.batches)
        if self.again and iterator is self.batches:
            raise TypeError(
                f"{self.operation}: sequential=True reads the data once for each layer, so batches "
                f"must be iterable again and again; got {type(self.batches).__name__}, an iterator "
                "that is read once. Pass a list or a data loader, or sequential=False."
            )
        self._first = next(iterator, None)
        if self._first is None:
            raise ValueError(
                f"{self.operation}: batches must hold at least one batch; got "
                f"{type(self.batches).__name__} without any. Is it an iterator that was read "
                "before? Make it anew."
            )
        self._rest: Iterator[Any] | None = iterator

    def __len__(self) -> int:
        """The number of batches in one pass; raises TypeError where that is not known."""
        known = len(self.batches)  # type: ignore[arg-type]
        return known if self.number is None else min(known, self.number)

    @property
    def known_length(self) -> int | None:
        """The number of batches in one pass, where that can be told."""
        try:
            return len(self)
        except TypeError:
            return self.number

    def __iter__(self) -> Iterator[Inputs]:
        """One pass over the data."""
        if self._rest is not None:
            data, self._rest = itertools.chain([self._first], self._rest), None
        else:
            data = iter(self.batches)
        for batch in itertools.islice(data, self.number):
            yield self.taken(batch)

    def first(self) -> Inputs:
        """The first batch, which a pass reads again."""
        return self.taken(self._first)

    def taken(self, batch: Any) -> Inputs:
        """The model's inputs in a batch, where the layout puts them."""
        taken = take_inputs(self.operation, self.inputs, batch)
        return taken if self.layout is None else jax.tree.map(self._placed, taken)

    def _placed(self, leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        layout = self.layout
        assert layout is not None
        sharding = layout.rows(leaf.ndim)
        spread = len(sharding.device_set) if sharding.spec else 1
        if leaf.ndim and leaf.shape[0] % spread and sharding.is_fully_addressable:
            # The last rows of a data set, which no mesh need divide: to all devices.
            return jax.device_put(leaf, NamedSharding(layout.mesh, PartitionSpec()))
        return place_batch(self.operation, layout, leaf)


@dataclass
class Pass:
    """A compiled pass of a model over batches.

    Attributes:
        operation: the public function that is being called; errors begin with it.
        run: ``(statistics, state, args, kwargs) -> {path: FromOrigin}``, which can be traced.
        norms: paths of the norms that are measured, in the order of their calls.
    """

    operation: str
    run: Callable[..., dict[Path, FromOrigin]]
    norms: Sequence[Path]
    _compiled: dict[Any, Callable] = field(default_factory=dict)

    def over(
        self, statistics: Any, state: Any, batches: Batches, wanted: Sequence[Path],
        report: Callable[[], None],
    ) -> tuple[dict[Path, Moments], int, int]:  # fmt: skip
        """The moments of some norms over all batches, the number of batches, and of examples."""
        pool = Pool(self.operation, wanted)
        examples = 0
        waiting: Any = None  # so that a device has the next batch while one is read from it
        number = -1
        for number, (args, kwargs) in enumerate(batches):
            with naming(self.operation, number, (args, kwargs)):
                here = self._call(statistics, state, args, kwargs, batches.layout)
            examples += rows(args, kwargs)
            if waiting is not None:
                pool.add(number - 1, waiting)
                report()
            waiting = here
        if waiting is None:
            raise ValueError(
                f"{self.operation}: every pass over batches must give the same data; got none in a "
                "later pass. Pass a list or a data loader."
            )
        pool.add(number, waiting)
        report()
        return pool.moments(), number + 1, examples

    def trace(self, statistics: Any, state: Any, args: Any, kwargs: Any, layout: Any) -> None:
        """Trace a batch, which runs nothing."""
        compiled, arrays = self._prepared(args, kwargs)
        with contextlib.nullcontext() if layout is None else layout.context():
            compiled.eval_shape(statistics, state, arrays)

    def _call(self, statistics: Any, state: Any, args: Any, kwargs: Any, layout: Any) -> Any:
        compiled, arrays = self._prepared(args, kwargs)
        with contextlib.nullcontext() if layout is None else layout.context():
            return compiled(statistics, state, arrays)

    def _prepared(self, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """The compiled pass for the constants among the inputs, and the arrays among them."""
        leaves, tree = jax.tree.flatten((args, dict(kwargs)))
        is_array = tuple(hasattr(leaf, "dtype") for leaf in leaves)
        constants = tuple(None if a else leaf for a, leaf in zip(is_array, leaves))
        key = (tree, is_array, constants)
        if key not in self._compiled:

            def run(statistics, state, arrays):
                left = iter(arrays)
                filled = [next(left) if a else c for a, c in zip(is_array, constants)]
                args, kwargs = tree.unflatten(filled)
                return self.run(statistics, state, args, kwargs)

            self._compiled[key] = jax.jit(run)
        return self._compiled[key], [leaf for a, leaf in zip(is_array, leaves) if a]


class Pool:
    """Moments that are merged on the host in float64, so that no number of batches costs digits."""

    def __init__(self, operation: str, norms: Sequence[Path]) -> None:
        self._operation = operation
        self._norms = norms
        self._total: dict[Path, Moments] | None = None

    def add(self, number: int, batch: Mapping[Path, FromOrigin]) -> None:
        """Merge the moments of a batch, which must be finite."""
        found = {path: _on_host(batch[path]) for path in self._norms}
        for path, here in found.items():
            bad = ~(np.isfinite(here.mean) & np.isfinite(here.m2))
            if bad.any():
                name = "/".join(path) or "the norm"
                raise ValueError(
                    f"{self._operation}: data and their squares must be finite; got batch {number} "
                    f"(counted from 0), in which the input of {name} is not, in "
                    f"{int(bad.sum())} of {bad.size} channels. Look at that batch, or at the "
                    "weights before that layer if all batches are like it; nothing was changed."
                )
        with in_float64():
            wide = jax.tree.map(jnp.asarray, found)
            total = wide if self._total is None else _merged(self._total, wide)
        self._total = total

    def moments(self) -> dict[Path, Moments]:
        """The moments of all batches, NumPy's float64."""
        return jax.tree.map(np.asarray, self._total or {})


@jax.jit
def _merged(total: Any, batch: Any) -> Any:
    return {path: total[path].merge(batch[path]) for path in total}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Compute with 64-bit numbers on the CPU, whatever the user has set."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        with contextlib.suppress(RuntimeError):  # no CPU among JAX's platforms
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def _on_host(moments: FromOrigin) -> Moments:
    """Moments of a batch as NumPy's float64, the same on every process."""
    leaves: list[Any] = []
    limit = float(jnp.finfo(moments.moments.m2.dtype).max)
    for leaf in (moments.origin, *moments.moments):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
            leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
        array = np.asarray(leaf)
        leaves.append(array.astype(np.result_type(array.dtype, np.float64)))
    origin, count, mean, m2 = leaves
    # At the largest number it is saturated, and the variance is not known.
    return Moments(count, origin + mean, np.where(m2 < limit, m2, np.inf))  # type: ignore[arg-type]


def rows(args: Any, kwargs: Any) -> int:
    """The number of examples in a batch: the leading axis of its first array."""
    arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if getattr(leaf, "ndim", 0)]
    return arrays[0].shape[0] if arrays else 1


@contextlib.contextmanager
def naming(operation: str, number: int, batch: Any) -> Iterator[None]:
    """Name the batch in errors of what is traced within."""
    try:
        yield
    except (TypeError, ValueError, KeyError, FlaxError) as error:
        if str(error).startswith(f"{operation}:"):
            raise type(error)(f"{error} This is batch {number}, counted from 0.") from error
        shapes = ", ".join(
            f"{leaf.dtype}{tuple(leaf.shape)}"
            for leaf in jax.tree.leaves(batch)
            if hasattr(leaf, "dtype")
        )
        raise ValueError(
            f"{operation}: every batch must be one that the model takes with these variables; got "
            f"batch {number} (counted from 0) with inputs {shapes or 'without arrays'}, and "
            f"{type(error).__name__}: {error} Pass variables of this model, and choose its inputs "
            "with inputs=lambda batch: (...)."
        ) from error


@contextlib.contextmanager
def reporting(operation: str, progress: Any, total: int | None) -> Iterator[Callable[[], Any]]:
    """A function to be called after each batch, which tells the user's callable or moves a bar."""
    done = itertools.count(1)
    if progress is None or progress is False:
        yield lambda: None
        return
    if progress is not True:
        if not callable(progress):
            raise TypeError(
                f"{operation}: progress must be True for a bar, or a callable; got {progress!r}. "
                "For example progress=lambda done, total: print(done, total)."
            )
        yield lambda: progress(next(done), total)
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError as error:
        raise ImportError(
            f"{operation}: progress=True must have the package rich, which is not installed. "
            "Install it: pip install rich; or pass a callable, progress=lambda done, total: ..."
        ) from error
    columns = (TextColumn(operation), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns) as bar:
        task = bar.add_task(operation, total=total)
        yield lambda: bar.update(task, completed=next(done))
