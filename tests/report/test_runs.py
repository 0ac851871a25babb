"""Pages of recordings, in a real browser: what they show, what changes, what they never do."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
from browser import Browser, needs_chromium
from recordings import invent

from jaxnorm.monitor import MEASURES, Recording
from jaxnorm.monitor.diagnosis.findings import Finding
from jaxnorm.report import Run, render_runs
from jaxnorm.report.pack import LEVELS, MODES, NEAR, Packer
from jaxnorm.report.runs import KINDS, collect
from jaxnorm.report.scales import NOT_FINITE, STYLES, THEME

HOSTILE = "<img src=x onerror=window.hacked=1></script><b>&\"'"
VERSIONS = {"jaxnorm": "0.1.0", HOSTILE: HOSTILE}


def finding(**options):
    return Finding(**{
        "rule": "made-up", "severity": "warning", "where": ("BatchNorm_0:input",),
        "title": "Something is the matter.", "cause": "A cause.", "remedy": "A remedy.",
        "source": "https://arxiv.org/abs/1502.03167",
        "evidence": {"share": 0.25, "threshold": 0.1}, **options,
    })  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def show(browser, tmp_path):
    """Show a page of runs, or an existing page, in the browser."""

    def shown(*runs, page=None, width=1200, dark=False):
        if page is None:
            page = tmp_path / "report.html"
            page.write_text(render_runs(runs, VERSIONS))
        browser.look(width, dark=dark)
        browser.open(page)
        return browser

    yield shown
    if browser.requests:
        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two recordings, with and without normalization."""
    folder = tmp_path_factory.mktemp("pair")
    return (
        Run("with", "", invent(folder / "a", shift=4), [finding()]),
        Run("without", "", invent(folder / "b", norm="")),
    )


@pytest.fixture(scope="module")
def of_pair(pair, tmp_path_factory):
    """The page of the two recordings."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_runs(pair, VERSIONS))
    return path


def filled(number):
    """Fill a recording with one number, and leave its histograms empty."""

    def spoil(arrays):
        for name, array in arrays.items():
            array.fill(0 if name.endswith("histogram") else number)

    return spoil


def values(browser, name, data):
    """The numbers that a chart shows."""
    rows = browser.run(f"page.shown({json.dumps(name)}, {json.dumps(data)})")
    # A cell without width only holds the place of its row.
    return [row for row in rows if "step" not in row or row["step"] != row.get("end")]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_packed_comes_back_as_close_as_its_levels_are(mode):
    rng = np.random.default_rng(0)
    positive = np.exp(rng.normal(size=50) * 2)
    given = positive * rng.choice([-1, 1], 50) if mode in ("linear", "signed") else positive
    packer = Packer()
    packer.add(np.arange(3), "linear")
    start, low, high, number = packer.add(given, mode)
    codes = np.frombuffer(zlib.decompress(base64.b64decode(packer.text())), np.uint8)[3:]
    assert start == 3 and MODES[number] == mode
    level = low + codes / (LEVELS - 1) * (high - low)
    back = {"log": 10**level, "sqrt": level**2, "signed": NEAR * np.sinh(level)}.get(mode, level)
    close = (high - low) / (LEVELS - 1)
    space = {"log": np.log10, "sqrt": np.sqrt, "signed": lambda a: np.arcsinh(a / NEAR)}
    scaled = space.get(mode, lambda a: a)
    np.testing.assert_allclose(scaled(back), scaled(given), atol=0.51 * close)


def test_what_is_not_finite_is_packed_as_what_it_is():
    packer = Packer()
    packer.add(np.array([0, 1, np.inf, -np.inf, np.nan, -1]), "log")
    codes = list(zlib.decompress(base64.b64decode(packer.text())))
    assert codes == [252, 0, 254, 253, 255, 255]


def test_every_measure_has_a_look():
    assert set(STYLES) == set(MEASURES)
    for style in STYLES.values():
        assert style.good.startswith("Good is ")
        for colour in (style.colours or {}).values():
            assert colour in THEME  # else it would be invisible in the dark, or glare


@pytest.mark.seconds(90, "it makes so many")
def test_thirty_layers_and_five_hundred_samples_are_under_three_megabytes(tmp_path):
    recording = invent(tmp_path / "big", layers=30, samples=500, channels=64)
    assert len(recording.places) == 120
    page = render_runs([Run("big", "", recording)], VERSIONS)
    assert len(page.encode()) < 3e6
    assert "250 of the samples" in page
    [packed] = json.loads(re.search(r'id="runs">(.*?)</script>', page)[1])["runs"]
    assert packed["steps"][0] == 0 and packed["steps"][-1] == 499 * 4  # the ends are kept


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of one run with findings, settings, and samples that were lost."""
    settings = {"rate": 0.125, "tags": ["x", "ü"]}
    recording = invent(tmp_path_factory.mktemp("a"), settings=settings, lost=7)
    found = [
        finding(severity="advice", title="Least."),
        finding(severity="critical", title="Worst.", where=tuple(f"L{i}" for i in range(9))),
        finding(title="Middle.", source="javascript:alert(1)"),
    ]
    return render_runs([Run("a", "", recording, found)], VERSIONS)


