"""Common parts of the commands: the error of the user, exit statuses, kinds of arguments."""

import argparse
import importlib.util
import sys
from importlib import metadata

FOUND = 1  # exit status of `jaxnorm doctor` if it finds something, as of linters
USAGE_ERROR = 2  # the exit status of argparse too
INTERRUPTED = 130


class UsageError(Exception):
    """An error that the user can correct; it is printed without a traceback."""


def integer(least: int):
    """An argparse type for integers of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be an integer of {least} or more; got {text!r}")
        return value

    return parse


def installed(module: str) -> bool:
    """True if a module can be imported."""
    return importlib.util.find_spec(module) is not None


def version(name: str) -> str:
    """The version of a distribution; of this one without its metadata too."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name != "jaxnorm":
            return "unknown"
    from jaxnorm import __version__  # run from a source tree

    return __version__


def versions() -> dict[str, str]:
    """Versions of what computes and of what draws."""
    names = ("jaxnorm", "jax", "flax", "optax", "numpy", "scikit-learn", "altair")
    return {name: version(name) for name in names} | {"python": sys.version.split()[0]}
