"""Results as tables: for the terminal, and in Markdown for the README. Measures nothing."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records

INSTALLED = "not installed"
ABSENT = "-"
WORD = {"batch": "BatchNorm", "layer": "LayerNorm", "rms": "RMSNorm", "group": "GroupNorm",
        "instance": "InstanceNorm"}  # fmt: skip
PEERS = ("jaxnorm", "flax", "flax two-pass", "torch")


@dataclass(frozen=True)
class Table:
    """Cells of text; the first columns are names, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    names: int = 1

    def markdown(self) -> str:
        """A Markdown table, without the title."""
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        lines = (self.columns, rule, *self.rows)
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def show(self) -> None:
        """Print: with rich where it is installed."""
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
        # A file or a pipe has no width: a table is not cut there.
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


def accuracy_table(results: dict, dtype: str = "float32", by: str = "norm and offset") -> str:
    """Worst error of y, in units of rounding; `by` "norm and offset", "norm" or "offset"."""
    return accuracy(results, dtype, by).markdown()


def derivative_table(results: dict, dtype: str = "float32", by: str = "norm") -> str:
    """Worst error of any derivative on well-conditioned data; `by` as in `accuracy_table`."""
    return derivatives(results, dtype, by).markdown()


def special_table(results: dict) -> str:
    """Inputs at the edge: exact, finite or NaN."""
    return special(results).markdown()


def memory_table(results: dict) -> str:
    """Kept bytes in units of the input's."""
    return memory(results).markdown()


def compile_table(results: dict) -> str:
    """Seconds to trace and compile."""
    return compiling(results).markdown()


def time_table(results: dict) -> str:
    """Milliseconds of a pass."""
    return timing(results).markdown()


def scaling_table(results: dict) -> str:
    """What a training step does on each device of a board and of a pod."""
    return scaling(results).markdown()


def origin(results: dict) -> str:
    """One line: the command, the machine, the versions and the date."""
    machine, versions = results["machine"], results["versions"]
    load = results.get("load_average")
    load = load[-1] if load and isinstance(load[0], list) else load
    busy = f", load {load[0]:g}" if load else ""
    named = ", ".join(f"{k} {v}" for k, v in versions.items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['backend']}{busy}"
    return f"`{results['command']}`, {results['date']}; {where}; {named}."


def render(folder: Path = records.RESULTS) -> str:
    """All results in a folder as Markdown."""
    parts = ["# Benchmark results\n"]
    for name, tables in TABLES.items():
        if not (folder / f"{name}.json").exists():
            continue
        results = records.read(name, folder)
        for table in tables(results):
            parts.append(f"## {table.title}\n\n{table.markdown()}")
        parts.append(f"{origin(results)}\n")
    return "\n".join(parts)


def readme(folder: Path = records.RESULTS) -> str:
    """The README's section of measured figures, between its two markers."""
    read = {name: records.read(name, folder) for name in TABLES}
    accuracy, kept, compiled, timed, scaled = (
        read[name] for name in ("accuracy", "memory", "compile", "time", "scaling")
    )
    compiler = scaled["settings"]["compiler"]
    return f"""
Worst error of `y` over batch, layer, RMS, group and instance normalization in float32, by offset of
the data, against a float64 oracle, in units of the dtype's rounding of max(1, |y|). "Two-pass" is
Flax with `use_fast_variance=False`.

{accuracy_table(accuracy, by="offset")}
Worst error of any first derivative on the same inputs, where they are well conditioned, in units of
rounding of the largest element:

{derivative_table(accuracy)}
Inputs at the edge:

{special_table(accuracy)}
{origin(accuracy)}

Kept between the forward and the backward pass for bfloat16 `x`, in bytes of `x`:

{memory_table(kept)}
{origin(kept)}

Time on a CPU, milliseconds, median and quartiles of interleaved rounds. What is exact and small is
not yet fast everywhere: the norms without a state read their input twice for their statistics, and
so it is with a batch far from the running mean (the first steps of training, a constant channel).

{time_table(timed)}
{origin(timed)}

Seconds to trace and compile the gradient of eight layers:

{compile_table(compiled)}
{origin(compiled)}

A training step on TPUs, from a board to a pod, as the TPU compiler schedules it, {compiler};
no TPU was needed. Each device has {_shares(scaled)},
in bfloat16 with float32 parameters, however many there are (weak scaling), and nothing that it does
grows with their number. "Statistics" are the all-reduces that the network waits for, forward +
backward: for batch normalization one each way per layer, of two float32 numbers per channel, where
XLA has not merged those of two layers (the last of a block and its shortcut's). Nothing waits for
the gradients', and there are no other collectives, except in branches of `lax.cond`: a layer whose
batch turns out to be far from the running mean reads it a second time, by design with collectives
of its own. They are counted apart, and bytes are those of a step that takes no such branch. Passes
are bytes moved to and from HBM, in units of the inputs of all norm layers. ResNet-50 is missing for
v6e and tpu7x, where this compiler overflows its stack on it (for v6e with Flax's layers too); one
batch norm layer on these is in `tests/test_tpu.py`.

{scaling_table(scaled)}
{origin(scaled)}

`python benchmarks/run.py accuracy` (memory, time, compile, scaling) in `.venv-test` measures them
again.
"""


