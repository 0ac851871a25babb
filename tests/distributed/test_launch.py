"""Processes find each other, end together, and leave no process running."""

import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from launching import ENVIRONMENT, alive, gone, launcher, run

from jaxnorm.distributed import ProcessError, initialize, launch

JOINED = "from jaxnorm.distributed import initialize; initialize(timeout=60); "
PRINT_PID = "import os; print('pid', os.getpid(), flush=True); "


@pytest.mark.seconds(90, "three processes")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_launcher(number):
    """A pipe binds the processes to the launcher, so they end even if it is killed."""
    program = "import time; " + JOINED + PRINT_PID + "time.sleep(60)"
    options = launcher("-c", program)
    with subprocess.Popen(**options, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stderr
            lines = [process.stdout.readline().split() for _ in range(2)]
            assert sorted(line[0] for line in lines) == ["[0]", "[1]"]
            pids = [int(line[2]) for line in lines]
            assert all(map(alive, pids))
            process.send_signal(number)
            assert gone(pids)
            status = process.wait(10)
        finally:
            process.kill()
        if number == signal.SIGINT:
            assert (status, process.stderr.read()) == (
                130, "launch: interrupted; all processes were ended.\n"
            )  # fmt: skip


@pytest.mark.seconds(90, "three processes")
def test_an_exception_ends_the_run():
    """Without `initialize`'s hook, process 1 would wait at its exit for the other process."""
    program = JOINED + PRINT_PID + (
        "import jax, time\n"
        "if jax.process_index() == 1: raise KeyError('of process 1')\n"
        "time.sleep(60)"
    )  # fmt: skip
    start = time.monotonic()
    done = run("-c", program)
    assert time.monotonic() - start < 50
    assert done.returncode == 1
    assert "[1] KeyError: 'of process 1'" in done.stderr
    assert "process 1 of 2 ended with status 1." in done.stderr
    pids = [int(line.split()[2]) for line in done.stdout.splitlines() if " pid " in line]
    assert len(pids) == 2 and gone(pids)


@pytest.mark.sample
@pytest.mark.parametrize(
    "end, status, told",
    [
        ("sys.exit(3)", 3, "process 2 of 3 ended with status 3"),
        ("os.kill(os.getpid(), 9)", 137, "process 2 of 3 was killed by SIGKILL"),
    ],
)
def test_the_first_to_fail_is_named_and_the_rest_are_killed(end, status, told, capfd):
    program = PRINT_PID + (
        "import sys, time\n"
        f"if os.environ['JAX_PROCESS_ID'] == '2': time.sleep(0.3); {end}\n"
        "time.sleep(60)"
    )  # fmt: skip
    start = time.monotonic()
    assert launch(["-c", program], 3) == status
    assert time.monotonic() - start < 20
    out, err = capfd.readouterr()
    assert err.startswith(f"launch: all processes must succeed; {told}. The others were ended")
    lines = [line.split() for line in out.splitlines()]
    assert sorted(line[0] for line in lines) == ["[0]", "[1]", "[2]"]
    assert gone([int(line[2]) for line in lines], within=0)


def test_each_process_has_its_own_environment(capfd):
    names = "JAX_PROCESS_ID", "JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS"
    program = f"import os, sys; print(*map(os.environ.get, {names!r})); print('x', file=sys.stderr)"
    assert launch(["-c", program], 2, devices_per_process=3) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] 0 3 0,1,2", "[1] 1 3 3,4,5"]
    assert sorted(err.splitlines()) == ["[0] x", "[1] x"]


def test_launch_refuses(monkeypatch):
    with pytest.raises(ProcessError, match="must be integers of 1 or more; got processes=0"):
        launch(["-c", ""], 0)
    with pytest.raises(ProcessError, match="got processes='2'"):
        launch(["-c", ""], "2")  # type: ignore[arg-type]
    with pytest.raises(ProcessError, match="got processes=1, devices_per_process=0"):
        launch(["-c", ""], 1, devices_per_process=0)
    monkeypatch.setenv("JAXNORM_LAUNCHER", "3")
    with pytest.raises(ProcessError, match="a process that was launched cannot launch others"):
        launch(["-c", ""], 2)


ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@pytest.mark.parametrize(
    "variables",
    [
        {COUNT: "2", INDEX: "0"},
        {ADDRESS: "localhost:1234", COUNT: "2"},
        {ADDRESS: "localhost:1234", INDEX: "1"},
        {ADDRESS: "localhost:1234", COUNT: "2", INDEX: "2"},
        {ADDRESS: "localhost:1234", COUNT: "2", INDEX: "-1"},
        {ADDRESS: "localhost:1234", COUNT: "two", INDEX: "0"},
        {ADDRESS: "localhost", COUNT: "2", INDEX: "0"},
        {ADDRESS: ":1234", COUNT: "2", INDEX: "0"},
        {ADDRESS: "localhost:70000", COUNT: "2", INDEX: "0"},
    ],
    ids=str,
)
def test_incomplete_variables_are_refused(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=r"^initialize: the environment must say") as raised:
        initialize(timeout=1)
    for name, value in variables.items():
        assert f"{name}={value!r}" in str(raised.value)


def test_a_coordinator_that_is_not_there_is_named(monkeypatch):
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        for name, value in {ADDRESS: address, COUNT: "2", INDEX: "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ProcessError, match=f"nobody did at '{address}' within 0.2 s"):
            initialize(timeout=0.2)


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for name, value in {ADDRESS: address, COUNT: "2", INDEX: "0"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ProcessError, match=f"'{address}' cannot be opened"):
            initialize()


@pytest.mark.sample
def test_initialize_comes_first():
    jax.devices()
    with pytest.raises(ProcessError, match="it must come before JAX's first use"):
        initialize()


def test_missing_processes_are_told_of_before_jax_aborts(monkeypatch, caplog):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.5))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name, value in {ADDRESS: "localhost:1234", COUNT: "2", INDEX: "0"}.items():
        monkeypatch.setenv(name, value)
    assert initialize(timeout=0.1)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "initialize: all processes of the run must meet within 0.1 s; not all have come"
    )


def test_a_program_alone_goes_on():
    program = (
        "from jaxnorm.distributed import initialize; first = initialize(); import jax; "
        "print(first, jax.process_count(), initialize())"  # a second call may come late
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=ENVIRONMENT, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "False 1 False\n", done.stderr
