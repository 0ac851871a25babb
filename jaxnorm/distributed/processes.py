"""Join the processes of one run, with JAX's own distributed runtime."""

import logging
import os
import socket
import sys
import threading
import time
from functools import partial

import jax

logger = logging.getLogger(__name__)

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LIFELINE = "JAXNORM_LAUNCHER"  # file descriptor of a pipe that closes when `launch` ends

_single = False  # result of the first call; a later call may find JAX's backend started


class ProcessError(ValueError):
    """An error that keeps the processes of a run from being brought together."""


def initialize(*, timeout: float = 300) -> bool:
    """Make this program one of the processes of its run, before JAX is used for anything else.

    Afterwards `jax.devices()` are the devices of all processes, a mesh over them spans all
    processes, and batch statistics under `jax.jit` are those of the whole batch. This is a thin
    layer over `jax.distributed.initialize`. It learns where the other processes are from

    1. the variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
       JAX_PROCESS_ID, which `jaxnorm.distributed.launch` sets, or a person;
    2. or, without these, from what JAX finds: SLURM, Open MPI, a TPU pod, Kubernetes.

    A program that finds neither is a single process. Nothing happens then, and the result is False.
    A second call does nothing.

    In a run of several processes, an exception that nobody catches ends its process at once, with
    status 1 after the traceback, as `mpi4py.run` does. Without that, JAX would wait at exit for
    minutes, because the other processes wait in a collective for this one.

    Args:
        timeout: the seconds to wait for the other processes.

    Returns:
        True if JAX's distributed runtime runs in this program.

    Raises:
        ProcessError: JAX has started its backend already; the variables are incomplete or make no
            sense; process 0 cannot be reached or cannot open its port. If processes of the run are
            missing when the time is over, JAX ends this process, after a line in the log that says
            so.

    Example:
        >>> import subprocess, sys
        >>> program = "from jaxnorm.distributed import initialize; print(initialize())"
        >>> subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
        'False\\n'
    """
    global _single
    if _single or jax.distributed.is_initialized():
        return not _single
    if launched():
        threading.Thread(target=_end_with_launcher, daemon=True).start()
    given = _from_environment()
    if given:  # raise errors here: JAX would end the process with a signal
        if given["process_id"] == 0:
            _check_port(given["coordinator_address"])
        else:
            _wait_for_coordinator(given["coordinator_address"], timeout)
    try:
        _join(given, timeout)
    except (RuntimeError, ValueError) as error:
        if given is None and "coordinator_address should be defined" in str(error):
            logger.info("initialize: no other processes found; this program is one process.")
            _single = True
            return False
        raise ProcessError(_explained(error, given)) from error
    sys.excepthook = partial(_end_at_once, sys.excepthook)
    return True


def launched() -> bool:
    """Tell whether `launch` started this process.

    Returns:
        True in a process of `launch`, as its environment says; False in any other.

    Raises:
        Nothing of its own.

    Example:
        >>> launched()
        False
    """
    return LIFELINE in os.environ


def _join(given: dict | None, timeout: float) -> None:
    """Call JAX's own initialization; before it aborts a late process, log the reason."""
    late = threading.Timer(
        timeout,
        logger.error,
        (
            "initialize: all processes of the run must meet within %g s; not all have come, and "
            "JAX now ends this one. Look at the others' output, and start all of them, with the "
            f"same {COUNT} and {ADDRESS} where those are set by hand.",
            timeout,
        ),
    )
    late.daemon = True
    late.start()
    try:
        # The variables are complete. Do not mix them with what a cluster says.
        known = {} if given is None else {**given, "cluster_detection_method": "deactivate"}
        jax.distributed.initialize(**known, initialization_timeout=int(timeout) + 2)
    finally:
        late.cancel()


def _from_environment() -> dict | None:
    found = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if COUNT not in found and INDEX not in found:
        return None  # an address alone is JAX's own variable, used on clusters
    host, _, port = found.get(ADDRESS, "").rpartition(":")
    count, index, port = (_number(t) for t in (found.get(COUNT, ""), found.get(INDEX, ""), port))
    if host and 0 < port < 2**16 and 0 <= index < count:
        return {"coordinator_address": found[ADDRESS], "num_processes": count, "process_id": index}
    shown = ", ".join(f"{name}={value!r}" for name, value in found.items())
    raise ProcessError(
        f"initialize: the environment must say {ADDRESS}=host:port of process 0, {COUNT}=n and "
        f"{INDEX}=0 to n - 1; got {shown}. Set all three in each process, or none where a cluster "
        "(SLURM, Open MPI, a TPU pod) knows them."
    )


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _check_port(address: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as JAX's server will
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise ProcessError(
                f"initialize: process 0 must listen at the port of {ADDRESS}; {address!r} cannot "
                f"be opened ({error.strerror}). Choose a free port, the same for all processes."
            ) from None


def _wait_for_coordinator(address: str, timeout: float) -> None:
    """Wait until process 0 listens at its address; a three-part error if it does not."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(
                    f"initialize: process 0 must listen at {ADDRESS}; nobody did at {address!r} "
                    f"within {timeout:g} s ({error}). Start process 0, and see that this machine "
                    "can reach that address and port."
                ) from None
        time.sleep(0.05)


def _explained(error: Exception, given: dict | None) -> str:
    if "must be called before" in str(error):
        return (
            "initialize: it must come before JAX's first use; the backend has started already, "
            "with the devices of this process alone. Call it first in the program: jax.devices(), "
            "a jax.random.key or any jnp array before it is too early."
        )
    source = "what JAX found of the cluster" if given is None else str(given)
    return (
        f"initialize: JAX could not bring the processes together from {source}; it says: {error}. "
        f"Look at what your cluster sets, or set {ADDRESS}, {COUNT} and {INDEX} yourself."
    )


def _end_at_once(show, *error) -> None:
    show(*error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _end_with_launcher() -> None:
    os.read(int(os.environ[LIFELINE]), 1)  # waits until the pipe closes; nothing is ever sent
    os._exit(1)
