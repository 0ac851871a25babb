"""Runs in processes of their own: killed at any moment, and several that share one state."""

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
from flax import linen as nn

from jaxnorm.training import create_train_state
from jaxnorm.training.checkpoint import Checkpoints

STEPS, KILLS = 60, 2


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "RESUMABLE_CACHE": str(cache), "PYTHONPATH": str(root)}

    def start(folder, out):
        script = Path(__file__).with_name("resumable.py")
        command = [sys.executable, "-W", "error", str(script), str(folder), str(out), str(STEPS)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.seconds(240, "four processes, one after the other")
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, launch):
    def finish(process):
        said, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints
        return said.split()

    uninterrupted = finish(launch(tmp_path / "whole", tmp_path / "whole.npz"))
    assert uninterrupted == ["from", "0", "done", str(STEPS)]
    folder, out = tmp_path / "run", tmp_path / "run.npz"
    checkpoints, starts = Checkpoints(folder), []
    seed = int(os.environ.get("JAXNORM_TEST_SEED") or time.time_ns() % 2**32)
    print(f"JAXNORM_TEST_SEED={seed} kills at these moments again")
    moments = random.Random(seed)
    for _ in range(KILLS):
        before, process = checkpoints.latest(), launch(folder, out)
        while checkpoints.latest() == before and process.poll() is None:
            time.sleep(0.01)
        # A checkpoint takes about a tenth of a second, and one follows the other.
        delay = moments.uniform(0, 0.3)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said, complaints = process.communicate()
        left = [p.name for p in folder.iterdir()]
        print(f"killed after {delay:.3f} s; said {said.split()}, left {left}")
        assert process.returncode == -signal.SIGKILL, complaints
        starts.append(int(said.split()[1]))
    said = finish(launch(folder, out))
    assert starts == sorted(set(starts)) and int(said[1]) > starts[-1]
    with np.load(tmp_path / "whole.npz") as whole, np.load(out) as resumed:
        assert set(whole) == set(resumed) and len(whole) > 15
        for name in whole:
            assert whole[name].dtype == resumed[name].dtype
            assert whole[name].tobytes() == resumed[name].tobytes(), name


@pytest.mark.seconds(90, "two processes")
def test_two_processes_agree(tmp_path):
    """They restore what one process saved, and that process what they saved."""
    state = create_train_state(nn.BatchNorm(), optax.sgd(0.1), 3, jnp.ones((1, 3)))
    wide = jnp.arange(32.0).reshape(8, 4)
    state = state.replace(model_state={"wide": wide})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data={"at": 0})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).with_name("two_processes.py"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
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
