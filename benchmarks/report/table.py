"""A table of text, for the terminal and in Markdown, and the format of figures."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

INSTALLED = "not installed"
ABSENT = "-"
WORD = {"batch": "BatchNorm", "layer": "LayerNorm", "rms": "RMSNorm", "group": "GroupNorm",
        "instance": "InstanceNorm", "weight": "weight standardization",
        "add rms": "add + RMSNorm"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells of text; the first columns are names, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    names: int = 1

    def markdown(self) -> str:
        """The table in Markdown, without the title."""
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        lines = (self.columns, rule, *self.rows)
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def show(self) -> None:
        """Print the table, with rich if it is installed."""
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table as Rich
        except ImportError:
            self._show_plain()
            return
        table = Rich(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.names else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        # A file or a pipe has no width, so a table is not cut there.
        console = console if console.is_terminal else Console(width=250)
        console.print(table)

    def _show_plain(self) -> None:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows)]
        print(self.title)
        for row in (self.columns, *self.rows):
            cells = (
                cell.ljust(w) if i < self.names else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths))
            )
            print("  ".join(cells).rstrip())
        print()


def origin(results: dict) -> str:
    """One line of text with the command, the machine, the versions and the date."""
    machine, versions = results["machine"], results["versions"]
    load = results.get("load_average")
    load = load[-1] if load and isinstance(load[0], list) else load
    busy = f", load {load[0]:g}" if load else ""
    named = ", ".join(f"{k} {v}" for k, v in versions.items())
    device = "" if machine["backend"] == "cpu" else f" ({machine['device']})"
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['backend']}{device}{busy}"
    return f"`{results['command']}`, {results['date']}; {where}; {named}."


def grouped(samples: list, keys: int) -> dict[tuple, list]:
    """The last cells of the rows that agree in the first ones."""
    found: dict[tuple, list] = {}
    for row in samples:
        key = tuple(tuple(k) if isinstance(k, list) else k for k in row[:keys])
        found.setdefault(key, []).append(row[-1])
    return found


def columns_of(rows: list[list], peers: list[str]) -> dict[str, list[float]]:
    """The measurements of each peer, round by round; peers without such a function are left out."""
    return {
        peer: [row[i] for row in rows] for i, peer in enumerate(peers) if rows[0][i] is not None
    }


def ratios(found: dict[str, list[float]], ours: str, theirs: str) -> list[float]:
    """Ratios of two peers in the same round; none if one of them was not measured."""
    return [a / b for a, b in zip(found.get(ours, []), found.get(theirs, []))]


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of ratios."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def shape(sizes: Iterable[int]) -> str:
    """A shape as text, such as 8x4."""
    return "x".join(map(str, sizes))


def quartiles(values: list[float]) -> str:
    """Median and quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"  # noqa: RUF001
