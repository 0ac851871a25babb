"""The peers of the benchmarks compute the same numbers as the oracle."""

import sys
from pathlib import Path

import numpy as np

from jaxnorm.testing import rounding_units

ROOT = str(Path(__file__).resolve().parents[2])


def test_torch_computes_the_same(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # `benchmarks` is no part of the installed package
    sys.modules.pop("benchmarks", None)
    from benchmarks import accuracy, peers

    for norm in peers.norms(3):
        assert peers.TORCH.has(norm) and not peers.TORCH.has(peers.WEIGHT)
        inputs = accuracy.inputs_of(accuracy.LAYOUTS[1], np.float32, 0.0, 1.0, "none")
        got, exact = peers.TORCH.run(norm, **inputs), norm.exact(**inputs)
        for name, found in got.items():
            what = "value" if name == "y" else "derivative"
            assert rounding_units(found, exact[name], what=what) < 64, (norm.name, name)
