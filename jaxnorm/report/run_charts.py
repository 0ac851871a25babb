"""The charts of recordings as Vega-Lite specifications, made with Altair.

The specifications hold no numbers. The page fills the data sets "cells", "broken", "bars", "lines"
and "now" with the values that the reader chooses. "now" is the step of the slider.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from jaxnorm.report.heatmap import SHORT, heatmap, steps
from jaxnorm.report.scales import CHANNELS, NOT_FINITE, STYLES, UPDATES, MeasureStyle
from jaxnorm.report.words import LINES, NORMALIZATIONS, Line

LINE, MARKER = LINES["batch"].light, "#888888"
PANELS: dict[str, tuple[str, Any, list[float]]] = {
    # The charts of the section on shift: title, kind of scale, and the values that the axis covers
    # at least. With an axis of their own range, numbers that hardly change would seem to change a
    # lot.
    "mean_drift": ("mean drift", "log", [0.001, 0.1]),
    "variance_ratio": ("variance ratio", "log", [0.5, 2.0]),
    "kl_divergence": ("KL divergence, in nats", "log", [0.0001, 0.1]),
    "l2": ("gradient-based shift: l2 distance", "log", []),
    "cosine": ("gradient-based shift: cosine", "linear", [0.0, 1.0]),
    "loss": ("loss", "linear", []),
}
_EXTENT = 52  # width of the y axis: equal in all charts of a column, so that their steps align
# A long name keeps its end, which tells it from the other names.
_TAIL = """(length(datum.label) > (width < 400 ? 16 : 28)
  ? '…' + slice(datum.label, width < 400 ? -15 : -27) : datum.label)"""


def build_run_charts(
    measures: Mapping[str, Mapping[float, str]], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Every chart of the sections on runs.

    Args:
        measures: for each measure that a run has, its name -> value -> colour.
        names: the names of the runs.

    Returns:
        Name -> Vega-Lite specification.

    Raises:
        Nothing of its own.
    """
    charts = {
        f"heatmap-{name}": _cells(STYLES[name], colours) for name, colours in measures.items()
    }
    for name, style in {"channels": CHANNELS, "updates": UPDATES}.items():
        assert style.colours is not None
        row = "channel" if name == "channels" else "parameter"
        charts[name] = _cells(style, style.colours, row)
    lowest = list(PANELS)[-1]  # only its axis has numbers: the steps are equal in all panels
    charts |= {f"panel-{name}": _panel(*panel, name == lowest) for name, panel in PANELS.items()}
    charts |= {"histogram": _histogram(), "band": _band(), "metric": _metric(names)}
    # Validation takes seconds at each call. It is left to the tests, which draw every chart.
    return {name: chart.to_dict(validate=False) for name, chart in charts.items()}


def _data(name: str) -> alt.NamedData:
    return alt.NamedData(name)


def _now() -> alt.Chart:
    return (
        alt.Chart(_data("now"))
        .mark_rule(color=MARKER, strokeWidth=1.5, strokeDash=[4, 2])
        .encode(x="step:Q")
    )


def _cells(style: MeasureStyle, colours: Mapping[float, str], row: str = "layer") -> Any:
    rectangles = heatmap(
        _data("cells"), row, style.label, colours, style.kind,
        title=None, labelExpr=_TAIL, labelLimit=200, labelOverlap=True, labelFontSize=11,
    )  # fmt: skip
    tooltip = [
        alt.Tooltip(f"{row}:N"),
        alt.Tooltip("step:Q"),
        alt.Tooltip("said:N", title=style.label),
    ]
    rectangles.encoding.tooltip = tooltip
    # A value that is infinite or not a number has no place on the scale, and nobody must overlook
    # it. It has a colour and a shape of its own, because not everybody can see the colour.
    broken = (
        alt.Chart(_data("broken"))
        .mark_rect(color=NOT_FINITE, aria=False, height=alt.RelativeBandSize(band=0.4))
        .encode(
            x="step:Q",
            x2="end:Q",
            y=alt.Y(f"{row}:O", sort=None),
            tooltip=tooltip,
        )
    )
    return _sized(rectangles + broken + _now())


