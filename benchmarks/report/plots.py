"""Results as pictures, with Altair; without Altair nothing is drawn."""

import importlib.util
import statistics
from typing import Any

from benchmarks.report import speed
from benchmarks.report.table import WORD, columns_of, grouped, shape

# The colour of each peer in all pictures. The colour-blind can distinguish them (Okabe & Ito 2008).
COLORS = {
    "jaxnorm": "#0072B2",
    "flax": "#E69F00",
    "flax two-pass": "#F0C878",
    "jnp": "#999999",
    "tokamax": "#CC79A7",
    "torch": "#D55E00",
    "torch.compile": "#8C3B00",
    "no norm": "#BBBBBB",
}
FORM = ("#0072B2", "#56B4E9", "#009E73")  # jaxnorm's implementations
INK, QUIET = "#222222", "#E4E4E4"


def charts(results: dict) -> dict[str, Any]:
    """Pictures by name; none without Altair."""
    if importlib.util.find_spec("altair") is None:
        return {}
    found = _CHARTS[results["name"]](results)
    return {name: _finished(chart) for name, chart in found.items()}


def _finished(chart) -> Any:
    return (
        chart.configure_view(stroke=None)
        .configure_axis(gridColor=QUIET, domainColor=INK, labelColor=INK, titleColor=INK)
        .configure_header(labelColor=INK, labelFontSize=12, labelFontWeight="bold")
        .configure_title(anchor="start", color=INK, fontSize=14)
        .configure_legend(labelColor=INK, titleColor=INK)
    )


def _color(peers: list[str], field: str = "peer") -> Any:
    import altair as alt

    forms = iter(FORM)
    colors = [COLORS[p] if p in COLORS else next(forms) for p in peers]
    return alt.Color(f"{field}:N", title=None, scale=alt.Scale(domain=peers, range=colors))


def _data(rows: list[dict]) -> Any:
    import altair as alt

    return alt.Data(values=rows)


def _ops(results: dict) -> dict:
    import altair as alt

    cells = speed.cells(results)
    others = [p for p in results["settings"]["peers"] if p not in (speed.OURS, speed.COPY)]
    rows = [
        {"norm": WORD[c.norm], "peer": peer, "ratio": c.ratio(peer), "pass": c.which}
        for c in cells
        for peer in others
        if c.ratio(peer) is not None
    ]
    passes = list(dict.fromkeys(c.which for c in cells))
    points = (
        alt.Chart(width=240, height=260)
        .mark_point(filled=True, size=45, opacity=0.7)
        .encode(
            x=alt.X(
                "ratio:Q",
                title="jaxnorm's time / peer's",
                scale=alt.Scale(type="log", nice=False, padding=8),
                axis=alt.Axis(values=[2.0**n for n in range(-6, 7)], format="~r"),
            ),
            y=alt.Y("norm:N", title=None, sort=list(WORD.values())),
            yOffset=alt.YOffset("peer:N", sort=others),
            color=_color(others),
        )
    )
    one = alt.Chart().mark_rule(color=INK, strokeDash=[3, 3]).encode(x=alt.datum(1.0))
    ratios = alt.layer(one, points, data=_data(rows)).facet(
        column=alt.Column("pass:N", title=None, sort=passes),
        title="Operations: every shape and dtype; left of the line jaxnorm is faster",
    )
    shares = [
        {"norm": WORD[c.norm], "pass": c.which, "share": c.share, "dtype": c.dtype} for c in cells
    ]
    bandwidth = (
        alt.Chart(_data(shares), width=240, height=260)
        .mark_point(filled=True, size=45, opacity=0.7)
        .encode(
            x=alt.X("share:Q", title="bandwidth / a copy's", scale=alt.Scale(zero=True)),
            y=alt.Y("norm:N", title=None, sort=list(WORD.values())),
            yOffset=alt.YOffset("dtype:N"),
            color=alt.Color(
                "dtype:N", title=None, scale=alt.Scale(range=[COLORS["jaxnorm"], COLORS["flax"]])
            ),
        )
        .facet(
            column=alt.Column("pass:N", title=None, sort=passes),
            title="jaxnorm's share of a copy's bandwidth, for what must be moved",
        )
    )
    return {"ops_ratio": ratios, "ops_bandwidth": bandwidth}


def _bars(rows: list[dict], peers: list[str], x: str, column: str | None, title: str) -> Any:
    """A bar chart of `value` by `name` and peer."""
    import altair as alt

    names = list(dict.fromkeys(row["name"] for row in rows))
    base = alt.Chart(_data(rows), width=200 if column else 420, height={"step": 14})
    chart = base.mark_bar().encode(
        x=alt.X("value:Q", title=x),
        y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=320)),
        yOffset=alt.YOffset("peer:N", sort=peers),
        color=_color(peers),
    )
    if column is None:
        return chart.properties(title=title)
    order = list(dict.fromkeys(row[column] for row in rows))
    return chart.facet(column=alt.Column(f"{column}:N", title=None, sort=order), title=title)


