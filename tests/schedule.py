"""The tests of a file run in one worker of pytest-xdist.

What a file sets up or compiles once is then made once, not by each worker.
"""

import pytest

# What takes long in these, no other test of the file uses.
APART = ("tests/examples/", "tests/notebooks/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "load":
        return None  # somebody has asked for another
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if nodeid.startswith(APART) else nodeid.split("::")[0]

    # As they are found: long files first, and last of all the doctests, which fill what is left.
    config.option.loadscopereorder = False
    return ByFile(config, log)