_KEYS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "norm and offset": (("", "offset"), lambda row: (WORD[row[0]], _power(row[3]))),
    "norm": (("",), lambda row: (WORD[row[0]],)),
    "offset": (("offset",), lambda row: (_power(row[3]),)),
}


def accuracy(results: dict, dtype: str, by: str = "norm and offset") -> Table:
    """As `accuracy_table`."""
    title = f"Worst error of y, {dtype}, units of rounding of max(1, |y|)"
    return _worst(title, results, "values", dtype, by, lambda cell: [cell])


def derivatives(results: dict, dtype: str, by: str = "norm") -> Table:
    """As `derivative_table`."""
    title = (
        f"Worst error of dx, dscale, dbias, well-conditioned {dtype}, units of rounding of the "
        "largest"
    )
    return _worst(title, results, "derivatives", dtype, by, lambda cell: cell)


def _worst(title, results, what, dtype, by, parts) -> Table:
    """The worst of each peer in the samples of one row."""
    names, key = _KEYS[by]
    rows = [row for row in results[what] if row[1] == dtype]
    grouped: dict[tuple, list] = {}
    for row in rows:
        grouped.setdefault(key(row), []).append(row[-1])
    present = results["settings"]["peers"]
    norms = list(WORD.values())
    order = sorted(grouped, key=lambda k: norms.index(k[0]) if k[0] in norms else 0)
    table = []
    for k in order:
        cells = []
        for peer in PEERS:
            if peer not in present:
                cells.append(INSTALLED if results["versions"].get(peer) == INSTALLED else ABSENT)
                continue
            found = [u for row in grouped[k] for u in parts(row[present.index(peer)])]
            cells.append(_units([u for u in found if u is not None]))
        table.append((*k, *cells))
    return Table(title, (*names, *PEERS), table, len(names))


def _units(found: list) -> str:
    if not found:
        return ABSENT
    if any(isinstance(u, str) for u in found):
        return "NaN"
    return _number(max(found))


def _power(value: float) -> str:
    return f"{value:g}" if value < 1000 else f"{value:.0e}".replace("e+0", "e")


def _number(value: float) -> str:
    if value >= 1000:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def special(results: dict) -> Table:
    """As `special_table`."""
    present = results["settings"]["peers"]
    rows = []
    for case in dict.fromkeys(row[0] for row in results["special"]):
        cells = []
        for peer in PEERS:
            if peer not in present:
                cells.append(INSTALLED if results["versions"].get(peer) == INSTALLED else ABSENT)
                continue
            by_norm = {r[1]: r[2][present.index(peer)] for r in results["special"] if r[0] == case}
            cells.append(_outcome(by_norm))
        rows.append((case, *cells))
    return Table("Inputs at the edge: worst of all norms", ("input", *PEERS), rows)


def _outcome(by_norm: dict) -> str:
    found = {norm: cell for norm, cell in by_norm.items() if cell is not None}
    if not found:
        return "no masks"

    def listed(text: str, norms: Iterable[str]) -> str:
        norms = list(norms)
        return text if len(norms) == len(found) else f"{text}: {', '.join(norms)}"

    bad = [norm for norm, (units, _) in found.items() if isinstance(units, str)]
    if bad:
        return listed("NaN", bad)
    worst = max(units for units, _ in found.values())
    text = "exact" if worst == 0 else f"{_number(worst)} units"
    unfinished = [norm for norm, (_, finite) in found.items() if not finite]
    return f"{text}; {listed('NaN derivative', unfinished)}" if unfinished else text


def memory(results: dict) -> Table:
    """As `memory_table`."""
    rows = []
    for norm, shape, jit, kept in results["samples"]:
        way = "jit" if jit else "eager"
        rows.append((WORD[norm], _shape(shape), way, *(f"{k:.2f}" for k in kept)))
    rows.sort(key=lambda row: list(WORD.values()).index(row[0]))
    columns = ("", "shape", "traced", *results["settings"]["peers"])
    return Table("Kept for the backward pass, bfloat16, in bytes of x", columns, rows, 3)


