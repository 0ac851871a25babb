"""Findings about a network: each a defect, with the numbers that show it and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxnorm.monitor.markup import block, escape, link, table

Severity = Literal["critical", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "advice")
"""From what breaks a run or its result, by what costs quality, to what could be better."""


@dataclass(frozen=True)
class Finding:
    """One defect that a rule has found in a network.

    Attributes:
        rule: name of the rule, such as "dead-units".
        severity: "critical", "warning" or "advice", from the gravest on.
        where: layers, places or arrays of parameters, in the order of a forward pass.
        title: what is the matter, in one sentence.
        cause: what it most likely comes from.
        remedy: what to do.
        source: address of the paper or issue that the rule comes from.
        evidence: name -> number: what was measured, and the threshold that it is compared with.

    Example:
        >>> from jaxnorm.monitor import Finding
        >>> print(Finding("dead-units", "warning", ("relu_0",), "2 units are zero.", "A high rate.",
        ...               "Lower it.", "arXiv:1903.06733", {"share": 0.25}))
        warning: 2 units are zero.
          where:    relu_0
          evidence: share 0.25
          cause:    A high rate.
          remedy:   Lower it.
          source:   arXiv:1903.06733
    """

    rule: str
    severity: Severity
    where: tuple[str, ...]
    title: str
    cause: str
    remedy: str
    source: str
    evidence: dict[str, float] = field(default_factory=dict)

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

    def _repr_html_(self) -> str:
        return block(_card(self))


def listed(names: tuple[str, ...], most: int = 4) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(names[:most]) or "the whole model"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class Findings(tuple[Finding, ...]):
    """A tuple of findings, the gravest first.

    Example:
        >>> from jaxnorm.monitor import Findings
        >>> print(Findings())
        Nothing found.
    """

    def __str__(self) -> str:
        return "\n\n".join(map(str, self)) or "Nothing found."

    def _repr_html_(self) -> str:
        return block(*map(_card, self)) if self else block("<p><b>Nothing found.</b></p>")


def _card(finding: Finding) -> str:
    """A finding as a piece of HTML."""
    heading = f'<span class="badge">{finding.severity}</span><b>{escape(finding.title)}</b>'
    where = f"<code>{escape(listed(finding.where))}</code>"
    numbers = table(["evidence", ""], finding.evidence.items()) if finding.evidence else ""
    return (
        f'<article class="{finding.severity}"><p>{heading}</p><p>{where}</p>{numbers}'
        f"<p><b>Likely cause.</b> {escape(finding.cause)}</p>"
        f"<p><b>Remedy.</b> {escape(finding.remedy)}</p>"
        f'<p class="quiet">{link(finding.source)}</p></article>'
    )
