"""The HTML views of recordings and findings in a notebook."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import markupsafe

from jaxnorm import __version__
from jaxnorm.monitor import Recording, diagnose
from jaxnorm.monitor.diagnosis.findings import Finding
from jaxnorm.report.page import render_findings, render_runs
from jaxnorm.report.runs import Run

HEIGHT = 640  # pixels; a frame of this height leaves room for the cells around it


class Shown(str):
    """HTML that a notebook displays as it is."""

    def _repr_html_(self) -> str:
        return str(self)


def show(thing: Any) -> Shown:
    """Show a recording, a finding or several findings in a notebook, as the report does.

    Args:
        thing: a `Recording`, a `Finding`, or a sequence of findings.

    Returns:
        HTML that loads nothing from the network, and that a notebook displays.

    Raises:
        Nothing of its own.

    Example:
        >>> from jaxnorm.monitor import Findings
        >>> from jaxnorm.report import show
        >>> "Nothing found" in show(Findings())
        True
    """
    if isinstance(thing, Recording):
        return Shown(show_recording(thing))
    return Shown(show_findings([thing] if isinstance(thing, Finding) else thing))


def show_recording(recording: Recording) -> str:
    """The page of a run, inside a frame of a notebook.

    Args:
        recording: the recording of one run, with any number of samples.

    Returns:
        HTML. In a frame the page keeps its own styles and scripts, and the notebook keeps its own.

    Raises:
        Nothing of its own.
    """
    findings = diagnose(recording) if len(recording) else ()
    run = Run(recording.folder.name, "", recording, findings)
    versions = {"jaxnorm": __version__}
    versions |= {name: metadata.version(name) for name in ("jax", "flax")}
    page = markupsafe.escape(render_runs([run], versions))
    return (
        f'<iframe srcdoc="{page}" title="What the monitor saw" '
        'sandbox="allow-scripts allow-popups allow-popups-to-escape-sandbox" '
        f'style="width: 100%; height: {HEIGHT}px; border: 0"></iframe>'
    )


def show_findings(findings: Sequence[Finding]) -> str:
    """The HTML of findings, as the report shows them.

    Args:
        findings: the findings of one run.

    Returns:
        HTML without scripts, which any notebook shows.

    Raises:
        Nothing of its own.
    """
    return render_findings(findings)
