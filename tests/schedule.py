"""A schedule for pytest-xdist: the tests of a file run in one worker.

So the setup and the compilations of a file are made once, and not by each worker.
"""

import pytest

# The tests of these files share no long setup.
APART = ("tests/examples/", "tests/notebooks/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "load":
        return None  # somebody has asked for another
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if nodeid.startswith(APART) else nodeid.split("::")[0]

    # Keep the order of collection: long files first, and doctests last, which fill the gaps.
    config.option.loadscopereorder = False
    return ByFile(config, log)
