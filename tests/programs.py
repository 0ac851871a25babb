"""Compiled programs, read by `benchmarks.hlo`, which is no part of the installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    from benchmarks.hlo import Program
finally:
    del sys.path[0]

__all__ = ["Program"]
