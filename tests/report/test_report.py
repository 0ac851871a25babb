"""The page and the table of a result made by hand: their content, and nothing loaded."""

import html.parser
import json
import re

import numpy as np
import pytest
from browser import Browser, needs_chromium
from recordings import invent
from rich.console import Console

from jaxnorm import report
from jaxnorm.lab import results
from jaxnorm.report.words import LINES, NORMALIZATIONS

HOSTILE = "<img src=x onerror=alert(1)></script>&"
STEPS = (0, 10, 20, 30)


def curves(network, normalization, level):
    draw = np.random.default_rng(0)
    shape = (2, 2, len(STEPS))
    return results.Curves(
        network=network,
        normalization=normalization,
        learning_rates=(0.1, 1.0),
        steps=STEPS,
        train_loss=draw.uniform(size=(2, 2, len(STEPS) - 1)),
        final_loss=np.array([[0.1, 0.2], [np.inf, np.nan]]),
        validation_accuracy=np.linspace(0.1, level, len(STEPS)) * np.ones(shape),
        test_accuracy=np.full((2, 2), level),
    )


@pytest.fixture(scope="module")
def result():
    found = (
        curves("mlp", "none", 0.4),
        curves("mlp", "batch", 0.9),
        curves("conv", "none", 0.7),
        curves("conv", "instance", 0.8),
    )
    names = ("none", "batch", "instance")
    plan = {
        "steps": 30, "batch_size": 60, "learning_rates": (0.1, 1.0), "normalizations": names,
        "decay": True,
    }  # fmt: skip
    return results.StudyResult(
        settings={
            "plans": ({"network": "mlp", **plan}, {"network": "conv", **plan}),
            "seed": 0,
            "seeds": 2,
            "samples": 3,
        },
        data={
            "name": HOSTILE,
            "image_shape": (8, 8, 1),
            "classes": 10,
            "train_images": 100,
            "validation_images": 20,
            "test_images": 30,
        },
        curves=found,
        summaries=(
            *results.summarize_curves(found[:2], names),
            *results.summarize_curves(found[2:], names),
        ),
        recorded=(),
        seconds=1.5,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return [
        report.Run(name, network, invent(folder / f"{network}-{name}", norm=norm))
        for network in ("mlp", "conv")
        for name, norm in (("none", ""), ("batch", "BatchNorm"))
    ]


@pytest.fixture(scope="module")
def page(result, runs):
    return report.render_page(result, {"jaxnorm": "0.1.0", HOSTILE: HOSTILE}, runs)


class Reader(html.parser.HTMLParser):
    """A parser for tags with attributes, text outside scripts and styles, scripts by id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id", f"{tag}-{len(self.scripts)}")

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text.append(data)
        else:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data


def test_the_page_loads_nothing(page):
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        assert not {"src", "href", "srcset", "action", "data", "poster"} & set(attributes), tag
    [policy] = [
        attributes["content"]
        for tag, attributes in reader.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    # With this a browser refuses every request, whatever the embedded libraries may try.
    assert policy.startswith("default-src 'none'") and "http" not in policy
    styles = [text for name, text in reader.scripts.items() if name.startswith("style")]
    assert styles and not any("url(" in text or "@import" in text for text in styles)
    specs = json.loads(reader.scripts["charts"])
    assert "url" not in re.findall(r'"(\w+)":', json.dumps(specs))


def test_the_page_is_under_three_megabytes(page):
    assert len(page.encode()) < 3e6


def test_names_are_escaped(page):
    reader = Reader(page)
    assert HOSTILE not in page
    assert not any("onerror" in attributes for _, attributes in reader.tags)
    assert HOSTILE in "".join(reader.text)  # and still there to read
    assert sum(tag == "script" for tag, _ in reader.tags) == len(reader.scripts) - 1  # the style


def test_every_chart_has_its_place(page):
    reader = Reader(page)
    specs = json.loads(reader.scripts["charts"])
    ids = {attributes.get("id") for _, attributes in reader.tags}
    assert set(specs) == {"curves-mlp", "curves-conv", "rates-mlp", "rates-conv"}
    assert {f"chart-{name}" for name in specs} <= ids


def test_both_outputs_show_the_same_figures(page, result):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in report.build_tables(result):
        console.print(table)
    console.file.close()
    printed = console.export_text()
    shown = "".join(Reader(page).text)
    for figure in ("90.0 ± 0.0 %", "never", "none"):
        assert figure in printed and figure in shown
    line = next(line for line in printed.splitlines() if line.startswith("instance"))
    assert line.split()[1:] == ["-"] * 4
    assert "not applicable" in shown


def test_every_normalization_has_a_name_a_colour_and_a_dash():
    from jaxnorm.lab import networks

    assert set(NORMALIZATIONS) == set(LINES) == set(networks.NORMALIZATIONS)
    assert len({line.light for line in LINES.values()}) == len(LINES)
    assert len({line.dash for line in LINES.values()}) == len(LINES)


@needs_chromium
def test_a_browser_draws_every_chart(page, tmp_path):
    (tmp_path / "report.html").write_text(page)
    with Browser(tmp_path / "profile") as browser:
        browser.look()
        browser.open(tmp_path / "report.html")
        shown = browser.run("[...document.querySelectorAll('.chart:has(svg)')].map((c) => c.id)")
        own = {
            f"chart-{kind}-{network}" for kind in ("curves", "rates") for network in ("mlp", "conv")
        }
        assert own | {"chart-heatmap", "chart-band"} <= set(shown)
        before = browser.drawn("curves-mlp")
        browser.choose('input[name="measure"][value="loss"]')
        assert browser.drawn("curves-mlp") != before
        assert [url for url in browser.requests if not url.startswith("file:")] == []
