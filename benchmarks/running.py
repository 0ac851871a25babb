"""A run, one unit of work at a time: shown, stored at once, continued after an interruption.

The results of units are appended to `<name>.partial.jsonl`, one line each. Its first line describes
the run: settings, machine, versions and sources. A later run of the same kind skips the units whose
lines are there. Any other run begins from the start. The finished record replaces the file of that
name atomically.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Unit:
    """A part of a run that is either done or not; it returns rows by the name of their list."""

    key: str
    run: Callable[[], dict[str, list]]


@dataclass(frozen=True)
class Plan:
    """The units of work of a benchmark, with their settings."""

    settings: dict
    units: list[Unit]


class Journal:
    """The file of a run that is not finished; without a folder nothing is stored."""

    def __init__(self, start: dict, folder: Path | None):
        self.path = folder / f"{start['name']}.partial.jsonl" if folder else None
        self.found: dict[str, dict] = {}
        head = {"start": start, "source": _sources()}
        lines = self._lines()
        if lines and {**lines[0], "start": _undated(lines[0])} == {**head, "start": _undated(head)}:
            # The date is that of the first part of the run.
            start["date"] = lines[0]["start"]["date"]
            self.found = {line["key"]: line["found"] for line in lines[1:]}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [{**head, "start": start}]
            kept += [{"key": key, "found": found} for key, found in self.found.items()]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _lines(self) -> list[dict]:
        """The complete lines of the file; a line that was cut by the end of the run is dropped."""
        lines: list[dict] = []
        if self.path and self.path.exists():
            for text in self.path.read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    break
        return lines

    def add(self, key: str, found: dict) -> None:
        """Store the results of a unit."""
        # The head as it will be read: JSON turns tuples into lists.
        self.found[key] = json.loads(json.dumps(found, allow_nan=False))
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "found": found}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Remove the file, because the run is finished and written elsewhere."""
        if self.path:
            self.path.unlink()


def run(name: str, plan: Plan, command: str, folder: Path | None = None) -> dict:
    """The record of a run; with a folder it is also written there, and continued from there."""
    record = records.new_record(name, command, plan.settings)
    record = json.loads(json.dumps(record, allow_nan=False))
    journal = Journal(record, folder)
    done = len(journal.found)
    load = [records.load_average()]
    for unit in shown(name, plan.units, done):
        if unit.key not in journal.found:
            journal.add(unit.key, unit.run())
    record["load_average"] = [*load, records.load_average()]
    if done:
        record["resumed after"] = done
    for unit in plan.units:
        for key, rows in journal.found[unit.key].items():
            record.setdefault(key, []).extend(rows)
    if folder:
        records.write(record, folder)
        journal.close()
    return record


def shown(name: str, units: list[Unit], done: int = 0) -> Iterator[Unit]:
    """The units one after another, with their progress on the terminal."""
    if done:
        print(f"{name}: {done} of {len(units)} are done already", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        tick = _bar(stack, name, len(units)) or _line(name, len(units))
        for unit in units:
            tick(unit.key)
            yield unit


def _bar(stack: contextlib.ExitStack, name: str, total: int) -> Callable[[str], None] | None:
    """A progress bar with the remaining time; None if rich or a terminal is missing."""
    try:
        from rich import progress
    except ImportError:
        return None
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.fields[name]}"), progress.BarColumn(),
        progress.MofNCompleteColumn(), progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
    )  # fmt: skip
    bar = stack.enter_context(progress.Progress(*columns, console=Console(stderr=True)))
    task = bar.add_task("", name=name, total=total, completed=-1)
    return lambda key: bar.update(task, advance=1, description=key)


def _line(name: str, total: int) -> Callable[[str], None]:
    numbers = iter(range(1, total + 1))
    return lambda key: print(f"{name} {next(numbers)}/{total}: {key}", file=sys.stderr, flush=True)


def _undated(head: dict) -> dict:
    return {k: v for k, v in head["start"].items() if k != "date"}


def _sources() -> str:
    """A digest of the measured and the measuring sources: a changed line makes another run."""
    files: Iterable[Path] = sorted(
        path for folder in ("jaxnorm", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
