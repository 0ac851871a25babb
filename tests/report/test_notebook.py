"""The views of recordings and findings in a notebook."""

import html.parser

import pytest
from browser import Browser, needs_chromium
from IPython.core.formatters import DisplayFormatter
from recordings import invent

from jaxnorm.monitor import Finding, Findings, Recording
from jaxnorm.report import show

NOTE = Finding(
    "made-up", "critical", ("<b>:input",), "Something is <i>the matter</i>.", "A cause.",
    "A remedy.", "https://arxiv.org/abs/1502.03167", {"share": 0.25},
)  # fmt: skip


class Frames(html.parser.HTMLParser):
    """A parser that collects the pages inside the frames of a text."""

    def __init__(self, text):
        super().__init__()
        self.pages = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "iframe":
            self.pages.append(dict(attrs)["srcdoc"])


def displayed(thing):
    shown, _ = DisplayFormatter().format(show(thing))
    return shown["text/html"]


def test_a_recording_shows_its_page(tmp_path):
    [page] = Frames(displayed(invent(tmp_path / "run"))).pages
    assert page.startswith("<!doctype html>") and "Inside run" in page
    assert "default-src 'none'" in page


def test_findings_are_shown_without_scripts():
    one, both = displayed(NOTE), displayed(Findings([NOTE, NOTE]))
    assert one.count("<article") == 1 and both.count("<article") == 2
    assert "&lt;i&gt;the matter" in one and "0.25" in one and "A remedy." in one
    assert "<script" not in one and "<b>:input" not in one
    assert "Nothing found" in displayed(Findings())


def test_a_recording_without_samples_shows_that(tmp_path):
    [page] = Frames(displayed(Recording(tmp_path / "new"))).pages
    assert "has no samples yet" in page


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_notebook_asks_nothing_of_the_network(tmp_path, dark):
    recording = invent(tmp_path / "run")
    shown = show(recording) + show([NOTE]) + recording._repr_html_() + NOTE._repr_html_()
    (tmp_path / "cell.html").write_text(f"<!doctype html><main>{shown}</main>")
    with Browser(tmp_path / "profile") as browser:
        browser.look(dark=dark)
        browser.call("Page.navigate", url=f"file://{tmp_path / 'cell.html'}")
        browser.wait("document.readyState === 'complete' && document.querySelector('iframe')")
        assert browser.run("document.body.innerText").count("Something is <i>the matter</i>.") == 2
        assert browser.complaints == []
        assert not [url for url in browser.requests if url.startswith("http")]
