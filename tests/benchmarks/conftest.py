"""Settings for tests of the benchmarks, which are run from the repository."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def from_the_repository():
    """Import `benchmarks` from the repository: it is no part of the installed package.

    The folder `tests/benchmarks` must not be imported in its place.
    """
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    yield
    sys.path.remove(root)
