"""Times as tables: operations, train steps, cost of monitors, compilation, growth."""

import statistics
from dataclasses import dataclass

from benchmarks.growth import exponent
from benchmarks.report.table import (
    ABSENT,
    WORD,
    Table,
    columns_of,
    geometric_mean,
    grouped,
    quartiles,
    ratios,
    shape,
)

OURS, COPY = "jaxnorm", "copy"
ALL = "all"


@dataclass(frozen=True)
class Cell:
    """One operation on one array: milliseconds for each peer, round by round."""

    norm: str
    model: str
    shape: tuple[int, ...]
    note: str
    dtype: str
    which: str
    found: dict[str, list[float]]
    moves: float
    """Arrays that must move, over those that a copy moves."""

    def ratio(self, peer: str) -> float | None:
        """The median of ours over theirs."""
        taken = ratios(self.found, OURS, peer)
        return statistics.median(taken) if taken else None

    @property
    def share(self) -> float:
        """The share of a copy's bandwidth that ours reaches."""
        return self.moves * statistics.median(ratios(self.found, COPY, OURS))


def cells(results: dict) -> list[Cell]:
    """The cells of a record of `ops`."""
    peers, moves = results["settings"]["peers"], results["settings"]["arrays that must move"]
    return [
        Cell(norm, model, size, note, dtype, which, columns_of(rows, peers),
             moves[which] / moves[COPY])
        for (norm, model, size, note, dtype, which), rows in grouped(results["samples"], 6).items()
    ]  # fmt: skip


def summary(results: dict, by: str = "norm and pass") -> Table:
    """Geometric mean and worst cell of time over each peer's, for each norm, or norm and pass."""
    found = cells(results)
    others = [peer for peer in results["settings"]["peers"] if peer not in (OURS, COPY)]
    split = by == "norm and pass"
    passes = list(dict.fromkeys(cell.which for cell in found))
    rows = []
    for norm in [*dict.fromkeys(cell.norm for cell in found), ALL]:
        for which in passes if split else [ALL]:
            chosen = [c for c in found if norm in (c.norm, ALL) and which in (c.which, ALL)]
            if not chosen:
                continue
            figures = [_mean_and_worst([c.ratio(peer) for c in chosen]) for peer in others]
            share = f"{geometric_mean(c.share for c in chosen):.2f}"
            name = (WORD.get(norm, norm), which) if split else (WORD.get(norm, norm),)
            rows.append((*name, f"{len(chosen)}", *figures, share))
    names = ("", "pass") if split else ("",)
    columns = (*names, "cells", *(f"time / {peer}" for peer in others), "share of copy")
    title = "jaxnorm's time over each peer's, geometric mean (worst cell)"
    return Table(title, columns, rows, len(names))


def _mean_and_worst(found: list[float | None]) -> str:
    values = [v for v in found if v is not None]
    return f"{geometric_mean(values):.2f} ({max(values):.2f})" if values else ABSENT


def operations(results: dict) -> Table:
    """Every cell: milliseconds of each peer, and the share of a copy's bandwidth."""
    peers = results["settings"]["peers"]
    rows = []
    for cell in cells(results):
        name = f"{WORD[cell.norm]}, {cell.note}" if cell.note else WORD[cell.norm]
        shown = [quartiles(cell.found[peer]) if peer in cell.found else ABSENT for peer in peers]
        where = (name, cell.model, shape(cell.shape), cell.dtype, cell.which)
        rows.append((*where, *shown, f"{cell.share:.2f}"))
    columns = ("", "model", "shape", "dtype", "pass", *peers, "share of copy")
    return Table("Milliseconds, median (quartiles)", columns, rows, 5)


def blocks(results: dict) -> Table:
    """Milliseconds of a train step with each norm, and the cost of ours over Flax's."""
    peers = results["settings"]["peers"]
    none = peers[-1]
    rows = []
    for (network, norm, size), samples in grouped(results["samples"], 3).items():
        found = columns_of(samples, peers)
        extra = [
            (ours - bare) / (theirs - bare)
            for ours, theirs, bare in zip(found[OURS], found["flax"], found[none])
            if theirs > bare
        ]
        shown = [quartiles(found[peer]) for peer in peers]
        norms = f"{statistics.median(extra):.2f}" if extra else ABSENT
        step = quartiles(ratios(found, OURS, "flax"))
        rows.append((network, WORD[norm], shape(size), *shown, step, norms))
    columns = ("network", "", "input", *peers, "step / flax", "norms / flax")
    activations = results["settings"]["activations"]
    title = f"Milliseconds of a train step, {activations}, median (quartiles)"
    return Table(title, columns, rows, 3)


def compiling(results: dict) -> Table:
    """Seconds to trace and to compile each network."""
    peers = results["settings"]["peers"]
    rows = []
    for (norm, network), samples in grouped(results["samples"], 2).items():
        found = columns_of([[sum(cell) for cell in row] for row in samples], peers)
        ratio = ratios(found, OURS, "flax")
        rows.append(
            (
                WORD[norm],
                network,
                *map(quartiles, found.values()),
                quartiles(ratio),
            )
        )
    columns = ("", "network", *peers, "jaxnorm / flax")
    title = "Seconds to trace and compile jit(grad) of eight layers, median (quartiles)"
    return Table(title, columns, rows, 2)


def monitoring(results: dict) -> Table:
    """Milliseconds of a step without a monitor, and the ratio of a step with one."""
    bare, *watched = results["settings"]["peers"]
    rows = []
    for (network, size), samples in grouped(results["samples"], 2).items():
        found = columns_of(samples, [bare, *watched])
        costs = [quartiles(ratios(found, peer, bare)) for peer in watched]
        rows.append((network, shape(size), quartiles(found[bare]), *costs))
    columns = ("network", "input", f"{bare}, ms", *watched)
    title = "A training step with a monitor over one without, median (quartiles)"
    return Table(title, columns, rows, 2)


def growth(results: dict) -> Table:
    """Milliseconds of the smallest and the largest size, and the fitted exponent."""
    peers = results["settings"]["peers"]
    rows = []
    for (norm, against), points in grown(results).items():
        sizes = [size for size, _ in points]
        row = [WORD[norm], against, f"{sizes[0]} to {sizes[-1]}"]
        for peer in peers:
            times = [statistics.median(found[peer]) for _, found in points]
            row.append(f"{times[0]:.2f} to {times[-1]:.2f}, {exponent(sizes, times):.2f}")
        rows.append(tuple(row))
    columns = ("", "against", "from, to", *(f"{peer}: ms, exponent" for peer in peers))
    title = "Milliseconds forward and backward against rows and features, fitted exponents"
    return Table(title, columns, rows, 3)


def grown(results: dict) -> dict[tuple[str, str], list[tuple[int, dict[str, list[float]]]]]:
    """Sizes with the milliseconds of each peer, by norm and by the size that grows."""
    found: dict[tuple[str, str], list] = {}
    for (norm, against, rows, features), samples in grouped(results["growth"], 4).items():
        size = rows if against == "rows" else features
        columns = columns_of(samples, results["settings"]["peers"])
        found.setdefault((norm, against), []).append((size, columns))
    return found
