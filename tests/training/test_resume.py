"""Runs in other processes: killed at any moment, and several that share one state."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import QUICK_FLAGS
from flax import linen as nn

from jaxnorm.training import create_train_state
from jaxnorm.training.checkpoint import Checkpoints

STEPS = 40


@pytest.fixture
def launch(tmp_path):
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "RESUMABLE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root)
    }  # fmt: skip

    def start(*runs):
        script = Path(__file__).with_name("resumable.py")
        paths = (str(path) for run in runs for path in (run, run.with_suffix(".npz")))
        command = [sys.executable, "-W", "error", str(script), str(STEPS), *paths]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.seconds(90, "two processes, one after the other")
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, launch):
    run, uninterrupted = tmp_path / "run", tmp_path / "whole"
    checkpoints, process = Checkpoints(run), launch(run)
    while checkpoints.latest() is None and process.poll() is None:
        time.sleep(0.01)
    seed = int(os.environ.get("JAXNORM_TEST_SEED") or time.time_ns() % 2**32)
    # A checkpoint takes about a tenth of a second, and one follows the other.
    delay = random.Random(seed).uniform(0, 0.3)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    said, complaints = process.communicate()
    print(f"JAXNORM_TEST_SEED={seed} kills after {delay:.3f} s again")
    print(f"said {said.split()}, left {[p.name for p in run.iterdir()]}")
    assert process.returncode == -signal.SIGKILL, complaints
    process = launch(run, uninterrupted)
    said, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    _, start, *rest = said.split()
    assert int(start) > 0 and rest == ["done", str(STEPS), "from", "0", "done", str(STEPS)]
    assert checkpoints.latest() == STEPS
    with np.load(f"{uninterrupted}.npz") as whole, np.load(f"{run}.npz") as resumed:
        assert set(whole) == set(resumed) and len(whole) > 15
        for name in whole:
            assert whole[name].dtype == resumed[name].dtype
            assert whole[name].tobytes() == resumed[name].tobytes(), name


@pytest.mark.seconds(90, "two processes")
def test_two_processes_agree(tmp_path):
    """Two processes restore a checkpoint of one process, and that process restores theirs."""
    state = create_train_state(nn.BatchNorm(), optax.sgd(0.1), 3, jnp.ones((1, 3)))
    wide = jnp.arange(32.0).reshape(8, 4)
    state = state.replace(model_state={"wide": wide})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data={"at": 0})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).with_name("two_processes.py"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": " ".join((*QUICK_FLAGS, "--xla_force_host_platform_device_count=2")),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [process.communicate(timeout=120) for process in processes]
    for process, (answer, complaints) in zip(processes, answers):
        assert process.returncode == 0, complaints
        said = json.loads(answer.splitlines()[-1])
        assert said["data"] == {"at": 0}
        assert "with 2 processes every leaf must lie on a mesh" in said["local"]
        assert "has step 0 already" in said["again"]
        assert said["drifted"].startswith("ValueError: Checkpoints.save: all copies")
        assert said["step"] == 0
        assert "step 1" in said["warned"][0] and "Restored step 0 instead" in said["warned"][0]
    with Checkpoints(tmp_path) as checkpoints:
        restored, data = checkpoints.restore(state)
    assert data == {"at": 1} and int(restored.step) == 1
    np.testing.assert_array_equal(restored.model_state["wide"], wide + 1)
    np.testing.assert_array_equal(jax.random.key_data(restored.rng), jax.random.key_data(state.rng))
