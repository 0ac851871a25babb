"""A time limit for tests, and a table with the seconds of each room.

With `--budget`, which `.ci/run` uses, a test that takes too many seconds fails, unless it is marked
`@pytest.mark.seconds(40, "why")`. A skipped test fails too, so that no test is left out without
notice. A table of rooms ends the run.
"""

from collections import Counter
from pathlib import Path

import pytest

SPENT = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="a test that takes longer fails unless it says why; so does one that is skipped",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "seconds(most, why): how long this test may take, and why so long"
    )
    if config.getoption("budget") is not None:
        config.pluginmanager.register(Rooms(Path(config.rootpath)), "rooms")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    budget = item.config.getoption("budget")
    if budget is None:
        return report
    # What is set up for a whole file is the first test's: it fails with the rest.
    item.stash[SPENT] = item.stash.get(SPENT, 0.0) + call.duration
    most, why = budget, ""
    for mark in item.iter_markers("seconds"):
        most, why = mark.args
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"it was skipped: {report.longrepr[-1]}"
    elif report.when == "call" and report.passed and item.stash[SPENT] > most:
        report.outcome = "failed"
        report.longrepr = (
            f"it took {item.stash[SPENT]:.1f} s of {most:g}{f' ({why})' if why else ''}. Make it "
            'shorter, or say why it cannot be: @pytest.mark.seconds(most, "why").'
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Count a file that is skipped as a whole, which has no tests to count."""
    report = yield
    if report.skipped and collector.config.getoption("budget") is not None:
        report.outcome, report.longrepr = "failed", f"it was skipped: {report.longrepr[-1]}"
    return report


class Rooms:
    """A pytest plugin that adds up the seconds of the tests of each folder."""

    def __init__(self, root: Path):
        self.root = root
        self.seconds, self.tests = Counter(), Counter()

    def pytest_runtest_logreport(self, report):
        parts = Path(report.nodeid.split("::")[0]).parts
        # Of what lies in `tests` or `jaxnorm` itself the file is the room; the rest is doctests.
        room = "doctests" if parts[0] == "jaxnorm" else "/".join(parts[:2])
        self.seconds[room] += report.duration
        self.tests[room] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("seconds of each room")
        for room, seconds in self.seconds.most_common():
            terminalreporter.line(f"{seconds:8.1f} s  {self.tests[room]:5} tests  {room}")
