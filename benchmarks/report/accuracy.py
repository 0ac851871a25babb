"""The accuracy of the peers, as tables."""

from collections.abc import Callable, Iterable

from benchmarks.report.table import ABSENT, INSTALLED, WORD, Table

PEERS = ("jaxnorm", "flax", "flax two-pass", "torch")

_KEYS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "norm and offset": (("", "offset"), lambda row: (WORD[row[0]], _power(row[3]))),
    "norm": (("",), lambda row: (WORD[row[0]],)),
    "offset": (("offset",), lambda row: (_power(row[3]),)),
}


def accuracy(results: dict, dtype: str = "float32", by: str = "norm and offset") -> Table:
    """Worst error of y, in units of rounding; `by` "norm and offset", "norm" or "offset"."""
    title = f"Worst error of y, {dtype}, units of rounding of max(1, |y|)"
    return _worst(title, results, "values", dtype, by, lambda cell: [cell])


def derivatives(results: dict, dtype: str = "float32", by: str = "norm") -> Table:
    """Worst error of any derivative on well-conditioned data; `by` as in `accuracy`."""
    title = (
        f"Worst error of dx, dscale, dbias, well-conditioned {dtype}, units of rounding of the "
        "largest"
    )
    return _worst(title, results, "derivatives", dtype, by, lambda cell: cell)


def special(results: dict) -> Table:
    """Results for inputs at the edge: exact, finite or NaN."""
    present = results["settings"]["peers"]
    rows = []
    for case in dict.fromkeys(row[0] for row in results["special"]):
        cells = []
        for peer in PEERS:
            if peer not in present:
                cells.append(_missing(results, peer))
                continue
            by_norm = {r[1]: r[2][present.index(peer)] for r in results["special"] if r[0] == case}
            cells.append(_outcome(by_norm))
        rows.append((case, *cells))
    return Table("Inputs at the edge: worst of all norms", ("input", *PEERS), rows)


def tables(results: dict) -> list[Table]:
    """All tables on accuracy."""
    dtypes = list(dict.fromkeys(row[1] for row in results["values"]))
    return [
        *(accuracy(results, dtype) for dtype in dtypes),
        *(derivatives(results, dtype) for dtype in dtypes),
        special(results),
    ]


def _worst(title, results, what, dtype, by, parts) -> Table:
    """The worst of each peer in the samples of one row."""
    names, key = _KEYS[by]
    rows = [row for row in results[what] if row[1] == dtype]
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row[-1])
    present = results["settings"]["peers"]
    norms = list(WORD.values())
    order = sorted(found, key=lambda k: norms.index(k[0]) if k[0] in norms else 0)
    table = []
    for k in order:
        cells = []
        for peer in PEERS:
            if peer not in present:
                cells.append(_missing(results, peer))
                continue
            units = [u for row in found[k] for u in parts(row[present.index(peer)])]
            cells.append(_units([u for u in units if u is not None]))
        table.append((*k, *cells))
    return Table(title, (*names, *PEERS), table, len(names))


def _missing(results: dict, peer: str) -> str:
    return INSTALLED if results["versions"].get(peer) == INSTALLED else ABSENT


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
