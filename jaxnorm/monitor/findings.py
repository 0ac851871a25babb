"""What is wrong with a network, said so that somebody can act on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxnorm.monitor.display import Displayed

Severity = Literal["critical", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "advice")
"""From what breaks a run or its result, by what costs quality, to what could be better."""


@dataclass(frozen=True)
class Finding(Displayed):
    """One thing that a rule has found."""

    rule: str
    """Name of the rule, such as "dead-units"."""
    severity: Severity
    where: tuple[str, ...]
    """Layers, places or arrays of parameters, in the order of a forward pass."""
    title: str
    """What is the matter, in one sentence."""
    cause: str
    """What it most likely comes from."""
    remedy: str
    """What to do."""
    source: str
    """Address of the paper or issue that the rule comes from."""
    evidence: dict[str, float] = field(default_factory=dict)
    """What was measured, and the threshold that it is held against."""

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.evidence.items())
        return (
            f"{self.severity}: {self.title}\n"
            f"  where:    {listed(self.where)}\n"
            f"  evidence: {numbers}\n"
            f"  cause:    {self.cause}\n"
            f"  remedy:   {self.remedy}\n"
            f"  source:   {self.source}"
        )


def listed(names: tuple[str, ...], most: int = 4) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(names[:most]) or "the whole model"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class Findings(Displayed, tuple[Finding, ...]):
    """Findings, the gravest first."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self)) or "Nothing found."
