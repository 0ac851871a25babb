"""The charts of a study as Vega-Lite specifications, made with Altair.

The curves carry a Vega-Lite parameter, "measure", which the buttons of the page set.
"""

import math
from typing import Any

import altair as alt
import numpy as np

from jaxnorm.lab.results import Curves, StudyResult
from jaxnorm.report.heatmap import steps
from jaxnorm.report.words import LINES, NORMALIZATIONS, Line


def build_charts(result: StudyResult) -> dict[str, dict[str, Any]]:
    """Build the charts that belong to a study itself.

    Args:
        result: the result of a finished study.

    Returns:
        Name -> Vega-Lite specification. The names are "curves-N" and "rates-N" for each network N.

    Raises:
        Nothing of its own.
    """
    networks = list(dict.fromkeys(curves.network for curves in result.curves))
    charts: dict[str, Any] = {}
    for network in networks:
        group = [curves for curves in result.curves if curves.network == network]
        target = next(
            row.target for row in result.summaries if row.network == network and row.applicable
        )
        charts[f"curves-{network}"] = _curves(group, target)
        charts[f"rates-{network}"] = _rates(group)
    return {name: chart.to_dict() for name, chart in charts.items()}


def _curves(group: list[Curves], target: float | None) -> Any:
    rows = []
    for curves in group:
        for seed in range(curves.validation_accuracy.shape[1]):
            accuracy = curves.validation_accuracy[curves.best, seed]
            loss = [math.nan, *curves.train_loss[curves.best, seed]]
            for step, reached, lost in zip(curves.steps, accuracy, loss, strict=True):
                rows.append(
                    {
                        "normalization": NORMALIZATIONS[curves.normalization],
                        "step": step,
                        "accuracy": _number(reached),
                        "loss": _number(lost),
                    }
                )
    measure = alt.param(name="measure", value="accuracy")
    base = (
        alt.Chart(alt.InlineData(rows))
        .transform_calculate(value="datum[measure]")
        .transform_filter("isValid(datum.value)")
        .encode(x=steps())
    )
    colour, dash, opacity, pick = _key(group)
    # The range over seeds is drawn only for a name that was clicked: seven ranges hide each other.
    only = {"param": "picked", "empty": False}
    y = alt.Y("mean(value):Q", title=None, axis=alt.Axis(format="~g", tickCount=6))
    band = base.mark_area().encode(
        y=alt.Y("min(value):Q", title=None),
        y2="max(value):Q",
        color=colour,
        opacity=alt.OpacityValue(0.0, condition={**only, "value": 0.16}),
    )
    line = base.mark_line(strokeWidth=2.2).encode(
        y=y,
        color=colour,
        strokeDash=dash,
        opacity=opacity,
        tooltip=[
            alt.Tooltip("normalization:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("mean(value):Q", title="mean over seeds", format=".3f"),
        ],
    )
    goal = (
        alt.Chart(alt.InlineData([{"target": _number(target)}]))
        .transform_filter("measure === 'accuracy'")
        .mark_rule(strokeDash=[2, 3], strokeWidth=1.4, color="#888888")
        .encode(y="target:Q")
    )
    return (band + line + goal).add_params(measure, pick).properties(width="container", height=280)


def _rates(group: list[Curves]) -> Any:
    rows = [
        {
            "normalization": NORMALIZATIONS[curves.normalization],
            "rate": rate,
            "accuracy": _number(accuracy) if np.isfinite(loss) else 0.0,
        }
        for curves in group
        for rate, accuracies, losses in zip(
            curves.learning_rates,
            curves.validation_accuracy[:, :, -1],
            curves.final_loss,
            strict=True,
        )
        for accuracy, loss in zip(accuracies, losses, strict=True)
    ]
    rates = sorted({row["rate"] for row in rows})
    colour, dash, opacity, pick = _key(group)
    base = alt.Chart(alt.InlineData(rows)).encode(
        x=alt.X(
            "rate:Q",
            title="learning rate",
            scale=alt.Scale(type="log", nice=False, padding=8),
            axis=alt.Axis(values=rates, format="~g", grid=False, labelOverlap=False),
        ),
        y=alt.Y("mean(accuracy):Q", title=None, axis=alt.Axis(format="~g", tickCount=6)),
        color=colour,
        opacity=opacity,
        tooltip=[
            alt.Tooltip("normalization:N"),
            alt.Tooltip("rate:Q", title="learning rate", format="~g"),
            alt.Tooltip("mean(accuracy):Q", title="mean over seeds", format=".3f"),
            alt.Tooltip("min(accuracy):Q", title="worst seed", format=".3f"),
        ],
    )
    line = base.mark_line(strokeWidth=2.2).encode(strokeDash=dash)
    points = base.mark_point(filled=True, size=34)
    return (line + points).add_params(pick).properties(width="container", height=240)


def _key(group: list[Curves]) -> tuple[Any, Any, Any, alt.Parameter]:
    """Colour, dash and opacity of each line, and the selection by a click on the legend."""
    lines: list[Line] = [LINES[curves.normalization] for curves in group]
    names = [NORMALIZATIONS[curves.normalization] for curves in group]
    legend = alt.Legend(
        title=None, orient="bottom", columns=4, symbolType="stroke", symbolSize=300, symbolOpacity=1
    )
    colour = alt.Color(
        "normalization:N",
        scale=alt.Scale(domain=names, range=[line.light for line in lines]),
        legend=legend,
    )
    dash = alt.StrokeDash(
        "normalization:N",
        scale=alt.Scale(domain=names, range=[list(line.dash) or [1, 0] for line in lines]),
        legend=legend,
    )
    pick = alt.selection_point(fields=["normalization"], bind="legend", name="picked")
    return colour, dash, alt.condition(pick, alt.value(1.0), alt.value(0.12)), pick


def _number(value: Any) -> float | None:
    """A number with four digits, as many as a screen shows; None for one that is not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
