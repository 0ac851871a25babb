"""Windows of convolutions: the padding that a layer gives its input, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Pads = list[tuple[int, int]]


def several(value: Any, count: int) -> tuple[int, ...]:
    """One number for each axis, from a number, None for ones, or a sequence."""
    if value is None:
        return (1,) * count
    return (value,) * count if isinstance(value, int) else tuple(value)


def flax_conv(module: Any, spatial: Sequence[int] | None) -> Pads | None:
    """Padding of a Flax convolution; None if it depends on a size that is not known."""
    windows = several(module.kernel_size, 1)
    n = len(windows)
    strides = several(module.strides, n)
    reach = [d * (k - 1) for k, d in zip(windows, several(module.kernel_dilation, n))]
    padding = module.padding
    if padding == "VALID":
        return [(0, 0)] * n
    if padding in ("SAME", "SAME_LOWER", "CIRCULAR", "REFLECT"):
        if padding in ("CIRCULAR", "REFLECT"):
            return [(r // 2, r - r // 2) for r in reach]
        if spatial is None and any(s > 1 for s in strides):
            return None
        totals = [
            r if s == 1 else max((-(-size // s) - 1) * s + r + 1 - size, 0)
            for r, s, size in zip(reach, strides, spatial or strides)
        ]
        low = [(t // 2, t - t // 2) for t in totals]
        return low if padding != "SAME_LOWER" else [(b, a) for a, b in low]
    return _explicit(padding, n, reach)


def flax_transposed(module: Any) -> Pads | None:
    """Padding of the input of a transposed Flax convolution, spread by its strides."""
    windows = several(module.kernel_size, 1)
    n = len(windows)
    strides = several(module.strides, n)
    reach = [d * (k - 1) for k, d in zip(windows, several(module.kernel_dilation, n))]
    pads: Pads = []
    if module.padding not in ("SAME", "VALID"):
        return _explicit(module.padding, n, reach)
    for r, s in zip(reach, strides):
        k = r + 1
        if module.padding == "SAME":
            total = k + s - 2
            low = k - 1 if s > k - 1 else -(-total // 2)
        else:
            total = k + s - 2 + max(k - s, 0)
            low = k - 1
        pads.append((low, total - low))
    return pads


def torch_conv(module: Any) -> Pads:
    """Padding of a PyTorch convolution."""
    n = len(module.kernel_size)
    reach = [d * (k - 1) for k, d in zip(module.kernel_size, several(module.dilation, n))]
    if module.padding == "valid":
        return [(0, 0)] * n
    if module.padding == "same":
        return [(r // 2, r - r // 2) for r in reach]
    return [(p, p) for p in several(module.padding, n)]


def torch_transposed(module: Any) -> Pads:
    """Padding of the spread input that gives what PyTorch's transposed convolution does."""
    n = len(module.kernel_size)
    reach = [d * (k - 1) for k, d in zip(module.kernel_size, several(module.dilation, n))]
    return [
        (r - p, r - p + more)
        for r, p, more in zip(reach, several(module.padding, n), several(module.output_padding, n))
    ]


def _explicit(padding: Any, n: int, reach: Sequence[int]) -> Pads | None:
    if isinstance(padding, str):  # CAUSAL
        return [(r, 0) for r in reach] if padding == "CAUSAL" else None
    if isinstance(padding, int):
        return [(padding, padding)] * n
    pads = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    return pads * n if len(pads) == 1 else pads
