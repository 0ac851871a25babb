"""Time of a normalization against its rows and against its features, and the fitted exponents.

Milliseconds of forward and backward, float32, on this machine's backend. An operation that is
limited by memory grows as the number of elements does, with an exponent of one. Exponents are
fitted by least squares on logarithms.
"""

import functools
from collections.abc import Iterable

import jax
import numpy as np

from benchmarks import ops, timing
from benchmarks import peers as p
from benchmarks.running import Unit

PEERS = (p.JAXNORM, p.FLAX)
COLUMNS = {
    "growth": ["norm", "against", "rows", "features", "round", "milliseconds by peer"],
}
NORMS = ("batch", "layer", "rms", "group")
GROUPS = 32
POSITIONS = 64  # positions of an example, if it has spatial axes


def settings() -> dict:
    """The settings that a record holds."""
    return {
        "peers": [peer.name for peer in PEERS],
        "growth": "forward and backward, float32, on the default backend; group norm of examples "
        f"of {POSITIONS} rows",
        "freed memory kept": timing.keep_freed_memory(),
    }


def sizes(backend: str, *, quick: bool = False) -> dict[str, list[tuple[int, int]]]:
    """(rows, features): one of the two grows, up to sizes where starting takes no visible time."""
    if quick:
        return {"rows": [(64, 64), (128, 64)]}
    factor = 1 if backend == "cpu" else 16
    return {
        "rows": [(factor * 2**n, 512) for n in range(10, 15)],
        "features": [(factor * 1024, 2**n) for n in range(8, 13)],
    }


def units(*, quick: bool = False) -> list[Unit]:
    """Units of work, one for each norm and each size that grows."""
    return [
        Unit(
            f"{name} against {against}",
            functools.partial(_timed, name, against, pairs, timing.QUICK if quick else timing.FULL),
        )
        for against, pairs in sizes(jax.default_backend(), quick=quick).items()
        for name in (NORMS[1:2] if quick else NORMS)
    ]


def _timed(name: str, against: str, pairs: list, effort: timing.Effort) -> dict[str, list]:
    norm = next(n for n in p.norms(GROUPS) if n.name == name)
    rng = np.random.default_rng(0)
    found = []
    for rows, features in pairs:
        shape = (rows // POSITIONS, POSITIONS, features) if norm.groups else (rows, features)
        inputs = {
            **{k: rng.normal(size=shape).astype(np.float32) for k in ("x", "dy")},
            "scale": np.ones(features, np.float32),
            "bias": np.zeros(features, np.float32),
        }
        loops = [ops.jax_loop(peer, norm, ops.BOTH, inputs) for peer in PEERS]
        taken, _ = timing.interleaved(loops, effort)
        found += [[name, against, rows, features, i, row] for i, row in enumerate(taken)]
    return {"growth": found}


def exponent(sizes: Iterable[float], times: Iterable[float]) -> float:
    """The slope of log time over log size, by least squares."""
    x, y = (np.log(np.asarray(list(a), np.float64)) for a in (sizes, times))
    if len(np.unique(x)) < 2:
        raise ValueError(
            f"benchmarks: an exponent is fitted to times of two sizes at least; got {np.exp(x)}. "
            "Measure more of them."
        )
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
