"""The public functions that recalibrate a model and adapt it to a domain."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.core.divergence import normal_divergence
from jaxnorm.core.moments import Moments
from jaxnorm.models.calls import Path
from jaxnorm.models.select import Layers, Selection
from jaxnorm.tools.recalibrate.collect import BATCH_NORMS, Collecting
from jaxnorm.tools.recalibrate.order import Stage, stages
from jaxnorm.tools.recalibrate.passes import Batches, Pass, in_float64, naming, reporting
from jaxnorm.tools.recalibrate.report import LayerShift, RecalibrationReport
from jaxnorm.tools.recalibrate.subject import Subject, as_subject, stored
from jaxnorm.training.layout import Layout, check_layout
from jaxnorm.training.objective import InputsFn


@dataclass(frozen=True)
class Recalibrated:
    """A model with new running statistics.

    Attributes:
        model: the Linen module that was given, or a copy of the NNX module with new statistics.
        variables: the collections of the Linen module, of which only statistics are new; None for
            NNX, whose module holds its own.
        report: how far each layer moved. It prints as a table.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm import tools
        >>> new = tools.recalibrate(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), [jnp.array([[1.0], [3.0]])])
        >>> isinstance(new, tools.Recalibrated), new.model.mean[...].tolist(), new.variables
        (True, [2.0], None)
    """

    model: Any
    variables: Any
    report: RecalibrationReport


def recalibrate(
    model: Any,
    *variables_and_batches: Any,
    sequential: bool = False,
    num_batches: int | None = None,
    inputs: InputsFn | None = None,
    layers: Layers | None = None,
    layout: Layout | None = None,
    progress: bool | Callable[[int, int | None], None] | None = None,
) -> Recalibrated:
    r"""Recompute the running statistics of batch norms from data, known as PreciseBN.

    The running statistics of training are an average over steps in which the weights changed. Here
    they become the statistics of a whole data set for the weights as they are. With batches of
    n_b elements, mean mu_b and variance sigma_b^2,

    .. math::
        n = \sum_b n_b, \quad \mu = \frac1n \sum_b n_b \mu_b, \quad
        \sigma^2 = \frac1n \sum_b n_b \left( \sigma_b^2 + (\mu_b - \mu)^2 \right),

    the exact mean and biased variance of all elements, whatever the sizes of the batches and with
    masks (a layer with ``unbiased=True`` stores ``sigma^2 n / (n - 1)``). Moments of a batch are
    taken of shifted data, and merged on the host in float64.

    There are two meanings of a norm's input, and both are offered.

    * ``sequential=False``: one pass. Each of the norms normalizes with the statistics of its batch,
      as in training, and all are measured at once. A norm's input is what it sees in training.
    * ``sequential=True``: a pass for each layer of norms, from first to last, in evaluation mode.
      A norm's input is what it will see in evaluation, with the new statistics in the norms before
      it. Norms that do not feed one another share a pass; which do is read from the traced
      program.

    In both, everything else is in evaluation mode: dropout is off, since evaluation has none,
    and no other variable changes (what the call of the model writes elsewhere is dropped). All
    batch norms of Flax and jaxnorm and their subclasses take part, found by their class when
    they are called. A norm that is called several times pools its calls. One that is never
    called keeps its statistics, and the report lists it; a channel without any element keeps
    them too, and so does the number of updates of ``momentum=None`` or ``debias=True``. Under
    `flax.linen.scan` and `flax.nnx.scan`, stacked statistics are those of each layer; with
    ``sequential=True`` the stack takes as many passes as it has norms.

    A norm's `virtual_batch_size` says how its batch is normalized; its statistics are those of
    all elements. A norm's `axis_name` that is not bound is the one of your `pmap` or `shard_map`,
    and stands for the whole batch, which is what a norm sees here.

    Args:
        model: a Linen module that is not bound, or an NNX module. Neither is changed.
        *variables_and_batches: for Linen the variables, ``{"params": ..., "batch_stats": ...}``;
            then any iterable of batches, of any sizes (of one array, its entries). With
            ``sequential=True`` one that can be read again, such as a list. Batches may be global
            arrays that are sharded over a mesh, with several processes too.
        sequential: which of the two meanings.
        num_batches: read this many batches at most; None: all.
        inputs: takes the model's inputs out of a batch, a tuple, a dict of keyword inputs, or one
            array, as in `jaxnorm.training.make_train_step`. A mask that the model's call passes
            to its norms is such an input.
        layers: norms to recalibrate: a path with * for anything, a class, several of these, or a
            function of a path and a name of a class. None: all. The others use running statistics.
        layout: where to place batches, a `jaxnorm.training.Layout`; None: where they are. A last
            batch that the devices of one process do not divide goes to all of them. With several
            processes each gives its share of every batch, the same number of batches.
        progress: True for a bar (with the package rich), or a function of the number of batches
            done and of all, the latter None if it is not known.

    Returns:
        `Recalibrated`: `model`, `variables`, `report`. Statistics keep their dtype, sharding and
        boxes; all other variables are the same arrays.

    Raises:
        TypeError: the model is neither a Linen nor an NNX module, batches are no iterable, or are
            read once where they are needed again.
        ValueError: no batch, a batch or variables that do not fit the model, no norm (or none that
            `layers` selects), a norm whose input is not finite, by batch and layer; with
            ``sequential=True`` a norm that feeds itself.
        ImportError: ``progress=True`` without rich.

    Source: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3; Chan, Golub & LeVeque
    1979 for the merging.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxnorm import tools
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[8.0]])]
        >>> variables = model.init(jax.random.key(0), batches[0])
        >>> new = tools.recalibrate(model, variables, batches)
        >>> new.variables["batch_stats"]["mean"].item()
        4.0
        >>> round(new.variables["batch_stats"]["var"].item(), 4)
        8.6667
        >>> print(new.report)
        norms recalibrated: 1, on examples: 3, in batches: 2, in passes: 1
        layer      elements  KL (nats), mean  largest  at channel
        BatchNorm  3         10.8             10.8     0
    """
    return _recalibrated(
        "recalibrate", model, variables_and_batches, 0.0, sequential=sequential,
        num_batches=num_batches, inputs=inputs, layers=layers, layout=layout, progress=progress,
    )  # fmt: skip


def adapt(
    model: Any,
    *variables_and_batches: Any,
    source_weight: float = 0.0,
    sequential: bool = False,
    num_batches: int | None = None,
    inputs: InputsFn | None = None,
    layers: Layers | None = None,
    layout: Layout | None = None,
    progress: bool | Callable[[int, int | None], None] | None = None,
) -> Recalibrated:
    r"""Adapt the running statistics of batch norms to data of a new domain, known as AdaBN.

    The running statistics become a mixture of those of the source, which the model has, and of
    those of the target, which are recomputed as `recalibrate` does:

    .. math::
        \mu = \frac{N \mu_s + n \mu_t}{N + n}, \quad
        \sigma^2 = \frac{N \sigma_s^2 + n \sigma_t^2}{N + n},

    with n the number of target examples and N = `source_weight`, in examples too: the source
    counts as that many pseudo-examples. Means and variances are each averaged, as in the paper.
    So the variance is not that of the union of both sets, which had a term of the distance
    between the means. N = 0 takes the target's alone; many examples need no N.

    With ``sequential=True`` the mixture of a norm is what the norms after it see.

    Args:
        model: a Linen or NNX module, as for `recalibrate`.
        *variables_and_batches: the source's variables (Linen), then batches of the target, without
            labels. Examples are counted along the leading axis of a batch's first input.
        source_weight: N, the number of source pseudo-examples, finite and at least 0.
        sequential, num_batches, inputs, layers, layout, progress: as for `recalibrate`.

    Returns:
        `Recalibrated`: `model`, `variables`, `report`.

    Raises:
        TypeError, ValueError, ImportError: as `recalibrate`; `source_weight` is negative or not
            finite.

    Source: Li et al. 2016, "Revisiting Batch Normalization for Practical Domain Adaptation"
    (N = 0); Schneider et al. 2020, "Improving robustness against common corruptions by covariate
    shift adaptation".

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxnorm import tools
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> target = jnp.array([[7.0], [9.0]])
        >>> source = model.init(jax.random.key(0), target)  # mean 0, variance 1
        >>> new = tools.adapt(model, source, [target], source_weight=6)
        >>> new.variables["batch_stats"]["mean"].item()
        2.0
    """
    try:
        weight = float(source_weight)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(
            "adapt: source_weight must be a number of examples, finite and at least 0; got "
            f"{source_weight!r}. For example source_weight=16, or 0 for the target alone."
        )
    return _recalibrated(
        "adapt", model, variables_and_batches, weight, sequential=sequential,
        num_batches=num_batches, inputs=inputs, layers=layers, layout=layout, progress=progress,
    )  # fmt: skip


def _recalibrated(
    op: str, model: Any, given: tuple[Any, ...], source_weight: float, *, sequential: bool,
    num_batches: int | None, inputs: InputsFn | None, layers: Layers | None,
    layout: Layout | None, progress: Any,
) -> Recalibrated:  # fmt: skip
    subject, iterable = as_subject(op, model, given)
    selection = Selection.of(op, layers)
    check_layout(op, layout)
    if num_batches is not None:
        num_batches = _positive(op, num_batches)
    batches = Batches(op, iterable, inputs, num_batches, layout, again=sequential)
    old = subject.statistics()
    called = _called(op, subject, old, batches)
    norms = _selected(op, selection, called)
    hook = Collecting(op, not sequential, frozenset(norms))

    def run(statistics, state, args, kwargs):
        return subject.run(hook, state, statistics, args, kwargs)

    plan = [Stage(tuple(norms), 1)]
    if sequential:
        plan = _plan(op, run, subject, called.seen, norms, old, batches)
    length = batches.known_length
    compiled = Pass(op, run, norms)
    current = {path: old[path] for path in norms}
    pooled: dict[Path, Moments] = {}
    count = examples = passes = 0
    with reporting(op, progress, length and length * sum(stage.passes for stage in plan)) as tell:
        for stage in plan:
            for _ in range(stage.passes):
                measured, count, examples = compiled.over(
                    current, subject.state, batches, stage.norms, tell
                )
                passes += 1
                before = {path: current[path] for path in stage.norms}
                for path, moments in measured.items():
                    unbiased = bool(getattr(called.seen[path][0], "unbiased", False))
                    new = _mixed(moments, unbiased, old[path], source_weight, examples)
                    current[path] = (stored(new[0], old[path][0]), stored(new[1], old[path][1]))
                pooled |= measured
                # A further pass would do the same again.
                if all(map(_equal, before.values(), (current[p] for p in stage.norms))):
                    break
    new_model, variables = subject.result(current)
    shifts = tuple(_shift(path, called.seen[path][0], pooled[path], old[path], current[path])
                   for path in norms)  # fmt: skip
    kept = tuple("/".join(path) for path in old if path not in called.seen)
    report = RecalibrationReport(shifts, kept, count, examples, passes)
    return Recalibrated(new_model, variables, report)


def _positive(op: str, number: Any) -> int:
    try:
        count = operator.index(number)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(
            f"{op}: num_batches must be a positive int, or None for all batches; got {number!r}. "
            "For example num_batches=100."
        )
    return count


def _called(op: str, subject: Subject, old: Any, batches: Batches) -> Collecting:
    """The layers that the first batch calls; nothing runs on a device."""
    args, kwargs = batches.first()
    hook = Collecting(op, training=False)
    compiled = Pass(op, lambda _, *rest: subject.run(hook, rest[0], {}, *rest[1:]), ())
    with naming(op, 0, (args, kwargs)):
        compiled.trace({}, subject.state, args, kwargs, batches.layout)
    missing = [path for path in hook.seen if path not in old]
    if missing:
        names = ", ".join("/".join(path) for path in old) or "none"
        raise ValueError(
            f"{op}: variables must hold the running statistics of every norm that is called; got "
            f"none of {'/'.join(missing[0])}, and statistics of: {names}. Pass the variables of "
            'this model, {"params": ..., "batch_stats": ...}.'
        )
    return hook


def _selected(op: str, selection: Selection, called: Collecting) -> list[Path]:
    names = {path: "/".join(path) or type(norm).__name__ for path, (norm, _) in called.seen.items()}
    candidates = [(names[path], norm) for path, (norm, _) in called.seen.items()]
    chosen = selection.among(op, "layers", candidates or called.others.items(), BATCH_NORMS)
    return [path for path, name in names.items() if name in chosen]


def _plan(op: str, run: Any, subject: Subject, seen: Any, norms: Any, old: Any, batches: Batches):
    args, kwargs = batches.first()

    def of_lists(values, arrays):
        state, args, kwargs = arrays
        moments = run(dict(zip(norms, values)), state, args, kwargs)
        return [moments[path] for path in norms]

    stacked = [math.prod(old[path][0].shape[: old[path][0].ndim - seen[path][1]]) for path in norms]
    values = [old[path] for path in norms]
    with naming(op, 0, (args, kwargs)):
        return stages(op, of_lists, norms, stacked, values, (subject.state, args, kwargs))


def _mixed(
    moments: Moments, unbiased: bool, old: Any, source_weight: float, examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """New mean and variance in float64; the old ones in channels without any element."""
    count, mean, m2 = moments
    var = m2 / np.maximum(count - 1 if unbiased else count, 1)
    share = source_weight / (source_weight + max(examples, 1))
    return tuple(  # type: ignore[return-value]
        np.where(count > 0, share * wide + (1 - share) * new, wide)
        for new, wide in zip((mean, var), map(_wide, old))
    )


def _wide(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _equal(before: Any, after: Any) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(before, after))


def _shift(path: Path, norm: Any, pooled: Moments, old: Any, new: Any) -> LayerShift:
    with in_float64():
        was, now = (
            Moments(jnp.ones(mean.shape), *(jnp.asarray(_wide(a)) for a in (mean, var)))
            for mean, var in (old, new)
        )
        divergence = np.asarray(jax.jit(normal_divergence)(now, was))
    count = int(np.max(pooled.count, initial=0))
    return LayerShift("/".join(path) or type(norm).__name__, count, divergence)
