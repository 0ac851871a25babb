"""Interleaved measurements of loops in which nothing but the measured function runs.

A fresh large buffer costs more than the arithmetic (page faults), so the process keeps the memory
that it has freed. A compiled loop would be no better: XLA copies the carry of such a loop if it
does not see that nobody reads the old value. Instead a few iterations are compiled in a row. Each
feeds the next, and all their results are returned. In each round every peer runs once, and ratios
are compared within a round.
"""

import ctypes
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

try:
    import resource
except ImportError:  # a system without POSIX resource limits
    resource = None

CHAIN, DEVICE_CHAIN = 2, 8
PAUSE = 0.02  # seconds after a measurement, in which threads of the last peer fall asleep


@dataclass(frozen=True)
class Loop:
    """A function that runs many iterations."""

    run: Callable[[int, Any], Any]
    """Of a number of iterations and what `fresh` made; returns when they are done."""
    fresh: Callable[[], Any] = lambda: None
    """What a sample begins with; it is not timed."""
    length: int = 1
    """The number of iterations is a multiple of it."""


@dataclass(frozen=True)
class Effort:
    """The number of rounds and the time of a measurement."""

    rounds: int
    seconds: float
    """Of one sample."""


FULL, QUICK = Effort(7, 0.08), Effort(3, 0.005)


def interleaved(loops: Sequence[Loop], effort: Effort) -> tuple[list[list[float]], list[float]]:
    """Milliseconds of one iteration, [round][loop], and page faults of the median measurement."""
    for _ in range(2):  # compile, and let the heap grow to its size
        for loop in loops:
            loop.run(loop.length, loop.fresh())
    counts = [
        loop.length * max(1, round(effort.seconds / _seconds(loop, loop.length)[0] / loop.length))
        for loop in loops
    ]
    order = random.Random(0)
    rows, faults = [], []
    for _ in range(effort.rounds):
        row, fault = [0.0] * len(loops), [0.0] * len(loops)
        for i in order.sample(range(len(loops)), len(loops)):
            row[i], fault[i] = _seconds(loops[i], counts[i])
            time.sleep(PAUSE)
        rows.append([float(f"{1e3 * s:.4g}") for s in row])
        faults.append(fault)
    return rows, [round(statistics.median(column), 1) for column in zip(*faults)]


def _seconds(loop: Loop, count: int) -> tuple[float, float]:
    """Seconds and page faults of one iteration."""
    state = loop.fresh()
    before, start = _page_faults(), time.perf_counter()
    loop.run(count, state)
    seconds = time.perf_counter() - start
    return seconds / count, (_page_faults() - before) / count


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def chained(step: Callable, fixed, start: tuple) -> Loop:
    """A loop of ``(*start, *rest) = step(fixed, start)``; the rest is computed and kept."""
    cpu = jax.default_backend() == "cpu"
    # If the host only enqueues work, it must be ahead of the device.
    length = CHAIN if cpu else DEVICE_CHAIN

    @jax.jit
    def chain(fixed, state):
        outputs = []
        for _ in range(length):
            # Without the barrier one iteration would be fused with the next.
            outputs.append(lax.optimization_barrier(tuple(step(fixed, state))))
            state = outputs[-1][: len(start)]
        return outputs

    def run(count, state):
        for _ in range(-(-count // length)):
            outputs = chain(fixed, state)
            state = outputs[-1][: len(start)]
            if cpu:  # many steps at once would take memory and compete for cores
                jax.block_until_ready(outputs)
        jax.block_until_ready(state)

    fixed, start = jax.device_put((fixed, start))
    return Loop(run, lambda: start, length)


def updating(step: Callable, fixed, carry) -> Loop:
    """A compiled loop of ``carry = step(fixed, carry)`` whose carry is updated in place."""

    @functools.partial(jax.jit, donate_argnums=2)
    def loop(count, fixed, carry):
        return lax.fori_loop(0, count, lambda _, c: step(fixed, c), carry)

    fixed, carry = jax.device_put((fixed, carry))
    return Loop(
        lambda count, state: jax.block_until_ready(loop(count, fixed, state)),
        lambda: jax.block_until_ready(jax.tree.map(jnp.copy, carry)),
    )


def copying(shape: tuple[int, ...], dtype) -> Loop:
    """A loop that reads as many bytes as such an array has, and writes as many."""
    integers = jnp.zeros(shape, f"uint{8 * jnp.dtype(dtype).itemsize}")
    return chained(lambda _, state: (state[0] ^ 1,), (), (integers,))


def keep_freed_memory() -> bool:
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
