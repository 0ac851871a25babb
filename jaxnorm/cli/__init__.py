"""The command line: `jaxnorm demo`, `doctor`, `report`, `fold`, `recalibrate`, `convert`.

Each command imports its modules when it runs, so that `jaxnorm --help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence

from jaxnorm.cli import runs, surgery
from jaxnorm.cli.arguments import FOUND as FOUND
from jaxnorm.cli.arguments import INTERRUPTED, USAGE_ERROR, UsageError, version
from jaxnorm.cli.runs import LAB_PACKAGES as LAB_PACKAGES

__all__ = ["UsageError", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the command line.

    Args:
        argv: the arguments without the program's name. The default is those of the process.

    Returns:
        The exit status: 0; 1 if the doctor has found something; 2 for input that cannot be used;
        130 after an interrupt.

    Raises:
        SystemExit: from argparse, after `--help`, `--version` or an unknown argument.

    Example:
        >>> main([])
        2
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return USAGE_ERROR
    try:
        return arguments.command(arguments)
    except UsageError as error:
        print(f"jaxnorm: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"jaxnorm: interrupted; {arguments.interrupted}", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxnorm", description="Normalization for JAX: exact, fast, distributed, observable."
    )
    parser.add_argument("--version", action="version", version=f"jaxnorm {version('jaxnorm')}")
    parser.set_defaults(command=None, interrupted="no report was written.")
    commands = parser.add_subparsers(title="commands")
    runs.add_commands(commands)
    surgery.add_commands(commands)
    return parser
