"""The one place that decides which implementation runs, and why.

`evidence.json` holds what whole blocks of networks cost with each implementation, as the benchmark
measured it; a kernel is chosen where a block is better off with it, not because it exists.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from jaxtyping import Array

from jaxnorm.core import layer
from jaxnorm.core.epilogue import along
from jaxnorm.kernels.held import Norm
from jaxnorm.kernels.meshes import everywhere
from jaxnorm.kernels.platforms import KERNELS
from jaxnorm.kernels.refusals import anywhere, on

_seen: ContextVar[list["Decision"] | None] = ContextVar("jaxnorm_decisions", default=None)
_interpreted: ContextVar[str | None] = ContextVar("jaxnorm_interpreted", default=None)


@dataclass(frozen=True)
class Decision:
    """The implementation chosen for one call, and why."""

    norm: Norm
    shape: tuple[int, ...]
    dtype: str
    asked: str | None
    """The argument `implementation`."""
    refused: str | None
    """Why no platform has a kernel for this call; None where one may have."""
    refusal: Callable[[str], str | None] = field(compare=False, repr=False)
    """Why a platform has none."""

    def on(self, platform: str) -> tuple[str, str]:
        """Implementation and reason on a platform: "cpu", "cuda", "rocm" or "tpu"."""
        if self.asked not in (None, "pallas"):
            return self.asked, f"asked for by implementation={self.asked!r}"
        asked = self.asked is not None
        name, reason = _ASKED if asked else _best(self.norm.operation, platform)
        refused = self.refused if platform in KERNELS else f"none is written for {platform}"
        if refused is None and name == "pallas":
            refused = self.refusal(platform)
        if refused is None:
            return name, reason
        return "error" if asked else "xla", f"no kernel: {refused}"


_ASKED = "pallas", "asked for by implementation='pallas'"


def _best(operation: str, platform: str) -> tuple[str, str]:
    rows = [r for r in evidence() if (r["operation"], r["platform"]) == (operation, platform)]
    if not rows:
        return "xla", f"no block with {operation} was measured on {platform}"
    (row,) = rows
    name = "pallas" if row["pallas"] < row["xla"] else "xla"
    return name, "{measure}, {block}: xla {xla:g}, pallas {pallas:g}".format(**row)


@cache
def evidence() -> list[dict[str, Any]]:
    """Rows of the table: for an operation and a platform, what a block costs with each."""
    return json.loads(resources.files("jaxnorm.kernels").joinpath("evidence.json").read_text())


def per_slice(
    operation: str,
    implementation: str | None,
    x: Array,
    scale: Array | None,
    bias: Array | None,
    *,
    residual: Array | None = None,
    **options,
) -> Any:
    """`core.layer.per_slice`, or with a residual `add_per_slice`, by what is chosen.

    Raises:
        ValueError: a kernel is asked for, and there is none for this call.
    """
    parameters = tuple(along(p, options["feature_axes"], x.ndim) for p in (scale, bias))
    norm = Norm(operation, options["measurement"], options["epilogue"])
    refused = anywhere(norm, x, parameters, options["mask"], options["save"])
    refusal = cache(lambda platform: on(platform, norm, x, parameters))
    decision = Decision(norm, x.shape, x.dtype.name, implementation, refused, refusal)
    if (seen := _seen.get()) is not None:
        seen.append(decision)
    kernels = tuple(p for p in KERNELS if decision.on(p)[0] == "pallas")
    insists = implementation == "pallas"
    if insists and not kernels:
        reasons = [refused] if refused else [f"{p}: {refusal(p)}" for p in KERNELS]
        raise ValueError(
            f"{operation}: implementation='pallas' has no kernel for this call, since "
            f"{'; '.join(map(str, reasons))}; got x.shape={x.shape}, x.dtype={x.dtype}. "
            "Leave implementation=None."
        )
    if kernels:
        norm = replace(norm, kernels=kernels, insists=insists, interpreted=_interpreted.get())
        results = everywhere(norm, x, residual, *parameters)
        return results if residual is not None else results[0]
    if residual is None:
        return layer.per_slice(x, *parameters, **options)
    return layer.add_per_slice(x, residual, *parameters, **options)


@contextmanager
def recorded() -> Iterator[list[Decision]]:
    """All decisions that are taken inside."""
    decisions: list[Decision] = []
    token = _seen.set(decisions)
    try:
        yield decisions
    finally:
        _seen.reset(token)


@contextmanager
def interpreted(platform: str = "tpu") -> Iterator[None]:
    """Run a platform's kernels anywhere, interpreted and slowly, in all that is traced inside."""
    token = _interpreted.set(platform)
    try:
        yield
    finally:
        _interpreted.reset(token)