def _blocks(results: dict) -> dict:
    peers = results["settings"]["peers"]
    rows = [
        {"name": f"{network}, {WORD[norm]}", "peer": peer, "value": statistics.median(taken)}
        for (network, norm, _), samples in grouped(results["samples"], 3).items()
        for peer, taken in columns_of(samples, peers).items()
    ]
    return {"blocks": _bars(rows, peers, "milliseconds", None, "A train step")}


def _tpu(results: dict) -> dict:
    peers = results["settings"]["peers"]
    rows = [
        {
            "name": f"{row['network']}, {WORD[row['norm']]}",
            "peer": row["peer"],
            "TPU": row["topology"].partition(":")[0],
            "value": row["extra passes"],
        }
        for row in results["blocks"]
        if row["extra passes"] is not None
    ]
    title = "Whole blocks: extra passes over HBM for each norm layer"
    return {"tpu_blocks": _bars(rows, peers, "passes", "TPU", title)}


def _memory(results: dict) -> dict:
    peers = results["settings"]["peers"]
    rows = [
        {"name": f"{WORD[norm]} {shape(size)}", "peer": peer, "value": value}
        for norm, size, jit, kept in results["samples"]
        if jit
        for peer, value in zip(peers, kept)
    ]
    title = "Kept for the backward pass, bfloat16"
    return {"memory": _bars(rows, peers, "bytes of x", None, title)}


def _compile(results: dict) -> dict:
    peers = results["settings"]["peers"]
    rows = [
        {
            "name": WORD[norm],
            "peer": peer,
            "value": statistics.median(sum(row[i]) for row in samples),
        }
        for (norm, _), samples in grouped(results["samples"], 2).items()
        for i, peer in enumerate(peers)
    ]
    title = "Trace and compile the gradient of eight layers"
    return {"compile": _bars(rows, peers, "seconds", None, title)}


def _scaling(results: dict) -> dict:
    import altair as alt

    if "growth" not in results:
        return {}
    peers = results["settings"]["peers"]
    rows = [
        {"norm": WORD[norm], "against": against, "size": size, "peer": peer,
         "ms": statistics.median(taken)}
        for (norm, against), points in speed.grown(results).items()
        for size, found in points
        for peer, taken in found.items()
    ]  # fmt: skip
    log = alt.Scale(type="log", nice=False)
    chart = (
        alt.Chart(_data(rows), width=150, height=150)
        .mark_line(point=True)
        .encode(
            x=alt.X("size:Q", title="rows, or features", scale=log, axis=alt.Axis(tickCount=4)),
            y=alt.Y("ms:Q", title="milliseconds", scale=log),
            color=_color(peers),
        )
        .facet(
            row=alt.Row("against:N", title=None, sort=["rows", "features"]),
            column=alt.Column("norm:N", title=None, sort=list(WORD.values())),
            title="Forward and backward against rows and features",
        )
        .resolve_scale(x="independent")
    )
    return {"scaling": chart}


def _accuracy(results: dict) -> dict:
    import altair as alt

    peers = results["settings"]["peers"]
    worst: dict[tuple, float] = {}
    for norm, dtype, _, offset, _, _, units in results["values"]:
        for peer, value in zip(peers, units):
            if dtype == "float32" and isinstance(value, int | float):
                key = (WORD[norm], offset, peer)
                worst[key] = max(worst.get(key, 0.0), value, 0.1)
    rows = [
        {"norm": norm, "offset": f"{offset:.0e}" if offset else "0", "peer": peer, "units": value}
        for (norm, offset, peer), value in worst.items()
    ]
    offsets = list(dict.fromkeys(row["offset"] for row in rows))
    chart = (
        alt.Chart(_data(rows), width=130, height=180)
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "offset:O", title="offset of the data", sort=offsets, axis=alt.Axis(labelAngle=0)
            ),
            y=alt.Y(
                "units:Q",
                title="units of rounding",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(format=".0e"),
            ),
            color=_color(peers),
        )
        .facet(
            column=alt.Column("norm:N", title=None, sort=list(WORD.values())),
            title="Worst finite error of y, float32",
        )
    )
    return {"accuracy": chart}


_CHARTS = {
    "ops": _ops,
    "blocks": _blocks,
    "tpu": _tpu,
    "memory": _memory,
    "compile": _compile,
    "scaling": _scaling,
    "accuracy": _accuracy,
    "monitor": lambda results: {},  # six ratios are a table
}
