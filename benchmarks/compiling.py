"""Seconds to trace and to compile `jit(grad)` of a network with eight normalization layers."""

import random
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import peers as p
from benchmarks.records import load_average, new_record

LAYERS = 8
REPEATS = 15
CASES = (("layer", "MLP"), ("rms", "MLP"), ("batch", "convolutions"), ("group", "convolutions"))
NO_NORM = "no norm"


class Network(nn.Module):
    """`LAYERS` times dense layer or convolution, normalization, relu; then the mean square."""

    make_norm: object
    convolutional: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = nn.Conv(16, (3, 3))(x) if self.convolutional else nn.Dense(64)(x)
            x = nn.relu(self.make_norm()(x))
        return jnp.mean(jnp.square(x))


def measure(command: str, *, quick: bool = False) -> dict:
    """The record of a run."""
    repeats = 2 if quick else REPEATS
    makers = {peer.name: peer for peer in (p.JAXNORM, p.FLAX)}
    settings = {
        "peers": [*makers, NO_NORM],
        "layers": LAYERS,
        "columns": ["norm", "network", "repeat", "by peer [trace and lower, compile] in seconds"],
        "caches": "cleared before every sample; no persistent cache; peers in random order",
    }
    record = new_record("compile", command, settings)
    record["load_average"] = [load_average()]
    norms = {norm.name: norm for norm in p.norms(8)}
    order = random.Random(0)
    samples = []
    for name, network in CASES[:1] if quick else CASES:
        runs = {
            peer: _stage(makers.get(peer), norms[name], convolutional=network == "convolutions")
            for peer in settings["peers"]
        }
        for repeat in range(-1, repeats):  # the first is thrown away: it loads modules
            names = list(runs)
            order.shuffle(names)
            found = {peer: runs[peer]() for peer in names}
            if repeat >= 0:
                samples.append([name, network, repeat, [found[peer] for peer in runs]])
    record["samples"] = samples
    record["load_average"].append(load_average())
    return record


def _stage(peer: p.Linen | None, norm: p.Norm, *, convolutional: bool):
    """A function that traces and compiles once, from nothing, and returns the seconds of both."""

    def make():
        return (lambda x: x) if peer is None else peer.layer(norm, None)

    network = Network(make, convolutional)
    x = jax.ShapeDtypeStruct((8, 16, 16, 3) if convolutional else (32, 64), jnp.float32)
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