def test_findings_are_said_first_the_worst_before_the_others(page):
    order = [page.index(text) for text in ("Worst.", "Middle.", "Least.", 'id="chart-heatmap"')]
    assert order == sorted(order)
    for text in ("0.25", "A cause.", "A remedy.", "<code>L8</code>", "and 3 more"):
        assert text in page
    # Only a web address becomes a link.
    assert (
        re.findall(r'<a href="([^"]*)"', page[: page.index("<script")])
        == ["https://arxiv.org/abs/1502.03167"] * 2
    )
    assert "javascript:alert(1)" in page


def test_settings_and_what_was_lost_are_said(page):
    for text in ("rate", "0.125", "ü", "7 samples, overwritten", "12, from step 0 to step 44"):
        assert text in page


def test_layers_that_not_every_run_has_are_said(page, pair, of_pair):
    assert collect(pair).differences == ["with: BatchNorm_0, BatchNorm_1, BatchNorm_2"]
    assert "Not every run has the same layers" in of_pair.read_text()
    assert "Not every run has the same layers" not in page


@needs_chromium
def test_every_chart_is_drawn_and_nothing_is_asked_of_the_network(show, of_pair):
    browser = show(page=of_pair)
    shown = browser.run(
        "[...document.querySelectorAll('.chart')].filter((c) => c.querySelector('svg'))"
        ".map((c) => c.id)"
    )
    panels = ("mean_drift", "variance_ratio", "kl_divergence", "l2", "cosine", "loss")
    assert set(shown) == {
        "chart-heatmap", "chart-histogram", "chart-band", "chart-channels", "chart-metric-0",
        "chart-updates", *(f"chart-panel-{name}" for name in panels),
    }  # fmt: skip
    assert browser.requests and browser.run("window.hacked") is None


@needs_chromium
def test_the_run_is_toggled_in_place_on_one_scale(show, of_pair):
    browser = show(page=of_pair)
    legend = "document.querySelector('#chart-heatmap .role-legend').innerHTML"
    before, scale = browser.drawn("heatmap"), browser.run(legend)
    browser.choose('input[name="run"][value="1"]')
    after = browser.drawn("heatmap")
    assert before != after and browser.run(legend) == scale
    assert "relu_0" in before and "relu_0" in after
    for name in ("band", "histogram"):
        assert browser.drawn(name)
    assert browser.run("document.querySelector('#empty-channels').hidden") is False
    assert browser.run("document.querySelector('#no-shift').hidden") is False
    browser.choose('input[name="run"][value="0"]')
    assert browser.drawn("heatmap") == before


