"""One page of HTML that holds everything it shows: charts, data, and the code that draws them."""

from importlib import resources
from typing import Any

import jinja2
import markupsafe
import vl_convert

from jaxnorm.lab.results import DEFINITIONS, StudyResult
from jaxnorm.report.charts import THEME, build_charts
from jaxnorm.report.words import COLUMNS, FOOTNOTE, LINES, NETWORKS, NORMALIZATIONS, cells

BUNDLE = "window.embedChart = vegaEmbed;"


def render_page(result: StudyResult, versions: dict[str, str]) -> str:
    """The report of a study: one file that asks the network for nothing.

    Args:
      result: a finished study.
      versions: library -> version, shown at the end.

    Returns:
      HTML. Every name and number in it is escaped; a content security policy forbids it to load
      anything from anywhere.

    Raises:
      Nothing of its own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _text(name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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
    page = environment.get_template("page.html").render(
        networks=networks,
        columns=COLUMNS,
        footnote=FOOTNOTE if any(not row.applicable for row in result.summaries) else "",
        definitions=DEFINITIONS,
        normalizations=NORMALIZATIONS,
        lines=LINES,
        data=result.data,
        settings=result.settings,
        seconds=result.seconds,
        versions=versions,
        charts=build_charts(result),
        theme=THEME,
        # The libraries name their schemas by address; a comment with "</script" would end the tag.
        bundle=_script(vl_convert.javascript_bundle(BUNDLE)),
        style=_raw("page.css"),
        script=_raw("page.js"),
    )
    return page


def _script(code: str) -> Any:
    return markupsafe.Markup(code.replace("</script", "<\\/script"))


def _raw(name: str) -> Any:
    return markupsafe.Markup(_text(name))


def _text(name: str) -> str:
    return resources.files("jaxnorm.report").joinpath(name).read_text("utf-8")
