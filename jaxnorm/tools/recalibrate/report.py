"""The report of a recalibration: how far the statistics of each layer moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxnorm.text import aligned

_SHOWN = 10


@dataclass(frozen=True)
class LayerShift:
    """One layer's statistics before and after.

    Attributes:
        layer: path of the layer, such as "block_0/norm".
        count: elements that were pooled, largest over channels. Of a call without a mask: examples
            times positions.
        divergence: for each channel the Kullback-Leibler divergence of the new normal distribution
            from the old one, in nats, of the shape of the statistics, float64. Infinite where only
            one has a variance.

    Example:
        >>> import numpy as np
        >>> LayerShift("block/norm", 32, np.array([0.5, 0.1])).mean_divergence
        0.3
    """

    layer: str
    count: int
    divergence: np.ndarray

    @property
    def mean_divergence(self) -> float:
        """The divergence, averaged over channels."""
        return float(np.mean(self.divergence)) if self.divergence.size else 0.0


@dataclass(frozen=True)
class RecalibrationReport:
    """Record of a recalibration; it prints the ten layers that moved most as a table.

    Attributes:
        layers: every layer with new statistics, in the order of calls.
        kept: names of the layers with old statistics, that no batch called.
        batches: number of batches in one pass over the data.
        examples: number of examples in one pass.
        passes: number of passes over the data.

    Example:
        >>> import numpy as np
        >>> layers = LayerShift("a", 32, np.array([0.5, 0.1])), LayerShift("b", 32, np.array([2.0]))
        >>> print(RecalibrationReport(layers, ("c",), batches=2, examples=32, passes=1))
        norms recalibrated: 2, on examples: 32, in batches: 2, in passes: 1
        never called, left as they were: c
        layer  elements  KL (nats), mean  largest  at channel
        b      32        2                2        0
        a      32        0.3              0.5      0
    """

    layers: tuple[LayerShift, ...]
    kept: tuple[str, ...]
    batches: int
    examples: int
    passes: int

    def __str__(self) -> str:
        largest = sorted(self.layers, key=lambda each: -each.mean_divergence)[:_SHOWN]
        rows = [("layer", "elements", "KL (nats), mean", "largest", "at channel")]
        for each in largest:
            # Of statistics of several axes, or stacked ones, the index has several numbers.
            flat = each.divergence.argmax() if each.divergence.size else 0
            where = ", ".join(map(str, np.unravel_index(flat, each.divergence.shape)))
            highest = each.divergence.max(initial=0)
            numbers = f"{each.mean_divergence:.3g}", f"{highest:.3g}"
            rows.append((each.layer, str(each.count), *numbers, where))
        text = (
            f"norms recalibrated: {len(self.layers)}, on examples: {self.examples}, "
            f"in batches: {self.batches}, in passes: {self.passes}"
        )
        if len(self.layers) > _SHOWN:
            text += f"; the {_SHOWN} that moved most:"
        if self.kept:
            text += "\nnever called, left as they were: " + ", ".join(self.kept)
        return f"{text}\n{aligned(rows)}"
