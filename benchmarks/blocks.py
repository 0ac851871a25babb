"""Milliseconds of whole train steps around each norm: the cost of a norm inside a network.

The networks differ in their norm only: jaxnorm's, Flax's, or none. A step is forward, backward, new
statistics and SGD with momentum. The gradients of the libraries are compared before anything is
timed. This is done in float32 and with a smooth activation, because at the kink of relu the last
bit decides.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models, timing
from benchmarks import peers as p
from benchmarks.running import Plan, Unit

NONE = "no norm"
GROUPS = 32


@dataclass(frozen=True)
class Case:
    """A network of blocks, its input, and the norms it is measured with."""

    network: str
    model: Callable[..., nn.Module]
    shape: tuple[int, ...]
    cpu: tuple[int, ...]
    norms: tuple[str, ...]
    groups: int = GROUPS
    smooth: Callable[..., nn.Module] | None = None
    """The same without kinks, None where it has none."""


CASES = (
    Case("pre-norm transformer", models.TransformerBlocks, (8, 2048, 1024), (2, 256, 256),
         ("layer", "rms")),
    Case("ResNet bottleneck", models.Bottlenecks, (256, 28, 28, 512), (4, 28, 28, 256),
         ("batch", "group"), smooth=functools.partial(models.Bottlenecks, activation=nn.gelu)),
    Case("U-Net", models.UNet, (64, 64, 64, 4), (2, 32, 32, 4), ("group",)),
)  # fmt: skip
QUICK = (
    Case("small transformer", models.TransformerBlocks, (2, 16, 64), (2, 16, 64), ("layer",)),
    Case("small U-Net", functools.partial(models.UNet, width=8), (2, 8, 8, 4), (2, 8, 8, 4),
         ("group",), 4),
)  # fmt: skip
FULL_EFFORT = timing.Effort(9, 0.4)
# How far the gradients of two right implementations may differ, relative to the largest gradient,
# in units of rounding times the number of layers between.
DIFFERENCE = 256


def plan(*, quick: bool = False) -> Plan:
    """The plan of the run.

    It takes some minutes; the quick form takes small networks and some seconds.
    """
    kept = timing.keep_freed_memory()  # before the threads of a backend have heaps of their own
    backend = jax.default_backend()
    dtype = jnp.float32 if backend == "cpu" else models.DTYPE
    forms = () if backend == "cpu" else p.FORMS
    chosen = (p.JAXNORM, *forms, p.FLAX)
    settings = {
        "peers": [*(peer.name for peer in chosen), NONE],
        "activations": jnp.dtype(dtype).name,
        "parameters": "float32",
        "step": "forward, backward, statistics, SGD with momentum; the state updated in place",
        "freed memory kept": kept,
        "columns": ["network", "norm", "shape", "round", "milliseconds by peer"],
        "checked": "largest difference of a gradient from Flax's / its largest element, by peer",
    }
    effort = timing.QUICK if quick else FULL_EFFORT
    return Plan(
        settings,
        [
            Unit(
                f"{case.network} {name}",
                functools.partial(_measured, case, name, chosen, backend, dtype, effort),
            )
            for case in (QUICK if quick else CASES)
            for name in case.norms
        ],
    )


def _measured(case: Case, name: str, chosen, backend: str, dtype, effort) -> dict[str, list]:
    shape = case.cpu if backend == "cpu" else case.shape
    where = [case.network, name, list(shape)]
    norm = next(n for n in p.norms(case.groups) if n.name == name)
    smooth = replace(case, model=case.smooth or case.model)
    differences = compare(
        where, [Step(smooth, peer, norm, shape, jnp.float32) for peer in chosen], chosen
    )
    steps = [Step(case, peer, norm, shape, dtype) for peer in (*chosen, None)]
    rows, _ = timing.interleaved([step.loop() for step in steps], effort)
    return {
        "checked": [[*where, differences]],
        "samples": [[*where, i, row] for i, row in enumerate(rows)],
    }


class Step:
    """The training step of a network with a peer's norm, or with no norm."""

    def __init__(self, case: Case, peer, norm: p.Norm, shape: tuple[int, ...], dtype):
        def layer():
            return models.NoNorm() if peer is None else peer.layer(norm, dtype)

        self.network: Any = case.model(layer, dtype=dtype)
        self.x = np.random.default_rng(0).normal(size=shape).astype(dtype)
        self.optimizer = optax.sgd(1e-3, momentum=0.9)

    @functools.cached_property
    def start(self) -> tuple:
        """Parameters, and the variables that are no parameters; they are equal for every peer."""
        shapes = jax.eval_shape(self.network.init, jax.random.key(0), self.x)
        variables = dict(jax.tree_util.tree_map_with_path(_initial, shapes))
        return variables.pop("params"), variables

    def gradient(self, parameters, variables, x) -> tuple:
        """Gradients, and the variables after the step."""

        def loss(parameters):
            y, new = self.network.apply(
                {"params": parameters, **variables}, x, mutable=["batch_stats"]
            )
            return models.mean_squared_error(y, x), new

        return jax.grad(loss, has_aux=True)(parameters)

    def loop(self) -> timing.Loop:
        """Steps one after another, always on the same batch."""

        def step(x, state):
            parameters, optimized, variables = state
            gradient, variables = self.gradient(parameters, variables, x)
            updates, optimized = self.optimizer.update(gradient, optimized, parameters)
            return optax.apply_updates(parameters, updates), optimized, variables

        parameters, variables = self.start
        state = (parameters, self.optimizer.init(parameters), variables)
        return timing.updating(step, self.x, state)


def _initial(path: tuple, a: jax.ShapeDtypeStruct) -> np.ndarray:
    """The initial value of a variable, chosen by its name.

    It is drawn here, because initializers take long to compile.
    """
    name = jax.tree_util.keystr(path)
    if "kernel" in name:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return (rng.normal(size=a.shape) / np.sqrt(np.prod(a.shape[:-1]))).astype(a.dtype)
    return np.full(a.shape, "scale" in name or "var" in name, a.dtype)


def compare(where: list, steps: list[Step], chosen) -> list[float]:
    """Differences from Flax's gradients; raise if a peer computes something else."""
    found = {}
    for peer, step in zip(chosen, steps):
        parameters, variables = step.start
        gradient = jax.jit(step.gradient)(parameters, variables, step.x)[0]
        found[peer.name] = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient)]
    differences = []
    for peer in chosen:
        pairs = zip(found[peer.name], found[p.FLAX.name], strict=True)
        largest = max(float(np.abs(theirs).max()) for theirs in found[p.FLAX.name])
        worst = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs) / largest
        if not worst <= DIFFERENCE * float(jnp.finfo(jnp.float32).eps):
            raise ValueError(
                f"benchmarks: {peer.name} must find Flax's gradients in {where}; got a difference "
                f"of {worst:.3g} of the largest. Nothing is timed: mend it."
            )
        differences.append(float(f"{worst:.3g}"))
    return differences
