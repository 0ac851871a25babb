"""A page of HTML that holds everything it shows: charts, data, and the code that draws them.

The page consists of sections. Sections on a study and sections on runs stand beside each other in
one template, and each appears if the page has something for it.
"""

import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import markupsafe
import vl_convert

from jaxnorm.lab.results import DEFINITIONS, StudyResult
from jaxnorm.monitor.diagnosis.findings import Finding
from jaxnorm.report.charts import build_charts
from jaxnorm.report.run_charts import PANELS, build_run_charts
from jaxnorm.report.runs import Run, collect
from jaxnorm.report.scales import THEME
from jaxnorm.report.words import COLUMNS, FOOTNOTE, LINES, NETWORKS, NORMALIZATIONS, cells


def render_page(result: StudyResult, versions: Mapping[str, str], runs: Sequence[Run]) -> str:
    """Render the report of a study: one file that loads nothing from the network.

    Args:
        result: the result of a finished study.
        versions: library -> version; the page shows them at its end.
        runs: recordings that were made in the study, grouped by network.

    Returns:
        HTML. Every name and number in it is escaped. A content security policy forbids it to load
        anything.

    Raises:
        Nothing of its own.

    Example, which takes seconds and so is not run here::

      result = run_study(demo_config(quick=True), load_digits())
      Path("report.html").write_text(render_page(result, {"jax": jax.__version__}, []))
    """
    networks = [
        {
            "name": name,
            "label": NETWORKS.get(name, name),
            "plan": next(plan for plan in result.settings["plans"] if plan["network"] == name),
            "variants": [each.normalization for each in result.curves if each.network == name],
            "rows": [
                {
                    "name": row.normalization,
                    "label": NORMALIZATIONS.get(row.normalization, row.normalization),
                    "cells": cells(row),
                }
                for row in result.summaries
                if row.network == name
            ],
        }
        for name in dict.fromkeys(curves.network for curves in result.curves)
    ]
    study = {
        "networks": networks,
        "columns": COLUMNS,
        "footnote": FOOTNOTE if any(not row.applicable for row in result.summaries) else "",
        "definitions": DEFINITIONS,
        "normalizations": NORMALIZATIONS,
        "lines": LINES,
        "data": result.data,
        "settings": result.settings,
        "seconds": result.seconds,
    }
    return _render(runs, versions, build_charts(result), study)


def render_runs(runs: Sequence[Run], versions: Mapping[str, str]) -> str:
    """Render the report of one run, or of several runs side by side, as one file.

    Args:
        runs: runs of any models, with any number of samples.
        versions: library -> version; the page shows them at its end.

    Returns:
        HTML. Findings come first. Then come the values at the layers, on one scale for all runs.

    Raises:
        Nothing of its own.

    Example, which takes seconds and so is not run here::

      run = Run("batch norm", "", Recording("runs/batch"))
      Path("runs.html").write_text(render_runs([run], {"jax": jax.__version__}))
    """
    return _render(runs, versions, {}, None)


def render_findings(findings: Sequence[Finding]) -> str:
    """Render findings alone, as a piece of HTML without scripts that fits into any page.

    Args:
        findings: the findings of one run.

    Returns:
        HTML, escaped.

    Raises:
        Nothing of its own.

    Example:
        >>> from jaxnorm.monitor import Finding
        >>> finding = Finding("dead-units", "warning", ("relu_0",), "Units are < 0.", "", "", "")
        >>> html = render_findings([finding])
        >>> "Units are &lt; 0." in html, "<script" in html
        (True, False)
    """
    template = _environment().get_template("findings.html")
    ill = [{"name": "", "findings": findings}] if findings else []
    diagnosis = {"group": "", "ill": ill, "well": [] if findings else [""], "empty": []}
    return template.render(diagnoses=[diagnosis], style=_raw("findings.css"), alone=True)


def _render(
    runs: Sequence[Run],
    versions: Mapping[str, str],
    charts: dict[str, Any],
    study: dict[str, Any] | None,
) -> str:
    collected = collect(runs)
    names = list(dict.fromkeys(run.name for run in runs))
    return (
        _environment()
        .get_template("page.html")
        .render(
            study=study,
            title=f"What normalization does: {study['data']['name']}" if study else _title(names),
            runs=runs,
            groups=list(dict.fromkeys(run.group for run in runs)),
            diagnoses=collected.diagnoses,
            facts=collected.facts,
            differences=collected.differences,
            panels={name: title for name, (title, _, _) in PANELS.items()},
            data=collected.data,
            versions=versions,
            charts=charts,
            run_charts=build_run_charts(collected.colours, names) if runs else {},
            theme=THEME | {line.light: line.dark for line in LINES.values()},
            bundle=_bundle(),
            style=_raw("page.css") + _raw("findings.css"),
            scripts=[_raw("draw.js"), *([_raw("study.js")] if study else [])]
            + ([_raw("runs.js")] if collected.data["measures"] else []),
            alone=False,
        )
    )


def _title(names: Sequence[str]) -> str:
    if len(names) < 2:
        return f"Inside {''.join(names) or 'no run'}"
    return f"{', '.join(names[:-1])} and {names[-1]}, side by side"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _text(name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache  # building the bundle takes seconds
def _bundle() -> Any:
    code = vl_convert.javascript_bundle("window.embedChart = vegaEmbed;")
    # "</script" inside a comment of a library would end the tag.
    return markupsafe.Markup(code.replace("</script", "<\\/script"))


def _raw(name: str) -> Any:
    return markupsafe.Markup(_text(name))


def _text(name: str) -> str:
    return resources.files("jaxnorm.report").joinpath(name).read_text("utf-8")
