"""Figures of compiled programs, as tables: bytes kept, passes over memory, collectives."""

from collections.abc import Callable

from benchmarks.report.table import ABSENT, WORD, Table, shape

CRASHED = "compiler crashed"


def memory(results: dict, traced: tuple[str, ...] = ("eager", "jit")) -> Table:
    """Kept bytes in units of the input's, for these ways of tracing."""
    rows = []
    for norm, size, jit, kept in results["samples"]:
        way = "jit" if jit else "eager"
        if way not in traced:
            continue
        rows.append((WORD[norm], shape(size), way, *(f"{k:.2f}" for k in kept)))
    rows.sort(key=lambda row: list(WORD.values()).index(row[0]))
    columns = ("", "shape", "traced", *results["settings"]["peers"])
    return Table("Kept for the backward pass, bfloat16, in bytes of x", columns, rows, 3)


def alone(results: dict, *, shapes: int | None = None) -> Table:
    """Passes over HBM of single operations, for each generation; the first shapes of each."""
    found: dict[tuple, dict[str, list[float]]] = {}
    sizes: dict[str, list] = {}
    for row in results["alone"]:
        known = sizes.setdefault(row["norm"], [])
        if row["shape"] not in known:
            known.append(row["shape"])
        if row["shape"] not in known[:shapes]:
            continue
        key = (WORD[row["norm"]], shape(row["shape"]), row["peer"])
        found.setdefault(key, {}).setdefault(row["topology"], []).append(row["passes"])
    topologies = list(dict.fromkeys(row["topology"] for row in results["alone"]))
    rows = [
        (*key, *("; ".join(f"{v:.2f}" for v in by.get(t, [])) or ABSENT for t in topologies))
        for key, by in found.items()
    ]
    columns = ("", "shape", "", *map(_generation, topologies))
    title = "Passes over HBM of a single operation: forward; forward and backward"
    return Table(title, columns, rows, 3)


def extra(results: dict) -> Table:
    """Extra passes per norm layer of whole blocks, for each generation."""
    found: dict[tuple, dict[str, str]] = {}
    for row in results["blocks"]:
        key = (row["network"], WORD[row["norm"]], row["peer"])
        passes = row["extra passes"]
        shown = CRASHED if passes is None else f"{passes:.2f}"
        found.setdefault(key, {})[row["topology"]] = shown
    topologies = list(dict.fromkeys(row["topology"] for row in results["blocks"]))
    rows = [(*key, *(by.get(t, ABSENT) for t in topologies)) for key, by in found.items()]
    columns = ("blocks", "", "", *map(_generation, topologies))
    title = "Extra passes per norm layer over the same blocks without norms, with gradients"
    return Table(title, columns, rows, 3)


def evidence(results: dict) -> list[dict]:
    """The rows by which `jaxnorm.kernels` chooses: mean extra passes in blocks, XLA and kernels.

    The mean is over the generations whose compiler compiled both programs.
    """
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in results["blocks"]:
        name, _, implementation = row["peer"].partition(" ")
        if name == "jaxnorm" and row["extra passes"] is not None:
            by = found.setdefault((row["norm"], row["network"]), {"xla": {}, "pallas": {}})
            by[implementation][row["topology"]] = row["extra passes"]
    rows = []
    for (norm, network), by in found.items():
        common = sorted(by["xla"].keys() & by["pallas"].keys())
        if common:
            means = {k: round(sum(v[t] for t in common) / len(common), 2) for k, v in by.items()}
            on = ", ".join(map(_generation, common))
            rows.append(
                {
                    "operation": f"{norm}_norm",
                    "platform": "tpu",
                    "block": f"{network} blocks",
                    "measure": f"extra passes over HBM for each norm ({on})",
                    **means,
                }
            )
    return rows


def schedules(results: dict) -> Table:
    """Memory and kernels of each program, with their number."""
    rows = []
    for kind in ("alone", "blocks"):
        for row in results[kind]:
            if "kernels" not in row:
                continue
            what = row.get("pass", row.get("network"))
            where = (WORD[row["norm"]], shape(row["shape"]), what, row["peer"])
            kernels = ", ".join(f"{n} {name}" for name, n in row["kernels"].items())
            sizes = (f"{row[k] / 1e6:.1f}" for k in ("temp bytes", "on-chip bytes"))
            passes = f"{row['passes']:.2f}"
            rows.append((*where, _generation(row["topology"]), passes, *sizes, kernels))
    columns = ("", "shape", "program", "", "TPU", "passes", "temporary MB", "on-chip MB", "kernels")
    return Table("What the TPU compiler schedules", columns, rows, 5)


def devices(results: dict) -> Table:
    """A row for each generation; a figure that changes with its devices is shown twice."""
    found: dict[tuple, list[dict]] = {}
    for sample in results["samples"]:
        network = f"{sample['network']}, {WORD[sample['norm']]} ({sample['layers']})"
        key = (network, sample["program"], _generation(sample["topology"]))
        found.setdefault(key, []).append(sample)

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
    rows = [
        (*names, *(cell(samples, show) for show in shown.values()))
        for names, samples in found.items()
    ]
    title = "A training step on each device of a board and of a pod"
    return Table(title, ("network, norm (layers)", "program", "TPU", *shown), rows, 3)


def _generation(topology: str) -> str:
    return topology.partition(":")[0]
