"""Heatmaps over the steps of a run, as Altair charts."""

from collections.abc import Mapping
from typing import Any

import altair as alt

SHORT = "format(datum.value, abs(datum.value) < 0.001 && datum.value ? '.0e' : '~g')"
"""A label format for axes and legends that shows small numbers without many zeros."""


def steps(title: str | None = "training step", **options: Any) -> alt.X:
    """The horizontal axis of every chart over training steps."""
    return alt.X(
        "step:Q",
        title=title,
        scale=alt.Scale(nice=False, zero=False),
        axis=alt.Axis(grid=False, tickCount=8, tickMinStep=1, format="~s", **options),
    )


def heatmap(
    data: Any, row: str, of: str, colours: Mapping[float, str], kind: Any, **row_axis: Any
) -> alt.Chart:
    """Build a heatmap with one row for each value of a field and one column for each step.

    Args:
        data: Altair's data, with the fields "step", "end", "value" and `row`.
        row: the field that names a row.
        of: the name of the value, for people.
        colours: value -> colour. Values beyond the first and the last keep the colour of these.
        kind: the kind of the scale of colours.
        row_axis: options of the axis of the rows.

    Returns:
        A chart without a size.

    Raises:
        Nothing of its own.
    """
    scale = alt.Scale(
        type=kind,
        domain=list(colours),
        range=list(colours.values()),
        clamp=True,
        interpolate="lab",  # the default would pass through pink between grey and orange
    )
    legend = alt.Legend(
        orient="bottom", values=list(colours), format="~g", labelExpr=SHORT, gradientLength=260
    )
    axis = {"ticks": False, "domain": False, "labelAngle": 0, **row_axis}
    return (
        alt.Chart(data)
        .mark_rect(invalid="filter", aria=False)  # not thousands of labels, but one for the chart
        .encode(
            x=steps(domain=False),
            x2="end:Q",
            y=alt.Y(
                f"{row}:O",
                title=axis.pop("title", row),
                sort=axis.pop("sort", None),
                axis=alt.Axis(**axis),
                scale=alt.Scale(paddingInner=0.06),
            ),
            color=alt.Color("value:Q", title=of, scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip(f"{row}:N"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("value:Q", title=of, format=".3~g"),
            ],
        )
    )
