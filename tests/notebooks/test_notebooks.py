"""Every notebook runs, with `-m slow` from first cell to last, and is stored as it ran."""

import base64
import os
import re
import sys
import time
from pathlib import Path

import nbformat
import pytest
from compiling import QUICK_FLAGS
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

CELL_SECONDS = 120  # no cell takes a tenth of that on two idle cores
TOTAL_SECONDS = 240
LARGEST_FILE = 600_000  # bytes

# A path of the machine that ran it: /home/..., C:\..., and their like. Not those of a web address.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|Users|tmp|usr|opt|var|mnt|work|srv|private)/|\b[A-Za-z]:\\\w"
    r"|site-packages"
)
ANSI = re.compile(r"\x1b\[[0-9;]*m")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output) -> str:
    """All that a reader sees of an output as text."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join([output.ename, output.evalue, *output.traceback])
    return "\n".join(str(v) for kind, v in output.data.items() if not kind.startswith("image/"))


def test_there_are_notebooks():
    assert NOTEBOOKS


def draws(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


@pytest.mark.seconds(TOTAL_SECONDS, "it runs a notebook")
@pytest.mark.parametrize("cells", ["to a plot", pytest.param("all", marks=pytest.mark.slow)])
@each_notebook
def test_runs_without_an_error(path, cells, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    if cells != "all":
        first = next(i for i, cell in enumerate(notebook.cells) if draws(cell))
        del notebook.cells[first + 1 :]
    # The kernel finds this checkout, sees one plain CPU, and keeps its files to itself.
    search = [str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("XLA_FLAGS", " ".join(QUICK_FLAGS))
    here = tmp_path / "run"
    here.mkdir()
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        startup_timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(here)}},
        # Sockets in files: a port that is free when it is chosen may be taken when it is bound.
        config=Config(KernelManager={"transport": "ipc", "ip": str(tmp_path / "ipc")}),
    )
    begin = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(f"{path.name}: a cell failed.\n{ANSI.sub('', str(error))}", pytrace=False)
    except CellTimeoutError as error:
        pytest.fail(f"{path.name}: a cell took over {CELL_SECONDS} s.\n{error}", pytrace=False)
    except DeadKernelError as error:
        pytest.fail(f"{path.name}: the kernel died, {error}", pytrace=False)
    seconds = time.perf_counter() - begin
    assert seconds < TOTAL_SECONDS, f"{path.name} took {seconds:.0f} s"
    assert not list(here.iterdir()), f"{path.name} leaves files behind"
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.get("name") == "stderr" and "font cache" not in output.text:  # first import
                pytest.fail(f"{path.name}: cell [{cell.id}] warns.\n{output.text}", pytrace=False)


@each_notebook
def test_is_stored_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), f"run it from top to bottom: {counts}"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    outputs = [(cell.id, output) for cell in cells for output in cell.outputs]
    assert any(map(draws, cells)), "no plot stored"
    for name, output in outputs:
        assert output.output_type != "error", f"[{name}] stores an error"
        assert output.get("name") != "stderr", f"[{name}] stores a warning: {output.text}"
        text = text_of(output)
        assert "Traceback (most recent call last)" not in text, f"[{name}] stores a traceback"
        found = MACHINE_PATH.search(text)
        assert not found, f"[{name}] shows a path of the machine: {text[: found.end() + 40]}"
        if "image/png" in output.get("data", {}):
            png = base64.b64decode(output.data["image/png"])
            assert png.startswith(b"\x89PNG"), f"[{name}] is no PNG"
    for cell in notebook.cells:
        assert not MACHINE_PATH.search(cell.source), f"[{cell.id}] names a path of a machine"
    assert path.stat().st_size < LARGEST_FILE, f"{path.stat().st_size} bytes: use smaller plots"


@each_notebook
def test_every_cell_that_prints_was_stored_with_what_it_printed(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        if re.search(r"^\s*print\(", cell.source, re.M):
            assert any(o.get("name") == "stdout" for o in cell.outputs), f"[{cell.id}] is empty"
        if "plt.show()" in cell.source:
            assert draws(cell), f"[{cell.id}]"


def test_the_path_pattern_finds_paths_and_leaves_addresses_alone():
    for shown in (f"File {sys.prefix}/lib/site-packages/x.py", "in /home/a/b.py", r"C:\Users\a"):
        assert MACHINE_PATH.search(shown)
    for shown in (
        "https://arxiv.org/abs/1502.03167",
        "batch_stats/BatchNorm_0/mean",
        "1 / (1 - d)",
    ):
        assert not MACHINE_PATH.search(shown)
