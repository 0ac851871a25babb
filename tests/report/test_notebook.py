"""The views of recordings and findings in a notebook."""

import html.parser
import importlib
import sys

import pytest
from browser import Browser, needs_chromium
from IPython.core.formatters import DisplayFormatter
from recordings import invent

from jaxnorm.monitor import Recording, findings
from jaxnorm.report import notebook

NOTE = findings.Finding(
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
    shown, _ = DisplayFormatter().format(thing)
    return shown


def test_a_recording_shows_its_page(tmp_path):
    shown = displayed(invent(tmp_path / "run"))
    assert set(shown) == {"text/plain", "text/html"}
    [page] = Frames(shown["text/html"]).pages
    assert page.startswith("<!doctype html>") and "Inside run" in page
    assert "default-src 'none'" in page


def test_findings_show_themselves_without_scripts():
    one = displayed(NOTE)["text/html"]
    both = displayed(findings.Findings([NOTE, NOTE]))["text/html"]
    assert one.count("<article") == 1 and both.count("<article") == 2
    assert "&lt;i&gt;the matter" in one and "0.25" in one and "A remedy." in one
    assert "<script" not in one and "<b>:input" not in one
    assert "Nothing found" in displayed(findings.Findings())["text/html"]


def test_a_recording_without_samples_shows_that(tmp_path):
    [page] = Frames(displayed(Recording(tmp_path / "new"))["text/html"]).pages
    assert "has no samples yet" in page


def test_without_the_packages_of_the_extra_there_is_the_text(tmp_path, monkeypatch):
    recording = invent(tmp_path / "run")
    for name in ("jaxnorm.report", "jaxnorm.report.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("jaxnorm.report")]:
        monkeypatch.delitem(sys.modules, name)
    assert set(displayed(recording)) == {"text/plain"}
    assert set(displayed(NOTE)) == {"text/plain"}
    monkeypatch.undo()
    importlib.import_module("jaxnorm.report")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_notebook_asks_nothing_of_the_network(tmp_path, dark):
    shown = notebook.show(invent(tmp_path / "run")) + notebook.show([NOTE])
    (tmp_path / "cell.html").write_text(f"<!doctype html><main>{shown}</main>")
    with Browser(tmp_path / "profile") as browser:
        browser.look(dark=dark)
        browser.call("Page.navigate", url=f"file://{tmp_path / 'cell.html'}")
        browser.wait("document.readyState === 'complete' && document.querySelector('iframe')")
        assert "Something is <i>the matter</i>." in browser.run("document.body.innerText")
        assert browser.complaints == []
        assert not [url for url in browser.requests if url.startswith("http")]
