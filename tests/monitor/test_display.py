"""Tables that a notebook shows of recordings and findings, without any other package."""

import html.parser
import subprocess
import sys

import numpy as np
from IPython.core.formatters import DisplayFormatter
from recordings import invent

from jaxnorm.monitor import Finding, Findings, Recording

NOTE = Finding(
    "made-up", "critical", ("<b>:input",), "Something is <i>the matter</i>.", "A cause.",
    "A remedy.", "https://arxiv.org/abs/1502.03167", {"share": 0.25},
)  # fmt: skip


class Rows(html.parser.HTMLParser):
    """The rows of the tables in a text, cell by cell."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag not in ("th", "td")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def displayed(thing):
    shown, _ = DisplayFormatter().format(thing)
    assert set(shown) == {"text/plain", "text/html"}
    return shown["text/html"]


def spoiled(arrays):
    arrays["observations|values|nonfinite"][-1, 4] = 0.5


def test_a_recording_shows_its_last_sample(tmp_path):
    recording = invent(tmp_path / "<run>", lost=2)
    text = displayed(recording)
    assert "12 samples, steps 0 to 44" in text and "2 lost" in text and "&lt;run&gt;" in text
    assert f"loss {recording.metrics['loss'][-1]:.3g}" in text
    heads, *rows = Rows(text).rows
    assert [row[0] for row in rows] == list(recording) and "not finite" not in heads
    for name, row in zip(recording, rows):
        value, number = recording[name].value, dict(zip(heads, row))
        assert number["mean"] == f"{value.moments.mean[-1]:.3g}"
        assert number["variance"] == f"{np.asarray(value.moments.var)[-1]:.3g}"
        assert number["maximum"] == f"{value.maximum[-1]:.3g}"
        assert number["gradient norm"] == f"{recording[name].gradient.norm[-1]:.3g}"


def test_a_share_that_is_not_finite_has_a_column(tmp_path):
    heads, *rows = Rows(displayed(invent(tmp_path / "run", spoil=spoiled))).rows
    assert [row[heads.index("not finite")] for row in rows].count("0.5") == 1


def test_a_recording_without_samples_says_so(tmp_path):
    assert "no samples yet" in displayed(Recording(tmp_path / "new"))


def test_findings_show_themselves():
    one, both = displayed(NOTE), displayed(Findings([NOTE, NOTE]))
    assert one.count("<article") == 1 and both.count("<article") == 2
    assert "&lt;i&gt;the matter" in one and "A remedy." in one
    assert ["share", "0.25"] in Rows(one).rows
    assert "<script" not in one and "<b>:input" not in one
    assert 'href="https://arxiv.org/abs/1502.03167"' in one
    assert "Nothing found" in displayed(Findings())


def test_the_report_is_not_needed():
    program = (
        "import sys; from jaxnorm.monitor import Findings; Findings()._repr_html_(); "
        "print([n for n in sys.modules if n.startswith(('jaxnorm.report', 'altair', 'jinja2'))])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.decode().strip() == "[]"
