"""The cost of a monitor: milliseconds of a training step with a monitor and without.

The convolutional net is that of the demo, as a single run and as the sweep over seeds and rates
that the demo trains. Steps with and without a monitor are timed in alternating rounds. A
measurement is a number of steps, of which the monitor samples its share.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models, timing
from benchmarks.running import Plan, Unit
from jaxnorm import training
from jaxnorm.lab.networks import build_network
from jaxnorm.lab.study import StudyConfig
from jaxnorm.monitor import Monitor

EVERY = (64, 1)
PEERS = ("no monitor", *(f"every {k}" for k in EVERY))
EFFORT = timing.Effort(15, 0.5)
CONV, SWEEP, TRANSFORMER = "convolutions", "convolutions, sweep", "transformer"


def plan(*, quick: bool = False) -> Plan:
    """The plan of the run.

    It takes some minutes, most of them for compilation; the quick form takes the single net.
    """
    settings = {
        "peers": list(PEERS),
        "columns": ["network", "input", "round", "milliseconds of a step by peer"],
        "sample": f"a multiple of {max(EVERY)} steps, from the same state",
        "freed memory kept": timing.keep_freed_memory(),
    }
    effort = timing.QUICK if quick else EFFORT
    names = (CONV,) if quick else (CONV, SWEEP, TRANSFORMER)
    return Plan(settings, [Unit(n, functools.partial(_rows, n, effort)) for n in names])


def _rows(name: str, effort: timing.Effort) -> dict[str, list]:
    make, batch = _network(name)
    monitors = (None, *(Monitor(every=k) for k in EVERY))
    loops = [_loop(*make(monitor), batch) for monitor in monitors]
    taken, _ = timing.interleaved(loops, effort)
    size = list(batch["x"].shape)
    return {"samples": [[name, size, i, row] for i, row in enumerate(taken)]}


def _network(name: str) -> tuple[Callable[[Monitor | None], Any], dict[str, jax.Array]]:
    """A function from a monitor to a step and its first state; and the batch."""
    rng = np.random.default_rng(0)
    plan = next(plan for plan in StudyConfig().plans if plan.network == "conv")
    if name == TRANSFORMER:
        model: nn.Module = models.TransformerBlocks(nn.LayerNorm, 3, 4, jnp.float32)
        x, y = rng.normal(size=(16, 64, 128)), rng.normal(size=(16, 64, 128))
    else:
        model = build_network("conv", "batch", 10)
        x, y = rng.normal(size=(plan.batch_size, 8, 8, 1)), rng.integers(10, size=plan.batch_size)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}

    def loss(outputs: Any, batch: Any) -> Any:
        if name == TRANSFORMER:
            return jnp.mean(jnp.square(outputs - batch["y"]))
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()

    def single(monitor: Monitor | None) -> Any:
        optimizer = optax.adam(1e-3) if name == TRANSFORMER else optax.sgd(0.1)
        state = training.create_train_state(model, optimizer, 0, batch["x"][:2])
        return training.make_train_step(model, optimizer, loss, monitor=monitor), state

    def swept(monitor: Monitor | None) -> Any:
        seeds = range(StudyConfig().seeds)
        members, rates = training.grid(seeds, learning_rate=plan.learning_rates)
        state = training.create_sweep_state(model, optax.sgd, members, rates, batch["x"][:2])
        return training.make_sweep_step(model, optax.sgd, loss, monitor=monitor), state

    return swept if name == SWEEP else single, batch


def _loop(step: Callable, state: Any, batch: Any) -> timing.Loop:
    # The first step adds the buffer to the state.
    start, _ = step(jax.tree.map(jnp.copy, state), batch)

    def fresh() -> Any:
        # Begin at step 0, so that every measurement has the same number of sampled steps.
        copy = jax.tree.map(jnp.copy, start)
        return jax.block_until_ready(copy.replace(step=jnp.zeros_like(copy.step)))

    def run(count: int, state: Any) -> None:
        for _ in range(count):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    return timing.Loop(run, fresh, max(EVERY))
