"""Milliseconds of forward, and of forward and backward, in float32.

A fresh large buffer costs more than the arithmetic (page faults), so the process keeps the memory
that it has freed, JAX runs in a compiled loop that feeds its output back, and PyTorch in a loop
whose allocator finds the last iteration's buffers. Peers take turns; what is compared are ratios
within a turn.
"""

import ctypes
import os
import random
import resource
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import peers as p
from benchmarks.records import load_average, new_record
from jaxnorm.testing import rounding_units, sum_conditioning

ROUNDS = 15
SECONDS = 0.25  # of one sample
PAUSE = 0.02  # after a sample: threads of the last peer go to sleep


@dataclass(frozen=True)
class Case:
    """A normalization, a shape, and the bias that puts the data at that offset."""

    norm: p.Norm
    shape: tuple[int, ...]
    offset: float = 0.0
    note: str = ""


IMAGES = (32, 56, 56, 64)
ROWS = (8192, 768)
NORMS = {norm.name: norm for norm in p.norms(32)}
CASES = (
    Case(NORMS["layer"], ROWS),
    Case(NORMS["rms"], ROWS),
    Case(NORMS["batch"], IMAGES),
    # A running mean five deviations away, as in the first steps of training: jaxnorm then takes
    # the statistics again.
    Case(NORMS["batch"], IMAGES, 5.0, "far from the running mean"),
    Case(NORMS["group"], IMAGES),
)