def _sized(chart: Any, **options: Any) -> Any:
    """A chart that is as wide as its container; its height comes from the options."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return chart.properties(width="container", autosize=fit, **options)


def _histogram() -> Any:
    # The data hold every bin that matters at any step, and the highest bar of all steps. So the
    # axes stay fixed while the slider moves.
    x = alt.X(
        "start:Q",
        title="value",
        scale=alt.Scale(nice=False, zero=False),
        axis=alt.Axis(format="~g", grid=False, tickCount=6),
    )
    base = alt.Chart(_data("bars"))
    y = alt.Y("height:Q", title="density", axis=alt.Axis(labels=False, ticks=False, grid=False))
    bars = base.mark_rect(color=LINE, opacity=0.85).encode(
        x=x,
        x2="end:Q",
        y=y,
        y2=alt.datum(0),
        tooltip=[
            alt.Tooltip("start:Q", title="from", format=".3~g"),
            alt.Tooltip("end:Q", title="to", format=".3~g"),
            alt.Tooltip("count:Q", title="elements counted", format=".0f"),
        ],
    )
    top = base.mark_point(opacity=0, tooltip=None).encode(x="start:Q", y="highest:Q")
    return _sized(bars + top, height=220)


def _band() -> Any:
    base = alt.Chart(_data("lines")).encode(x=steps())
    y = alt.Y(
        "low:Q", title="value", axis=alt.Axis(tickCount=5, format="~g", minExtent=_EXTENT),
        scale=alt.Scale(zero=False),
    )  # fmt: skip
    band = base.mark_area(opacity=0.25, color=LINE, clip=True).encode(y=y, y2="high:Q")
    line = base.mark_line(color=LINE, clip=True).encode(
        y="middle:Q",
        tooltip=[
            alt.Tooltip("step:Q"),
            alt.Tooltip("low:Q", title="15th percentile", format=".3~g"),
            alt.Tooltip("middle:Q", title="median", format=".3~g"),
            alt.Tooltip("high:Q", title="85th percentile", format=".3~g"),
        ],
    )
    points = base.mark_point(color=LINE, filled=True, size=14).encode(y="middle:Q")
    return _sized(band + line + points + _now(), height=220)


def _panel(title: str, kind: Any, least: list[float], lowest: bool) -> Any:
    scale = alt.Scale(type=kind, nice=False)
    if kind == "linear":
        scale.zero = False
    if least:
        scale.domain = alt.DomainUnionWith(unionWith=least)
    x = steps() if lowest else steps(None, labels=False, ticks=False)
    axis = alt.Axis(
        tickCount=3, format="~g", labelExpr=SHORT, labelLimit=_EXTENT - 8,
        minExtent=_EXTENT, maxExtent=_EXTENT, grid=kind == "linear",
    )  # fmt: skip
    base = alt.Chart(_data("lines")).encode(x=x)
    line = base.mark_line(color=LINE, strokeWidth=1.8).encode(
        y=alt.Y("value:Q", title=None, scale=scale, axis=axis)
    )
    points = base.mark_point(color=LINE, filled=True, size=14).encode(
        y="value:Q",
        tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("value:Q", title=title, format=".3~g")],
    )
    head = alt.TitleParams(title, anchor="start", fontSize=12, fontWeight=600, offset=4)
    return _sized(line + points + _now(), height=70, title=head)


def _metric(names: Sequence[str]) -> Any:
    known = LINES | {NORMALIZATIONS[name]: line for name, line in LINES.items()}
    used = [known.get(name) for name in names]
    # The dotted line means "no normalization". Other runs get it only if no other line is left.
    lines = sorted(LINES.values(), key=lambda line: line is LINES["none"])
    others = itertools.cycle([line for line in lines if line not in used] or lines)
    by_name: dict[str, Line] = {
        name: known[name] if name in known else next(others) for name in names
    }
    legend = alt.Legend(
        title=None, orient="bottom", columns=4, symbolType="stroke", symbolSize=300, symbolOpacity=1
    )
    drawn = (
        alt.Chart(_data("lines"))
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=14))
        .encode(
            x=steps(),
            y=alt.Y(
                "value:Q", title=None, scale=alt.Scale(zero=False),
                axis=alt.Axis(tickCount=5, format="~g", minExtent=_EXTENT),
            ),
            color=alt.Color(
                "run:N", legend=legend,
                scale=alt.Scale(domain=list(by_name), range=[a.light for a in by_name.values()]),
            ),
            strokeDash=alt.StrokeDash(
                "run:N", legend=legend,
                scale=alt.Scale(
                    domain=list(by_name), range=[list(a.dash) or [1, 0] for a in by_name.values()]
                ),
            ),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("value:Q", format=".4~g"),
            ],
        )
    )  # fmt: skip
    return _sized(drawn + _now(), height=220)
