"""Choose the implementation of each call, in the one place that every norm passes.

`evidence.json` holds what whole blocks of networks cost with each implementation, as the benchmark
measured it. A kernel is chosen where a block is faster with it, not because it exists. Where no
kernel is asked for, none was measured to be faster and nobody asks why, nothing is built here.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import resources
from typing import Any

from jaxtyping import Array

from jaxnorm.core.epilogue import along
from jaxnorm.kernels.meshes import run_sharded
from jaxnorm.kernels.platforms import KERNELS
from jaxnorm.kernels.refusals import Request

# Of `x` and of a residual or None.
Kernel = Callable[[Array, Array | None], tuple[Array, ...]]

_decisions: ContextVar[list["Decision"] | None] = ContextVar("jaxnorm_decisions", default=None)
_interpreted: ContextVar[str | None] = ContextVar("jaxnorm_interpreted", default=None)


@dataclass(frozen=True)
class Decision:
    """The implementation chosen for one call, and why."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    asked: str | None
    """The argument `implementation`."""
    request: Request | None = field(compare=False, repr=False)
    """The call as kernels see it; None for an operation that no kernel is written for."""

    def on(self, platform: str) -> tuple[str, str]:
        """Implementation and reason on a platform: "cpu", "cuda", "rocm" or "tpu"."""
        if self.asked not in (None, "pallas"):
            return self.asked, f"asked for by implementation={self.asked!r}"
        name, reason = _ASKED if self.asked else _measured(self.operation, platform)
        refused = self.refusal(platform, of_platform=name == "pallas")
        if refused is None:
            return name, reason
        return "error" if self.asked else "xla", f"no kernel: {refused}"

    def refusal(self, platform: str, *, of_platform: bool = True) -> str | None:
        """Why that platform has no kernel for the call; None where it has one.

        What only the platform's own kernels refuse is left out with `of_platform=False`.
        """
        if self.request is None:
            return f"none is written for {self.operation}"
        if platform not in KERNELS:
            return f"none is written for {platform}"
        unsupported = self.request.unsupported
        if unsupported is None and of_platform:
            return self.request.unsupported_on(platform)
        return unsupported


_ASKED = "pallas", "asked for by implementation='pallas'"


def kernel_for(
    operation: str,
    implementation: str | None,
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    feature_axes: tuple[int, ...] = (),
    **options: Any,
) -> Kernel | None:
    """The kernel that computes a call; None where XLA's form does.

    Args:
        operation: the name of the public function.
        implementation: its argument, checked to be one that exists.
        x: what is normalized; of a residual sum one of the two summands.
        scale: gamma, as the public function takes it.
        bias: beta, likewise.
        feature_axes: the axes that carry parameters.
        **options: measurement, epilogue, mask and save, as `core.layer` takes them. None of them is
            given for an operation that no kernel is written for.

    Returns:
        A function of `x` and of a residual or None, with ``(y,)`` or ``(y, x + residual)``.

    Raises:
        ValueError: a kernel is asked for, and there is none for this call.
    """
    required = implementation == "pallas"
    possible = required or (implementation is None and faster_on(operation))
    recording = _decisions.get()
    if not possible and recording is None:
        return None
    parameters = [along(p, feature_axes, x.ndim) for p in (scale, bias)]
    request = Request.of(operation, x, parameters, **options) if options else None
    decision = Decision(operation, x.shape, x.dtype.name, implementation, request)
    if recording is not None:
        recording.append(decision)
    if not possible:
        return None
    platforms = tuple(p for p in KERNELS if decision.on(p)[0] == "pallas")
    if request is not None and platforms:
        norm = replace(
            request.norm, platforms=platforms, required=required, interpreted=_interpreted.get()
        )
        return partial(run_sharded, norm, *parameters)
    if required:
        raise ValueError(
            f"{operation}: implementation='pallas' has no kernel for this call, since "
            f"{_reasons(decision)}; got x.shape={x.shape}, x.dtype={x.dtype}. "
            "Leave implementation=None."
        )
    return None


def _reasons(decision: Decision) -> str:
    """The reason that holds for all platforms, or that of each."""
    reasons = {p: str(decision.refusal(p)) for p in KERNELS}
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{platform}: {reason}" for platform, reason in reasons.items())


@cache
def evidence() -> list[dict[str, Any]]:
    """Rows of the table: for an operation and a platform, what a block costs with each."""
    return json.loads(resources.files("jaxnorm.kernels").joinpath("evidence.json").read_text())


def faster_on(operation: str) -> list[str]:
    """Platforms on which blocks were measured to be faster with a kernel of that operation."""
    rows = (row for row in evidence() if row["operation"] == operation)
    return [row["platform"] for row in rows if row["pallas"] < row["xla"]]


def _measured(operation: str, platform: str) -> tuple[str, str]:
    rows = [r for r in evidence() if (r["operation"], r["platform"]) == (operation, platform)]
    if not rows:
        return "xla", f"kernels await a measurement of blocks with {operation} on {platform}"
    (row,) = rows
    name = "pallas" if platform in faster_on(operation) else "xla"
    return name, "{measure}, {block}: xla {xla:g}, pallas {pallas:g}".format(**row)


@contextmanager
def recorded() -> Iterator[list[Decision]]:
    """Collect all decisions that are taken inside."""
    decisions: list[Decision] = []
    token = _decisions.set(decisions)
    try:
        yield decisions
    finally:
        _decisions.reset(token)


@contextmanager
def interpreted(platform: str = "tpu") -> Iterator[None]:
    """Run a platform's kernels anywhere, interpreted and slowly, in all that is traced inside."""
    token = _interpreted.set(platform)
    try:
        yield
    finally:
        _interpreted.reset(token)