def measure(command: str, *, quick: bool = False) -> dict:
    """The record of a run."""
    # Read when PyTorch is imported. Threads that spin at a barrier cost a scheduler's tick (8 ms
    # here) whenever another process has one of the cores; with sleeping ones it is as fast alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    names = ("jaxnorm", "flax", "flax two-pass", "torch")
    chosen = tuple(c for c in p.named(names) if c is not p.TORCH or p.has_torch())
    settings = {
        "peers": [c.name for c in chosen],
        "dtype": "float32",
        "freed memory kept": _keep_freed_memory(),
        "columns": ["norm", "shape", "note", "pass", "round", "milliseconds by peer"],
        "checked": "units of rounding of y and dx against the oracle, by peer, before timing",
        "page faults": "of the median sample, per iteration, by peer",
        "torch": {"threads": _torch_threads(), "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]},
    }
    record = new_record("time", command, settings)
    record["load_average"] = [load_average()]
    record["checked"], record["page_faults"], record["samples"] = [], [], []
    for case in (CASES[0],) if quick else CASES:
        if quick:
            case = Case(case.norm, (256, 768))
        where = [case.norm.name, list(case.shape), case.note]
        record["checked"].append([*where, _checked(case, chosen)])
        for backward in (False, True):
            rows, faults = _timed(case, chosen, backward, rounds=3 if quick else ROUNDS)
            name = "forward and backward" if backward else "forward"
            record["samples"] += [[*where, name, i, row] for i, row in enumerate(rows)]
            record["page_faults"].append([*where, name, faults])
    record["load_average"].append(load_average())
    return record


def _inputs(case: Case) -> dict:
    rng = np.random.default_rng(0)
    features = case.shape[-1:]
    return {
        "x": rng.normal(case.offset, size=case.shape).astype(np.float32),
        "scale": np.ones(features, np.float32),
        "bias": np.full(features, case.offset, np.float32),
        "dy": rng.normal(size=case.shape).astype(np.float32),
    }


def _checked(case: Case, chosen) -> list:
    """Units by peer; raises where one computes something else."""
    inputs = _inputs(case)
    exact = case.norm.exact(**inputs)
    terms = int(np.prod([case.shape[a] for a in case.norm.axes(len(case.shape))]))
    conditioning = sum_conditioning(terms)
    found = []
    for peer in chosen:
        got = peer.run(case.norm, **inputs)
        units = [
            rounding_units(got["y"], exact["y"], np.float32),
            rounding_units(got["dx"], exact["dx"], np.float32, what="derivative"),
        ]
        limit = 64 * conditioning if peer is p.JAXNORM else 1e4
        if max(units) > limit:
            raise ValueError(f"{peer.name} on {case}: {units} units; nothing is timed.")
        found.append([float(f"{u:.3g}") for u in units])
    return found


def _timed(case: Case, chosen, backward: bool, *, rounds: int):
    """Milliseconds of one iteration, [round][peer], and page faults of the median sample."""
    inputs = _inputs(case)
    loops = [
        (_torch_loop if c is p.TORCH else _jax_loop)(c, case, backward, inputs) for c in chosen
    ]
    for _ in range(3):  # compiles, and lets the heap grow to its size
        for loop in loops:
            loop(2)
    seconds = [_seconds(loop, 2)[0] for loop in loops]
    counts = [max(2, round(SECONDS / s)) for s in seconds]
    order = random.Random(0)
    rows, faults = [], []
    for _ in range(rounds):
        row, fault = [0.0] * len(loops), [0.0] * len(loops)
        for i in order.sample(range(len(loops)), len(loops)):
            row[i], fault[i] = _seconds(loops[i], counts[i])
            time.sleep(PAUSE)
        rows.append([float(f"{1e3 * s:.4g}") for s in row])
        faults.append(fault)
    return rows, [round(float(f), 1) for f in np.median(faults, axis=0)]


def _seconds(loop, count: int) -> tuple[float, float]:
    """Seconds and page faults of one iteration."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    loop(count)
    seconds = time.perf_counter() - start
    return seconds / count, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count


def _jax_loop(peer: p.Linen, case: Case, backward: bool, inputs: dict):
    """Each iteration normalizes the last one's `y`; its cotangent is the last one's `dx`."""
    function = peer.function(case.norm, jnp.float32)

    @jax.jit
    def loop(count, parameters, x, dy):
        def forward(_, carry):
            x, _ = carry
            # The state is carried, so that the update of the statistics is not dead code.
            return function(parameters, x)

        def both(_, carry):
            x, dy, *_ = carry
            y, back, state = jax.vjp(function, parameters, x, has_aux=True)
            dparameters, dx = back(dy)
            return y, dx, dparameters, state

        _, state = jax.eval_shape(function, parameters, x)
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
        if not backward:
            return lax.fori_loop(0, count, forward, (x, state))
        return lax.fori_loop(
            0, count, both, (x, dy, jax.tree.map(jnp.zeros_like, parameters), state)
        )

    parameters = jax.device_put(p.parameters_of(case.norm, inputs["scale"], inputs["bias"]))
    x, dy = jax.device_put((inputs["x"], inputs["dy"]))
    return lambda count: jax.block_until_ready(loop(count, parameters, x, dy))


def _torch_loop(peer: p.Torch, case: Case, backward: bool, inputs: dict):
    import torch

    function = peer.function(case.norm)
    start, scale, bias, gradient = (
        p.to_torch(inputs[k], torch.float32) for k in ("x", "scale", "bias", "dy")
    )
    parameters = [scale, bias] if case.norm.has_bias else [scale]

    def forward(count):
        x = start
        with torch.no_grad():
            for _ in range(count):
                x = function(x, scale, bias)

    def both(count):
        x, dy = start, gradient
        for a in parameters:
            a.requires_grad_()
        for _ in range(count):
            x = x.detach().requires_grad_()
            y = function(x, scale, bias)
            dy, *_ = torch.autograd.grad(y, [x, *parameters], dy)
            x = y

    return both if backward else forward


def _keep_freed_memory() -> bool:
    """Ask glibc to serve large arrays from a heap that it never gives back; False elsewhere."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    return all(
        mallopt(option, value)
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1))
    )


def _torch_threads() -> int | None:
    if not p.has_torch():
        return None
    import torch

    return torch.get_num_threads()
