"""Results as tables and pictures, for the terminal, in Markdown, and for the README."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import records
from benchmarks.report import accuracy, plots, programs, section, speed
from benchmarks.report.table import WORD, Table, origin

__all__ = [
    "TABLES",
    "WORD",
    "Table",
    "docs",
    "evidence",
    "origin",
    "readme",
    "render",
    "tables",
    "write",
]

TABLES: dict[str, Callable[[dict], list[Table]]] = {
    "ops": lambda results: [speed.summary(results), speed.operations(results)],
    "blocks": lambda results: [speed.blocks(results)],
    "tpu": lambda results: [
        programs.alone(results),
        programs.extra(results),
        programs.schedules(results),
    ],
    "memory": lambda results: [programs.memory(results)],
    "compile": lambda results: [speed.compiling(results)],
    "scaling": lambda results: [
        *([speed.growth(results)] if "growth" in results else []),
        programs.devices(results),
    ],
    "accuracy": accuracy.tables,
    "monitor": lambda results: [speed.monitoring(results)],
}


def tables(results: dict) -> list[Table]:
    """The tables of a record, in order."""
    return TABLES[results["name"]](results)


def read(folder: Path | None = None) -> dict[str, dict]:
    """The records in a folder, in the order of the report; the committed ones by default."""
    folder = folder or records.RESULTS
    present = (name for name in TABLES if (folder / f"{name}.json").exists())
    return {name: records.read(name, folder) for name in present}


def render(folder: Path | None = None, pictures: dict[str, list[str]] | None = None) -> str:
    """All results in a folder as Markdown, with the names of pictures for each benchmark."""
    parts = ["# Benchmark results\n"]
    for name, results in read(folder).items():
        for table in tables(results):
            parts.append(f"## {table.title}\n\n{table.markdown()}")
        for picture in (pictures or {}).get(name, []):
            parts.append(f"![{Path(picture).stem}]({picture})\n")
        parts.append(f"{origin(results)}\n")
    return "\n".join(parts)


def write(out: Path, folder: Path | None = None) -> list[Path]:
    """Write the Markdown and its pictures into the folder `out`, and return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[str]] = {}
    for name, results in read(folder).items():
        for chart_name, chart in plots.charts(results).items():
            chart.save(out / f"{chart_name}.svg")
            pictures.setdefault(name, []).append(f"{chart_name}.svg")
    page = out / "results.md"
    page.write_text(render(folder, pictures))
    return [page, *(out / picture for found in pictures.values() for picture in found)]


def docs(folder: Path | None = None) -> str:
    """The content of the page `docs/benchmarks.md`."""
    return section.page(read(folder))


def readme(folder: Path | None = None) -> str:
    """The README's few figures, which stand between its two markers."""
    return section.summary(read(folder))


def evidence(folder: Path | None = None) -> str:
    """The table of `jaxnorm.kernels.dispatch`, made from the results on TPUs; one row a line."""
    rows = programs.evidence(records.read("tpu", folder or records.RESULTS))
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n"