def compiling(results: dict) -> Table:
    """As `compile_table`."""
    peers = results["settings"]["peers"]
    rows = []
    for (norm, network), samples in _grouped(results["samples"], 2).items():
        totals = [[sum(row[i]) for row in samples] for i in range(len(peers))]
        ratio = [ours / flax for ours, flax in zip(totals[0], totals[1])]
        rows.append((WORD[norm], network, *map(_spread, totals), _spread(ratio)))
    columns = ("", "network", *peers, "jaxnorm / flax")
    title = "Seconds to trace and compile jit(grad) of eight layers, median (quartiles)"
    return Table(title, columns, rows, 2)


def timing(results: dict) -> Table:
    """As `time_table`."""
    present = results["settings"]["peers"]
    rows = []
    for (norm, shape, note, which), samples in _grouped(results["samples"], 4).items():
        taken = {peer: [row[i] for row in samples] for i, peer in enumerate(present)}
        shown = [_spread(taken[peer]) if peer in taken else INSTALLED for peer in PEERS]
        ratios = []
        for peer in ("flax", "torch"):
            pairs = zip(taken["jaxnorm"], taken.get(peer, []))
            ratio = [ours / theirs for ours, theirs in pairs]
            ratios.append(_spread(ratio) if ratio else INSTALLED)
        name = f"{WORD[norm]}, {note}" if note else WORD[norm]
        rows.append((name, _shape(shape), which, *shown, *ratios))
    columns = ("", "shape", "pass", *PEERS, "jaxnorm / flax", "jaxnorm / torch")
    return Table("Milliseconds, float32, median (quartiles)", columns, rows, 3)


def scaling(results: dict) -> Table:
    """As `scaling_table`: a row for each generation, where a figure that changes is shown twice."""
    rows: dict[tuple, list[dict]] = {}
    for sample in results["samples"]:
        network = f"{sample['network']}, {WORD[sample['norm']]} ({sample['layers']})"
        generation = sample["topology"].partition(":")[0]
        rows.setdefault((network, sample["program"], generation), []).append(sample)

    def cell(samples: list[dict], show: Callable[[dict], str]) -> str:
        return ", ".join(dict.fromkeys(map(show, samples)))

    shown: dict[str, Callable[[dict], str]] = {
        "devices": lambda s: str(s["devices"]),
        "statistics": lambda s: f"{s['forward'][0]} + {s['backward'][0]}",
        "their bytes": lambda s: f"{s['forward'][2]} + {s['backward'][2]}",
        "gradients": lambda s: f"{s['gradients'][0]}",
        "their MB": lambda s: f"{s['gradients'][1] / 1e6:.1f}",
        "others": lambda s: " ".join(s["other"]) or "none",
        "in branches": lambda s: f"{s['in branches'][0]}",
        "HBM GB": lambda s: f"{s['hbm bytes'] / 1e9:.2f}",
        "passes": lambda s: f"{s['passes']:.1f}",
        "temporary GB": lambda s: f"{s['temp bytes'] / 1e9:.2f}",
    }
    table = [
        (*names, *(cell(samples, show) for show in shown.values()))
        for names, samples in rows.items()
    ]
    title = "A training step on each device of a board and of a pod"
    return Table(title, ("network, norm (layers)", "program", "TPU", *shown), table, 3)


def _shares(results: dict) -> str:
    """One device's inputs, in words."""
    shapes = results["settings"]["a device's inputs"].items()
    return " or ".join(f"{_shape(shape)} ({network})" for network, shape in shapes)


def _grouped(samples: list, keys: int) -> dict[tuple, list]:
    grouped: dict[tuple, list] = {}
    for row in samples:
        key = tuple(tuple(k) if isinstance(k, list) else k for k in row[:keys])
        grouped.setdefault(key, []).append(row[-1])
    return grouped


def _shape(shape) -> str:
    return "x".join(map(str, shape))


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"  # noqa: RUF001


TABLES: dict[str, Callable[[dict], list[Table]]] = {
    "accuracy": lambda results: [
        *(accuracy(results, d) for d in _dtypes(results)),
        *(derivatives(results, d) for d in _dtypes(results)),
        special(results),
    ],
    "memory": lambda results: [memory(results)],
    "compile": lambda results: [compiling(results)],
    "time": lambda results: [timing(results)],
    "scaling": lambda results: [scaling(results)],
}


def _dtypes(results: dict) -> list[str]:
    return list(dict.fromkeys(row[1] for row in results["values"]))
