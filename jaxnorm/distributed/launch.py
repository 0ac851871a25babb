"""The processes of one run on one machine: start them, show their output, end them together."""

import _thread
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from jaxnorm.distributed.processes import ADDRESS, COUNT, INDEX, LIFELINE, ProcessError, launched

INTERRUPTED = 130


def launch(arguments: Sequence[str], processes: int, *, devices_per_process: int = 1) -> int:
    """Run copies of a Python program on this machine, as the processes of one run.

    Each copy calls `jaxnorm.distributed.initialize` and finds the others. Their output appears line
    by line, each line after `[index]`. If one process fails, the others are killed, because they
    could only wait for it. They also end with this process, in whatever way it ends.

    On CPU each process gets `devices_per_process` simulated devices. On a machine with several GPUs
    it gets as many of them. A TPU host needs no launcher, because one process uses all of its
    chips.

    Args:
        arguments: arguments of the Python interpreter: `["train.py", "--steps", "100"]`, or `["-m",
            "package.train"]`.
        processes: the number of processes, 1 or more.
        devices_per_process: the number of devices of each process, 1 or more.

    Returns:
        0 if all processes succeeded. Otherwise the status of the first to fail, or 128 + n if
        signal n killed it. 130 after an interrupt.

    Raises:
        ProcessError: a number is not 1 or more, or the caller is itself a launched process.

    Example:
        >>> launch(["-c", "from jaxnorm.distributed import initialize; initialize()"], processes=2)
        0
    """
    _check(processes, devices_per_process)
    try:
        with _address() as address, _lifeline() as lifeline:
            shared = {
                ADDRESS: address,
                "JAX_COORDINATOR_BIND_ADDRESS": address,  # JAX's default is every interface
                COUNT: str(processes),
                LIFELINE: str(lifeline),
                "PYTHONUNBUFFERED": "1",
            }
            own = [_own(index, devices_per_process) for index in range(processes)]
            with _running(arguments, [shared | mine for mine in own], lifeline) as workers:
                failed = _first_failure(workers)
    except KeyboardInterrupt:
        print("launch: interrupted; all processes were ended.", file=sys.stderr)
        return INTERRUPTED
    return 0 if failed is None else _report(failed, workers[failed].returncode, processes)


def _check(processes: int, devices_per_process: int) -> None:
    if launched():
        raise ProcessError(
            "launch: a process that was launched cannot launch others; this is number "
            f"{os.environ.get(INDEX)} of {os.environ.get(COUNT)}. Call launch only where "
            "jaxnorm.distributed.launched() is False."
        )
    if not all(isinstance(n, int) and n >= 1 for n in (processes, devices_per_process)):
        raise ProcessError(
            "launch: processes and devices_per_process must be integers of 1 or more; got "
            f"processes={processes!r}, devices_per_process={devices_per_process!r}. For example "
            "processes=4, devices_per_process=2."
        )


@contextmanager
def _address() -> Iterator[str]:
    """A loopback address whose port stays reserved until process 0 listens there.

    A socket that is bound and does not listen keeps the port from being given to any other program.
    JAX's server sets SO_REUSEPORT too, so it may still bind the port.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@contextmanager
def _lifeline() -> Iterator[int]:
    """The reading end of a pipe whose other end closes when this process ends, even if killed."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


def _own(index: int, devices: int) -> dict[str, str]:
    return {
        INDEX: str(index),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_LOCAL_DEVICE_IDS": ",".join(str(index * devices + i) for i in range(devices)),  # GPUs
    }


@contextmanager
def _running(
    arguments: Sequence[str], environments: list[dict[str, str]], lifeline: int
) -> Iterator[list[subprocess.Popen]]:
    """Processes whose output is shown here; none of them is left at the end."""
    workers, readers = [], []
    try:
        for index, environment in enumerate(environments):
            worker = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=[lifeline],
                process_group=0,  # Ctrl-C reaches this process only, and `_kill` kills children too
            )
            workers.append(worker)
            for stream, sink in ((worker.stdout, sys.stdout), (worker.stderr, sys.stderr)):
                reader = threading.Thread(target=_show, args=(stream, sink, f"[{index}] "))
                reader.start()
                readers.append(reader)
        yield workers
    finally:
        for worker in workers:  # kill all before one of them notices that another is missing
            _kill(worker)
        for worker in workers:
            worker.wait()
        for reader in readers:
            reader.join()


def _show(stream: IO[str], sink: IO[str], prefix: str) -> None:
    with stream:
        for line in stream:
            try:
                sink.write(prefix + line)
                sink.flush()
            except BrokenPipeError:  # nobody reads the output: end, as programs in a pipe do
                return _thread.interrupt_main()


def _first_failure(workers: list[subprocess.Popen]) -> int | None:
    """Wait for the workers; the index of the first to fail, or None if all succeed."""
    while True:
        states = [worker.poll() for worker in workers]
        for index, state in enumerate(states):
            if state:
                return index
        if None not in states:
            return None
        time.sleep(0.02)


def _kill(worker: subprocess.Popen) -> None:
    """Kill a process with its children.

    The signal is SIGKILL: after SIGTERM JAX would wait for a common step.
    """
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def _report(failed: int, status: int, processes: int) -> int:
    if status < 0:
        how, status = f"was killed by {signal.Signals(-status).name}", 128 - status
    else:
        how = f"ended with status {status}"
    others = "" if processes == 1 else " The others were ended with it."
    print(
        f"launch: all processes must succeed; process {failed} of {processes} {how}.{others} Look "
        f"at its last lines, those that begin with [{failed}].",
        file=sys.stderr,
    )
    return status
