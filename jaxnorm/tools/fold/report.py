"""Reports of what folding did to a model."""

from __future__ import annotations

from dataclasses import dataclass

from jaxnorm.text import aligned


@dataclass(frozen=True)
class Folded:
    """A layer that has become part of others.

    Attributes:
        layer: its path.
        kind: its class.
        into: the paths of the linear layers that took it.
        how: what of them changed.
    """

    layer: str
    kind: str
    into: str
    how: str


@dataclass(frozen=True)
class Kept:
    """A layer that is left as it was.

    Attributes:
        layer: its path.
        kind: its class.
        reason: why.
    """

    layer: str
    kind: str
    reason: str


@dataclass(frozen=True)
class FoldReport:
    """A report of what was folded, what was not and why, and how far the outputs differ.

    It prints as a table.

    Attributes:
        folded: the layers that have become part of others: `layer`, `kind`, `into`, `how`.
        kept: the layers that are left as they were: `layer`, `kind`, `reason`.
        difference: largest difference of the outputs for the example, relative to their size.
        allowed: the largest that rounding explains.

    Source: `jaxnorm.tools.fold`.

    Example:
        >>> kept = Kept("norm", "BatchNorm", "a sum reads its result")
        >>> report = FoldReport((), (kept,), 0.0, 1e-5)
        >>> print(str(report).splitlines()[1])
        norm   BatchNorm  kept         a sum reads its result
    """

    folded: tuple[Folded, ...]
    kept: tuple[Kept, ...]
    difference: float
    allowed: float

    def __str__(self) -> str:
        rows = [("layer", "class", "folded into", "what changes there, or why not")]
        rows += [(f.layer, f.kind, f.into, f.how) for f in self.folded]
        rows += [(k.layer, k.kind, "kept", k.reason) for k in self.kept]
        return (
            f"{aligned(rows)}\n{len(self.folded)} folded, {len(self.kept)} kept; outputs differ by "
            f"{self.difference:.1e} of their size, of {self.allowed:.1e} that rounding explains."
        )
