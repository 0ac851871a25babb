"""The selection of tests: a sample with `--sample`; slow tests only with `-m slow`.

A slow test has a smaller form that always runs: a notebook up to its first plot, an example in one
process.

`--sample` is for a second Python and for other versions of packages. They may change how JAX, Flax
and the rest are called, but not the numbers. It takes the tests that are marked
`@pytest.mark.sample`, at least one for each transformation, layer, step, kind of model, checkpoint,
probe, recording, command and launch, and all doctests. A marked test runs once for each value of
the arguments below. If it has none of these arguments, its first case runs.
"""

import pytest

KINDS = (
    "transformation", "name", "norm", "normalization", "network", "framework", "kind", "context",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--sample", action="store_true", help="a few cases of the tests marked so, and all doctests"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "sample: it also runs with other Python and package versions"
    )
    config.addinivalue_line("markers", "slow: it runs with -m slow; a smaller form, always")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("sample"):
        return
    seen, chosen, rest = set(), [], []
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            chosen.append(item)
            continue
        if item.get_closest_marker("sample") is None:
            rest.append(item)
            continue
        test = item.nodeid.split("[")[0]
        given = item.callspec.params if hasattr(item, "callspec") else {}
        kinds = {(test, kind, repr(given[kind])) for kind in KINDS if kind in given}
        new = (kinds or {(test,)}) - seen
        (chosen if new else rest).append(item)
        seen |= new
    config.hook.pytest_deselected(items=rest)
    items[:] = chosen