@needs_chromium
def test_each_choice_changes_what_is_drawn(show, of_pair):
    browser = show(page=of_pair)
    for selector, value, chart in (
        ("#measure", "skewness", "heatmap"),
        ('input[name="kind"][value="norm-input"]', None, "heatmap"),
        ("#place", "5", "band"),
        ("#place", "1", "panel-mean_drift"),
        ("#shift", "3", "panel-l2"),
        ("#norm", "8", "channels"),
        ("#step", "2", "histogram"),
        ("#step", "4", "band"),
        ("#step", "6", "heatmap"),
    ):
        before = browser.drawn(chart)
        browser.choose(selector, value)
        assert browser.drawn(chart) != before, (selector, value)
    caption = browser.run("document.querySelector('#measure-good').textContent")
    assert caption == STYLES["skewness"].good


@needs_chromium
def test_the_slider_and_the_choices_work_by_keyboard(show, of_pair):
    browser = show(page=of_pair)
    browser.run("document.querySelector('#step').focus()")
    before = browser.drawn("histogram")
    browser.press("ArrowLeft", 37)
    assert browser.run("document.querySelector('#step').ariaValueText") == "step 40"
    assert browser.drawn("histogram") != before
    browser.run("document.querySelector('input[name=run]').focus()")
    browser.press("ArrowRight", 39)
    assert browser.run("document.querySelector('input[name=run]:checked').value") == "1"


@needs_chromium
def test_the_page_shows_the_numbers_of_the_recording(show, pair, of_pair):
    browser = show(page=of_pair)
    recording = pair[0].recording
    cells = values(browser, "heatmap", "cells")
    places = [p for p in recording.places if p.kind == "relu" and p.side == "input"]
    assert len(cells) == len(places) * len(recording)
    moments = recording["relu_1:input"].value.moments
    expected = np.sqrt(moments.m2 / moments.count)
    found = [cell["value"] for cell in cells if cell["layer"] == "relu_1"]
    np.testing.assert_allclose(found, expected, rtol=0.01)
    bars = values(browser, "histogram", "bars")
    counts = recording["relu_0:input"].value.histogram[-1]
    assert abs(sum(bar["count"] for bar in bars) - counts.sum()) < 0.03 * counts.sum()
    [now] = values(browser, "band", "now")
    assert now["step"] == recording.steps[-1]
    browser.choose("#table-heatmap summary")
    table = browser.run("document.querySelector('#table-heatmap table').innerText")
    assert "relu_2" in table and "step 44" in table


@needs_chromium
def test_the_first_sample_has_no_drift_and_a_broken_run_is_seen(show, tmp_path):
    def spoil(arrays):
        for name, array in arrays.items():
            counted = name.endswith("histogram")
            array[6:] = 0 if counted else np.inf if "mean" in name else np.nan

    browser = show(Run("broken", "", invent(tmp_path / "a", spoil=spoil)))
    browser.choose("#measure", "mean_drift")
    cells = [cell for cell in values(browser, "heatmap", "cells") if cell["layer"] == "relu_0"]
    assert [cell["step"] for cell in cells] == [4 * i for i in range(1, 6)]
    broken = [cell for cell in values(browser, "heatmap", "broken") if cell["layer"] == "relu_0"]
    assert [cell["step"] for cell in broken] == [4 * i for i in range(6, 12)]
    assert {cell["said"] for cell in broken} <= {"not a number", "infinite"}
    assert NOT_FINITE in browser.drawn("heatmap")


@needs_chromium
@pytest.mark.parametrize(
    "options",
    [
        {"norm": ""},
        {"nonlinearity": ""},
        {"norm": "", "nonlinearity": "Dense"},
        {"norm": "", "nonlinearity": ""},
        {"samples": 1},
        {"spoil": filled(np.nan)},
        {"spoil": filled(-np.inf)},
        {"spoil": filled(0)},
        {"spoil": filled(3e38)},
    ],
    ids=["no-norm", "no-nonlinearity", "other", "nothing", "one", "nan", "inf", "zero", "huge"],
)
def test_a_run_that_lacks_something_is_a_clear_page(show, tmp_path, options):
    browser = show(Run("odd", "", invent(tmp_path / "a", **options)))
    for name in MEASURES:
        if browser.run(f"Boolean(document.querySelector('#measure option[value={name}]'))"):
            browser.choose("#measure", name)
    for kind in KINDS:
        choice = f"document.querySelector('input[value={kind}]')"
        if browser.run(f"{choice} !== null && !{choice}.parentElement.hidden"):
            browser.choose(f"input[value={kind}]")


