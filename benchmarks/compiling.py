"""Seconds to trace and to compile `jit(grad)` of a network with eight normalization layers."""

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import peers as p
from benchmarks.running import Plan, Unit

LAYERS = 8
REPEATS = 15
# Networks and their inputs. For large arrays jaxnorm compiles more, to run faster.
SMALL = {"MLP": (32, 64), "convolutions": (8, 16, 16, 3)}
LARGE = {"MLP, large": (4096, 64), "convolutions, large": (32, 32, 32, 3)}
CASES = [
    (name, network)
    for networks in (SMALL, LARGE)
    for network in networks
    for name in (("layer", "rms") if network.startswith("MLP") else ("batch", "group"))
]
NO_NORM = "no norm"
PEERS = (p.JAXNORM, p.FLAX)


class Network(nn.Module):
    """A network that repeats dense layer or convolution, normalization and relu `LAYERS` times.

    Its output is the mean square.
    """

    make_norm: Callable[[], Any]
    convolutional: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = nn.Conv(16, (3, 3))(x) if self.convolutional else nn.Dense(64)(x)
            x = nn.relu(self.make_norm()(x))
        return jnp.mean(jnp.square(x))


def plan(*, quick: bool = False) -> Plan:
    """The plan of the run.

    It takes some minutes; the quick form takes one network twice.
    """
    repeats = 2 if quick else REPEATS
    settings = {
        "peers": [*(peer.name for peer in PEERS), NO_NORM],
        "layers": LAYERS,
        "columns": ["norm", "network", "repeat", "by peer [trace and lower, compile] in seconds"],
        "caches": "cleared before every sample; no persistent cache; peers in random order",
    }
    units = [
        Unit(f"{name} {network}", functools.partial(_rows, name, network, repeats))
        for name, network in (CASES[:1] if quick else CASES)
    ]
    return Plan(settings, units)


def _rows(name: str, network: str, repeats: int) -> dict[str, list]:
    norm = next(norm for norm in p.norms(8) if norm.name == name)
    shape = {**SMALL, **LARGE}[network]
    runs = [_stage(peer, norm, shape) for peer in (*PEERS, None)]
    order, samples = random.Random(0), []
    for repeat in range(-1, repeats):  # the first result is dropped, because that run loads modules
        found = {i: runs[i]() for i in order.sample(range(len(runs)), len(runs))}
        if repeat >= 0:
            samples.append([name, network, repeat, [found[i] for i in range(len(runs))]])
    return {"samples": samples}


def _stage(peer: p.Linen | None, norm: p.Norm, shape: tuple[int, ...]):
    """A function that traces and compiles once, without caches, and returns the seconds of both."""

    def make():
        return (lambda x: x) if peer is None else peer.layer(norm, None)

    network = Network(make, convolutional=len(shape) == 4)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    stats = variables.get("batch_stats", {})

    def run():
        jax.clear_caches()

        def loss(parameters, x, stats):
            variables = {"params": parameters, "batch_stats": stats}
            return network.apply(variables, x, mutable=["batch_stats"])

        start = time.perf_counter()
        lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(variables["params"], x, stats)
        traced = time.perf_counter()
        lowered.compile()
        return [round(traced - start, 4), round(time.perf_counter() - traced, 4)]

    return run
