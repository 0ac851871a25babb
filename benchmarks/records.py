"""The content of a result file: every sample, and all that is needed to judge and repeat it."""

import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"


def new_record(name: str, command: str, settings: dict) -> dict:
    """A record without samples: machine, versions, date and command come first."""
    return {
        "name": name,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        "settings": settings,
    }


def load_average() -> list[float] | None:
    """The load over 1, 5 and 15 minutes; None if the system does not tell it.

    It shows what else used the cores.
    """
    return [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None


def write(record: dict, folder: Path) -> Path:
    """Write `folder/<name>.json`, one sample a line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['name']}.json"
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in value)
            lines.append(f'"{key}": [\n{rows}\n]')
        else:
            lines.append(f'"{key}": {json.dumps(value, allow_nan=False)}')
    new = path.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.replace(path)  # atomic: a concurrent reader gets the old file
    return path


def read(name: str, folder: Path = RESULTS) -> dict:
    """Read the record of that name."""
    return json.loads((folder / f"{name}.json").read_text())


def _machine() -> dict:
    device = jax.devices()[0]
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _versions() -> dict:
    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # A checkout that is not installed knows its own version.
            if importlib.util.find_spec(name) is None:
                return "not installed"
            return getattr(importlib.import_module(name), "__version__", "unknown")

    return {
        n: version(n) for n in ("jaxnorm", "jax", "jaxlib", "flax", "numpy", "tokamax", "torch")
    }
