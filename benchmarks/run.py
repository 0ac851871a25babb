"""Run a benchmark, or render the committed results.

    python benchmarks/run.py ops|blocks|tpu|memory|compile|scaling|accuracy|monitor [--quick]
        [--out DIR]
    python benchmarks/run.py report [--docs|--readme|--evidence] [--results DIR] [--out DIR]

A run prints its tables and writes every sample to `<DIR>/<name>.json`. DIR is `benchmarks/results`
by default. The same command continues an interrupted run, from `<DIR>/<name>.partial.jsonl`. A
quick run is a smoke test: it writes only into a given DIR. `report` prints the results (those in
`--results`) as Markdown, or writes it with its plots into `--out`. `report --docs` prints
`docs/benchmarks.md`, `report --readme` the figures of the README, and `report --evidence` the
content of `jaxnorm/kernels/evidence.json`, by which implementations are chosen.
"""

import argparse
import importlib
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# The name of each module of the package; JAX is imported only when it is needed.
BENCHMARKS = {
    "ops": "ops",
    "blocks": "blocks",
    "tpu": "tpu",
    "memory": "memory",
    "compile": "compiling",
    "scaling": "scaling",
    "accuracy": "accuracy",
    "monitor": "monitoring",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*BENCHMARKS, "report"])
    parser.add_argument("--docs", action="store_true", help="report: docs/benchmarks.md")
    parser.add_argument("--readme", action="store_true", help="report: the README's figures")
    parser.add_argument(
        "--evidence", action="store_true", help="report: what kernels are chosen by"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds")
    parser.add_argument("--results", type=Path, metavar="DIR", help="report: where results are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write")
    given = parser.parse_args(arguments)
    if given.what == "report":
        _report(given)
    else:
        _measure(given)


def _measure(given: argparse.Namespace) -> None:
    from benchmarks import records, report, running

    command = f"python benchmarks/run.py {given.what}" + " --quick" * given.quick
    folder = given.out or (None if given.quick else records.RESULTS)
    module = importlib.import_module(f"benchmarks.{BENCHMARKS[given.what]}")
    record = running.run(given.what, module.plan(quick=given.quick), command, folder)
    for table in report.tables(record):
        table.show()
    print(report.origin(record))
    if folder:
        print(f"written: {given.what}.json")
    else:
        print("a quick run is not written; give --out DIR to keep it")


def _report(given: argparse.Namespace) -> None:
    from benchmarks import report

    if given.docs:
        print(report.docs(given.results), end="")
    elif given.readme:
        print(report.readme(given.results), end="")
    elif given.evidence:
        print(report.evidence(given.results), end="")
    elif given.out:
        for path in report.write(given.out, given.results):
            print(f"written: {path.name}")
    else:
        print(report.render(given.results), end="")


if __name__ == "__main__":
    main()
