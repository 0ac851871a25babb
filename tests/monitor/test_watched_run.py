"""Two processes with two devices each see what one process with eight of them sees."""

from pathlib import Path

import jax
import numpy as np
import pytest
from launching import run
from monitor.watched_run import train

from jaxnorm.monitor import Recording


@pytest.mark.seconds(90, "two processes, and one")
def test_two_processes_record_what_one_does(tmp_path):
    assert jax.device_count() == 8
    script = str(Path(__file__).with_name("watched_run.py"))
    launched = run(script, tmp_path / "two", devices=2)
    assert launched.returncode == 0, launched.stderr
    train(tmp_path / "one")
    two, one = Recording(tmp_path / "two"), Recording(tmp_path / "one")
    assert two.steps.tolist() == one.steps.tolist() == [0, 3, 6]
    assert list(two) == list(one)
    for name in one:
        for a, b in zip(jax.tree.leaves(two[name]), jax.tree.leaves(one[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)
    for name, norms in one.parameters.items():
        np.testing.assert_allclose(two.parameters[name], norms, rtol=1e-3, atol=1e-6, err_msg=name)
