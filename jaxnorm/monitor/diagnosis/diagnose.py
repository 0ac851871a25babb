"""The diagnosis of a recording, or of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from jaxnorm.models.select import Layers
from jaxnorm.models.trace import on_arrays
from jaxnorm.monitor.diagnosis.evidence import Evidence
from jaxnorm.monitor.diagnosis.findings import SEVERITIES, Findings
from jaxnorm.monitor.diagnosis.rules import RULES
from jaxnorm.monitor.probe.attach import attach
from jaxnorm.monitor.probe.observations import Observations
from jaxnorm.monitor.probe.observe import observe
from jaxnorm.monitor.samples.recording import Recording


def diagnose(seen: Any, *args: Any, layers: Layers | None = None, **kwargs: Any) -> Findings:
    """Find what is wrong with a run, or with a model on a batch.

    Args:
        seen: a `Recording`; or a model, a `flax.linen.Module` or `flax.nnx.Module`, which is run
            once and not changed.
        args: for a Linen module its variables and the batch, for an NNX module the batch; nothing
            for a recording.
        layers: of a model, as in `Monitor`.
        kwargs: of the model's call, such as ``train=True``: they decide whether the model is
            observed as it trains, or as it serves.

    Returns:
        `Findings`, the gravest first; empty where nothing is wrong. Only a recording shows defects
        that take several steps, or gradients, to be found.

    Raises:
        TypeError: `seen` is none of these, or a recording comes with more arguments.
        ValueError: the recording has no sample, or the model has nothing to observe.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxnorm.monitor import diagnose
        >>> model = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False), nn.relu])
        >>> x = jax.random.normal(jax.random.key(0), (4, 3))
        >>> [finding.rule for finding in diagnose(model, model.init(jax.random.key(1), x), x)]
        ['small-batch', 'idle-bias']
    """
    op = "diagnose"
    if isinstance(seen, Recording):
        if args or kwargs or layers is not None:
            raise TypeError(
                f"{op}: a recording comes alone; got {len(args) + len(kwargs)} more arguments. "
                "Call diagnose(recording), or diagnose(model, ...)."
            )
        if not len(seen):
            raise ValueError(
                f"{op}: a recording must have a sample; got '{seen.folder}' without any. Train "
                "some steps, and call append."
            )
        evidence = Evidence.of_recording(seen)
    elif isinstance(seen, linen.Module):
        evidence = Evidence.of_observations(_observe_linen(op, seen, layers, args, kwargs))
    elif isinstance(seen, nnx.Module):
        evidence = Evidence.of_observations(_observe_nnx(seen, layers, args, kwargs))
    else:
        raise TypeError(
            f"{op}: the first argument must be a Recording, a flax.linen.Module or a "
            f"flax.nnx.Module; got {type(seen).__name__}. For a folder: "
            "diagnose(Recording(folder))."
        )
    with np.errstate(all="ignore"):  # numbers that are not finite are evidence, too
        found = [finding for rule in RULES for finding in rule(evidence)]
    return Findings(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _observe_linen(
    op: str, module: linen.Module, layers: Any, args: Any, kwargs: Any
) -> Observations:
    variables, *inputs = args or (None,)
    if not isinstance(variables, Mapping) or not (inputs or kwargs):
        given = ", ".join(type(arg).__name__ for arg in args) or "neither"
        raise TypeError(
            f"{op}: a Linen module comes with its variables and a batch; got {given}. Call "
            "diagnose(model, variables, batch)."
        )
    model = attach(module, layers)

    def run(variables: Any, inputs: Any) -> Any:
        kept = [name for name in variables if name != "params"]
        return model.apply(variables, *inputs, mutable=kept, **kwargs)

    return _observed(run, variables, inputs)


def _observe_nnx(module: nnx.Module, layers: Any, args: Any, kwargs: Any) -> Observations:
    graph, state = nnx.split(module)

    def run(state: Any, args: Any, kwargs: Any) -> Any:
        # A copy, whose statistics may be updated.
        return attach(nnx.merge(graph, state), layers)(*args, **kwargs)

    return _observed(run, state, args, kwargs)


def _observed(function: Callable[..., Any], *args: Any) -> Observations:
    """The compiled observation of one run of a model."""
    run, arrays = on_arrays(lambda *args: observe(function)(*args)[1], args, {})
    return jax.jit(run)(arrays)
