"""Milliseconds of every normalization by itself: forward, training forward, forward and backward.

The training forward returns everything that the backward needs. Every peer is checked against the
float64 oracle before anything is timed. Bandwidth is the number of bytes that must be moved,
divided by the time, as a share of the bandwidth of a copy of the same array in the same rounds.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np

from benchmarks import peers as p
from benchmarks import pytorch, timing
from benchmarks.running import Plan, Unit
from benchmarks.shapes import QUICK, SHAPES, Shape
from jaxnorm.testing import rounding_units, sum_conditioning

FORWARD, TRAINING, BOTH = "forward", "training forward", "forward and backward"
# Arrays of x's size that must be read or written: x and y; with the backward x and y, then x, dy
# and dx. Statistics of slices and parameters are not counted.
MUST_MOVE = {FORWARD: 2, TRAINING: 2, BOTH: 5}
COPY = "copy"
COPY_MOVES = 2
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
FAR = "far from the running mean"


@dataclass(frozen=True)
class Case:
    """A normalization of an array, and the bias that puts the data at that offset."""

    norm: p.Norm
    model: str
    shape: tuple[int, ...]
    checked: tuple[int, ...]
    """A smaller batch, for the oracle."""
    offset: float = 0.0
    note: str = ""


def cases(backend: str, *, quick: bool = False) -> list[Case]:
    """Every norm on every shape that has it on that backend."""
    found = [c for shape in (QUICK if quick else SHAPES) for c in _cases_of(shape, backend)]
    order = ["batch", "layer", "rms", "group", "instance", "weight"]
    return sorted(found, key=lambda case: order.index(case.norm.name))


def _cases_of(shape: Shape, backend: str) -> Iterator[Case]:
    size = shape.on(backend)
    norms = {norm.name: norm for norm in (*p.norms(shape.groups), p.WEIGHT)}
    if size is None:
        return
    for name in shape.norms:
        yield Case(norms[name], shape.model, size, shape.checked)
        if name == "batch" and shape is SHAPES[0]:
            # The running mean is five deviations away, as in the first steps of training. In that
            # case jaxnorm measures the statistics a second time.
            yield Case(norms[name], shape.model, size, shape.checked, 5.0, FAR)


def peers(backend: str) -> tuple[p.Peer, ...]:
    """The peers that take part on a backend.

    Where kernels may be chosen, each implementation is a peer. Compiled PyTorch takes part only on
    a GPU.
    """
    names = ["jaxnorm", "flax", "jnp", "tokamax", "torch"]
    if backend != "cpu":
        names += [form.name for form in p.FORMS]
    if backend == "gpu":
        names.append("torch.compile")
    chosen = p.named(tuple(names))
    # A PyTorch without a GPU would be timed on another device.
    if backend != "cpu" and p.installed("torch") and pytorch.device() == "cpu":
        chosen = tuple(peer for peer in chosen if not isinstance(peer, p.Torch))
    return chosen


def plan(*, quick: bool = False) -> Plan:
    """The plan of the run.

    It takes about ten minutes on two cores; the quick form takes one small array and some seconds.
    """
    # PyTorch reads this when it is imported. Threads that spin at a barrier cost a scheduler's tick
    # (8 ms here) whenever another process has one of the cores. Sleeping threads are as fast if no
    # other process runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    kept = timing.keep_freed_memory()  # before the threads of a backend have heaps of their own
    backend = jax.default_backend()
    chosen = peers(backend)
    settings = {
        "peers": [*(peer.name for peer in chosen), COPY],
        "freed memory kept": kept,
        "columns": ["norm", "model", "shape", "note", "dtype", "pass", "round",
                    "milliseconds by peer, null where it has no such function"],
        "checked": "units of rounding of y and dx against the oracle, by peer, before timing, on "
        "the shape with the batch of a CPU",
        "arrays that must move": {**MUST_MOVE, COPY: COPY_MOVES},
        "page faults": "of the median sample, per iteration, by peer",
        "torch": {
            "threads": pytorch.threads(), "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
        },
    }  # fmt: skip
    effort = timing.QUICK if quick else timing.FULL
    units = [
        Unit(
            " ".join((case.norm.name, case.model, case.note, dtype)),
            functools.partial(_measured, case, dtype, chosen, effort),
        )
        for case in cases(backend, quick=quick)
        for dtype in DTYPES
    ]
    return Plan(settings, units)


def _measured(case: Case, dtype: str, chosen, effort: timing.Effort) -> dict[str, list]:
    where = [case.norm.name, case.model, list(case.shape), case.note, dtype]
    rows: dict[str, list] = {"checked": [], "samples": [], "page faults": []}
    rows["checked"].append([*where, checked(case, dtype, chosen)])
    having = [peer for peer in chosen if peer.has(case.norm)]
    copy = timing.copying(case.shape, DTYPES[dtype])
    inputs = inputs_of(case, case.shape, DTYPES[dtype])
    for name in MUST_MOVE:
        loops = [_loop(peer, case.norm, name, inputs) for peer in having]
        taken, faults = timing.interleaved([*loops, copy], effort)
        places = [having.index(peer) if peer in having else None for peer in chosen] + [-1]

        def placed(row: list, places=places) -> list:
            return [None if i is None else row[i] for i in places]

        rows["samples"] += [[*where, name, i, placed(row)] for i, row in enumerate(taken)]
        rows["page faults"].append([*where, name, placed(faults)])
    return rows


def inputs_of(case: Case, shape: tuple[int, ...], dtype) -> dict:
    rng = np.random.default_rng(0)
    features = shape[-1:]
    # Standard normal numbers in the shape of x; for activations around the offset.
    return {
        "x": rng.normal(case.offset, size=shape).astype(dtype),
        "scale": np.ones(features, np.float32),
        "bias": np.full(features, case.offset, np.float32),
        "dy": rng.normal(size=shape).astype(dtype),
    }


def checked(case: Case, dtype: str, chosen) -> list:
    """Units for each peer, None if it has no such function; raise if one is wrong."""
    inputs = inputs_of(case, case.checked, DTYPES[dtype])
    exact = case.norm.exact(**inputs)
    terms = int(np.prod([case.checked[a] for a in case.norm.axes(len(case.checked))]))
    found: list = []
    for peer in chosen:
        got = peer.run(case.norm, **inputs)
        if got is None:
            found.append(None)
            continue
        units = [
            rounding_units(got["y"], exact["y"], DTYPES[dtype]),
            rounding_units(got["dx"], exact["dx"], DTYPES[dtype], what="derivative"),
        ]
        ours = peer.name.startswith("jaxnorm")
        limit = 64 * sum_conditioning(terms) if ours else 1e4
        if not max(units) <= limit:
            raise ValueError(
                f"benchmarks: {peer.name} must compute {case.norm.name} norm of {case.checked}, "
                f"{dtype}, to {limit:.3g} units of rounding; got {units} for y and dx. Nothing is "
                "timed: mend it, or leave that peer out."
            )
        found.append([float(f"{u:.3g}") for u in units])
    return found


def _loop(peer: p.Peer, norm: p.Norm, name: str, inputs: dict) -> timing.Loop:
    if isinstance(peer, p.Torch):
        return _torch_loop(peer, norm, name, inputs)
    return jax_loop(peer, norm, name, inputs)


def jax_loop(peer: Any, norm: p.Norm, name: str, inputs: dict) -> timing.Loop:
    """A loop whose iterations feed each other.

    Each iteration normalizes the last one's `y`; its cotangent is the last one's `dx`.
    """
    function = peer.function(norm, inputs["x"].dtype)

    def forward(parameters, state):
        return function(parameters, *state)

    def training(parameters, state):
        y, back, new = jax.vjp(function, parameters, *state, has_aux=True)
        given = {id(a) for a in jax.tree.leaves((parameters, state))}
        # Its own inputs are kept for nothing.
        kept = {id(a): a for a in jax.tree.leaves(back) if id(a) not in given}
        return y, new, tuple(kept.values())

    def both(parameters, state):
        x, dy = state
        y, back, new = jax.vjp(function, parameters, x, has_aux=True)
        dparameters, dx = back(dy)
        return y, dx, dparameters, new

    step = {FORWARD: forward, TRAINING: training, BOTH: both}[name]
    parameters = p.parameters_of(norm, inputs["scale"], inputs["bias"])
    start = (inputs["x"], inputs["dy"]) if name == BOTH else (inputs["x"],)
    return timing.chained(step, parameters, start)


def _torch_loop(peer: p.Torch, norm: p.Norm, name: str, inputs: dict) -> timing.Loop:
    import torch

    function = peer.function(norm)
    start, gradient = (_to_torch(inputs[k]) for k in ("x", "dy"))
    scale, bias = (_to_torch(inputs[k]) for k in ("scale", "bias"))
    parameters = [scale, bias] if norm.has_bias else [scale]
    if name != FORWARD:
        for a in parameters:
            a.requires_grad_()

    def forward(count, _):
        x = start
        with torch.no_grad():
            for _ in range(count):
                x = function(x, scale, bias)
        pytorch.wait()

    def training(count, _):
        x = start
        for _ in range(count):
            x = function(x.detach().requires_grad_(), scale, bias)
        pytorch.wait()

    def both(count, _):
        x, dy = start, gradient
        for _ in range(count):
            x = x.detach().requires_grad_()
            y = function(x, scale, bias)
            dy, *_ = torch.autograd.grad(y, [x, *parameters], dy)
            x = y
        pytorch.wait()

    return timing.Loop({FORWARD: forward, TRAINING: training, BOTH: both}[name])


def _to_torch(a: np.ndarray):
    import torch

    return pytorch.to_torch(a, getattr(torch, a.dtype.name))
