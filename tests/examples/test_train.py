"""The example trains alike with one process and with several, and continues after a kill."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICK_FLAGS
from launching import ENVIRONMENT, gone

from jaxnorm.examples import train
from jaxnorm.lab.data import LabeledImages
from jaxnorm.training import create_train_state
from jaxnorm.training.checkpoint import Checkpoints

PROGRAM = [sys.executable, "-m", "jaxnorm.examples.train"]
EVERY = 4


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment variables with a cache, so that no program is compiled twice."""
    return ENVIRONMENT | {
        "XLA_FLAGS": " ".join(QUICK_FLAGS),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(environment, *options, **more):
    return subprocess.Popen(
        [*PROGRAM, "--every", str(EVERY), *map(str, options)],
        env=environment | more, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(*processes) -> list[str]:
    """The outputs of the processes; in the end none of them is running."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        said = [process.communicate(timeout=100) for process in processes]
    for process, (_, errors) in zip(processes, said):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


def workers(launcher: int) -> dict[str, int]:
    """The index of each process -> its pid."""
    pids = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for pid in pids:
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {
            v.partition("=")[2]: int(pid) for v in variables if v.startswith("JAX_PROCESS_ID")
        }
    return found


def interrupted(environment, folder) -> int:
    """The newest checkpoint of two processes, one of which was killed."""
    options = ("--processes", 2, "--checkpoints", folder, "--steps", 100_000, "--layout", "fsdp")
    checkpoints, end = Checkpoints(folder), time.monotonic() + 100
    with start(environment, *options) as launcher:
        try:
            while checkpoints.latest() is None and time.monotonic() < end:
                assert launcher.poll() is None, launcher.communicate()[1]
                time.sleep(0.02)
            pids = workers(launcher.pid)
            os.kill(pids["1"], signal.SIGKILL)
            _, errors = launcher.communicate(timeout=20)
        finally:
            launcher.kill()
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was killed by SIGKILL" in errors
    assert gone(pids.values(), within=0)
    step = checkpoints.latest()
    assert step is not None and step % EVERY == 0
    return step


def final_state(folder, step):
    template = jax.eval_shape(
        lambda x: create_train_state(train.ConvNet(10), train.OPTIMIZER, 0, x),
        jnp.ones((1, 8, 8, 1)),
    )
    return Checkpoints(folder).restore(template, step)[0]


@pytest.mark.seconds(60, "it trains twice")
def test_a_run_goes_on_from_its_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "initialize", lambda: False)  # it must come before JAX's first use
    options = ["--every", "2", "--layout", "fsdp", "--checkpoints", str(tmp_path / "run")]
    assert train.main([*options, "--steps", "2"]) == train.main([*options, "--steps", "20"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 processes, 8 devices, batch 64\nstep     2  loss ")
    assert "going on from step 2\nstep     4  loss " in said
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    assert len(re.findall(r"^test accuracy [\d.]+%$", said, re.M)) == 2
    assert final_state(tmp_path / "run", 20).step == 20


@pytest.mark.slow
@pytest.mark.seconds(240, "five processes that train")
def test_a_killed_run_goes_on_under_slurm_and_ends_where_one_process_does(environment, tmp_path):
    """Two processes that split batch and parameters, started twice, against a single process."""
    several, alone = tmp_path / "several", tmp_path / "alone"
    reached = interrupted(environment, several)
    last = reached + EVERY

    with socket.socket() as holder:  # keeps the port free for the coordinator
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        slurm = {
            "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
            "JAX_COORDINATOR_PORT": str(holder.getsockname()[1]),
        }  # fmt: skip
        options = ("--steps", last, "--checkpoints", several, "--layout", "fsdp")
        own = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
        first, second = finish(*(start(environment, *options, **slurm, **mine) for mine in own))
    (single,) = finish(start(environment, "--steps", last, "--checkpoints", alone))

    assert "2 processes, 2 devices, batch 64\n" in first
    assert f"going on from step {reached}\n" in first
    assert "1 processes, 1 devices, batch 64\nstep" in single
    assert "accuracy" not in second
    accuracies = [re.search(r"test accuracy ([\d.]+)%", out) for out in (first, single)]
    assert all(accuracies) and abs(np.diff([float(a[1]) for a in accuracies if a])[0]) < 1.1

    got, wanted = (final_state(folder, last) for folder in (several, alone))
    got, wanted = ((s.params, s.batch_stats) for s in (got, wanted))
    for (path, leaf), right in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        size = np.abs(right).max()
        np.testing.assert_allclose(leaf / size, right / size, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize(
    "options, told",
    [
        (("--steps", 0), "must be an integer of 1 or more; got '0'"),
        (("--processes", -1), "must be an integer of 1 or more; got '-1'"),
        (("--layout", "tensor"), "invalid choice: 'tensor'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, told, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(list(map(str, options)))
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.sample
@pytest.mark.seconds(90, "the first import of scikit-learn")
def test_the_shares_of_all_processes_are_the_batch(monkeypatch):
    part = train.load_digits().train
    whole = train.training_batch(part, seed=3, step=40, size=16)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    shares = []
    for index in range(4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(train.training_batch(part, seed=3, step=40, size=16))
    for name, rows in whole.items():
        parts = np.concatenate([share[name] for share in shares])
        assert sorted(map(bytes, parts)) == sorted(map(bytes, rows))


def test_every_epoch_has_every_image_once_in_an_order_of_its_own():
    numbered = LabeledImages(np.arange(64), np.arange(64))
    epochs = [
        [train.training_batch(numbered, 3, epoch * 4 + i, 16)["x"] for i in range(4)]
        for epoch in (0, 1)
    ]
    first, second = (np.concatenate(epoch) for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(64))
    assert not np.array_equal(first, second)
