"""Run Python programs as several processes; a hang fails, and no process is left."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

# After any import: a backend reads the flag when it starts, and counts other devices if it has.
NO_BACKEND = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
import jax
assert jax.device_count() == 3, "a backend has started"
"""


def launcher(*arguments, processes=2, devices=1) -> dict[str, Any]:
    """The arguments of `subprocess` for a program that launches another; see `run`."""
    program = (
        # What was started in a shell's background ignores it, and so would this.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from jaxnorm.distributed import launch; "
        f"sys.exit(launch(sys.argv[1:], {processes}, devices_per_process={devices}))"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return {"args": command, "env": ENVIRONMENT, "text": True}


def run(*arguments, timeout=100, **options) -> subprocess.CompletedProcess:
    """Launch programs; if the time is over, kill the launcher and all that it launched."""
    return subprocess.run(**launcher(*arguments, **options), capture_output=True, timeout=timeout)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids, within=20.0) -> bool:
    end = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))
