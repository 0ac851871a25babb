"""The benchmarks are run from the repository."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def from_the_repository():
    """`benchmarks` is no part of the installed package, and this folder must not pass for it."""
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    yield
    sys.path.remove(root)
