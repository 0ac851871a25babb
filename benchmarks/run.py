"""Run a benchmark, or render the committed results.

    python benchmarks/run.py accuracy|memory|compile|time|scaling [--quick] [--out DIR]
    python benchmarks/run.py report [--readme] [--out DIR]

A run prints its tables and writes every sample to `<DIR>/<name>.json`; DIR is
`benchmarks/results` unless given. A quick run is a smoke test: it writes only where it is told.
`report` prints the results in DIR as Markdown, `report --readme` the section that the README holds.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import accuracy, compiling, memory, records, report, scaling, timing

BENCHMARKS = {
    "accuracy": accuracy,
    "memory": memory,
    "compile": compiling,
    "time": timing,
    "scaling": scaling,
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*BENCHMARKS, "report"])
    parser.add_argument("--readme", action="store_true", help="report: the README's section")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSON is")
    given = parser.parse_args(arguments)
    if given.what == "report":
        shown = report.readme if given.readme else report.render
        print(shown(given.out or records.RESULTS), end="")
        return
    command = f"python benchmarks/run.py {given.what}" + " --quick" * given.quick
    record = BENCHMARKS[given.what].measure(command, quick=given.quick)
    for table in report.TABLES[given.what](record):
        table.show()
    print(report.origin(record))
    if given.out or not given.quick:
        written = records.write(record, given.out or records.RESULTS)
        print(f"written: {written.name}")
    else:
        print("a quick run is not written; give --out DIR to keep it")


if __name__ == "__main__":
    main()
