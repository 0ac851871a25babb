"""How much runs: a few cases of every test with `--sample`, all of a notebook with `--all-cells`.

`--sample` is for a second Python and for other versions of packages. A case is left out if all that
tells it from those before it is on what numbers it runs: of the arguments below each value is taken
once, and of a test that has none of them the first case.
"""

KINDS = (
    "transformation", "name", "norm", "normalization", "network", "framework", "kind", "context",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--sample", action="store_true", help="a few cases of every test")
    parser.addoption(
        "--all-cells",
        action="store_true",
        help="run notebooks to their last cell, not only to the first that draws",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("sample"):
        return
    seen, chosen, rest = set(), [], []
    for item in items:
        test = item.nodeid.split("[")[0]
        given = item.callspec.params if hasattr(item, "callspec") else {}
        kinds = {(test, kind, repr(given[kind])) for kind in KINDS if kind in given}
        new = (kinds or {(test,)}) - seen
        (chosen if new else rest).append(item)
        seen |= new
    config.hook.pytest_deselected(items=rest)
    items[:] = chosen