@needs_chromium
def test_runs_without_a_sample_and_of_other_models_stand_side_by_side(show, tmp_path):
    empty = Run("empty", "", Recording(tmp_path / "none"))
    page = render_runs([empty], VERSIONS)
    assert "empty has no samples yet" in page and "chart-heatmap" not in page
    other = invent(tmp_path / "b", layers=2, norm="LayerNorm", nonlinearity="gelu")
    browser = show(Run("a", "", invent(tmp_path / "a")), Run("b", "", other), empty)
    for run, text in ((1, "gelu_1"), (0, "relu_2")):
        browser.choose(f'input[name="run"][value="{run}"]')
        assert text in browser.drawn("heatmap")
    browser.choose('input[name="run"][value="2"]')
    assert "no samples" in browser.run("document.querySelector('#empty-heatmap').textContent")


@needs_chromium
def test_a_group_shows_its_own_runs(show, tmp_path):
    runs = [
        Run(name, group, invent(tmp_path / f"{group}{name}", layers=layers, norm=norm))
        for group, layers in (("small", 2), ("deep", 4))
        for name, norm in (("with", "BatchNorm"), ("without", ""))
    ]
    browser = show(*runs)
    browser.choose('input[name="run"][value="1"]')
    browser.choose('input[name="group"][value="1"]')
    assert browser.run("document.querySelector('input[name=run]:checked').value") == "3"
    visible = "[...document.querySelectorAll('[data-group]')].filter((l) => !l.hidden).length"
    assert browser.run(visible) == 2
    assert "relu_3" in browser.drawn("heatmap")


@needs_chromium
def test_markup_in_names_is_shown_and_never_run(show, tmp_path):
    def rename(arrays):
        arrays[f"metrics|{HOSTILE}"] = arrays["metrics|loss"]

    recording = invent(tmp_path / "a", prefix=HOSTILE, settings={HOSTILE: HOSTILE}, spoil=rename)
    hostile = finding(
        **dict.fromkeys(("title", "cause", "remedy", "source"), HOSTILE), where=(HOSTILE,),
        evidence={HOSTILE: 1.0},
    )  # fmt: skip
    run = Run(HOSTILE, HOSTILE, recording, [hostile])
    assert HOSTILE not in render_runs([run], VERSIONS)
    browser = show(run, Run("b", "other", invent(tmp_path / "b")))
    browser.choose("#table-heatmap summary")
    browser.choose("#table-agreement summary")
    # The tooltip, too.
    browser.run(
        "document.querySelector('#chart-heatmap .mark-rect path').dispatchEvent("
        "new MouseEvent('mousemove', {bubbles: true, clientX: 300, clientY: 300}))"
    )
    assert HOSTILE in browser.run("document.body.innerText")
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('img, main b img').length") == 0


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_of_it(show, of_pair, dark):
    browser = show(page=of_pair, width=390, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.run(
        "[...document.querySelectorAll('.chart svg')].every((svg) => "
        "svg.getBoundingClientRect().right <= 390)"
    )
    lowest = THEME["#053061"] if dark else "#053061"
    red, green, blue = bytes.fromhex(lowest[1:])
    assert f"rgb({red}, {green}, {blue})" in browser.drawn("heatmap")


@needs_chromium
def test_a_page_follows_when_the_lights_go_out(show, of_pair):
    browser = show(page=of_pair)
    before = browser.drawn("heatmap")
    browser.look(dark=True)
    # The page gets the event some time later. If it never changes, the test fails.
    browser.wait(
        f"document.querySelector('#chart-heatmap svg')?.innerHTML !== {json.dumps(before)}"
    )
    browser.settle()
    assert browser.drawn("heatmap") != before
