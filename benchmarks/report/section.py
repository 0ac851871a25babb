"""The measured figures of the documentation, each with its origin, and the README's summary."""

import textwrap
from collections.abc import Callable

from benchmarks.report import accuracy, programs, speed
from benchmarks.report.table import Table, origin, shape


def page(read: dict[str, dict]) -> str:
    """The page of the documentation, in Markdown, made of the given records."""
    parts = [part(read[name]) for name, part in _PARTS.items() if name in read]
    return "\n".join([_HEAD, *parts])


def summary(read: dict[str, dict]) -> str:
    """A paragraph for the README, made of all records."""
    rows = {str(row[0]): row for row in accuracy.accuracy(read["accuracy"], by="offset").rows}
    _, ours, flax, _, torch = rows["1e4"]
    kept = [[float(n) for n in row[-2:]] for row in programs.memory(read["memory"], ("jit",)).rows]
    most, theirs = (max(column) for column in zip(*kept))
    everything = speed.summary(read["ops"], by="norm").rows[-1]
    share, worst = everything[2].rstrip(")").split(" (")
    ratios = [float(row[-1].split()[0]) for row in speed.compiling(read["compile"]).rows]
    text = (
        f"At an offset of 1e4 deviations a float32 result is off by at most {ours} units of "
        f"rounding (Flax: {flax}, PyTorch: {torch}). A bfloat16 layer keeps at most {most:.2f} "
        f"times its input for the backward pass (Flax: up to {theirs:.2f} times). On a CPU an "
        f"operation takes {share} of the time of Flax's (mean of {everything[1]} cases; {worst} in "
        f"the worst), and {min(ratios):.2f} to {max(ratios):.2f} times as long to trace and "
        "compile. In programs for TPUs an operation by itself moves as many bytes as Flax's. "
        "[All figures](docs/benchmarks.md), with machine, versions and commands."
    )
    return textwrap.fill(text, 110) + "\n"


_HEAD = """# Benchmarks

This page is generated: `python benchmarks/run.py report --docs > docs/benchmarks.md`. The results
are in [`benchmarks/results`](../benchmarks/results). `python benchmarks/run.py ops` (or `blocks`,
`tpu`, `memory`, `compile`, `scaling`, `accuracy`, `monitor`) in `.venv-test` measures them again,
and `python benchmarks/run.py report` shows all.

**Not measured**: time on GPUs and TPUs, because none was available. Figures for TPUs are read from
the programs that their compiler makes. The kernels for GPUs compile for Hopper and are right in
Pallas's interpreter.
"""


def _part(results: dict, *parts: str | Table) -> str:
    shown = [p if isinstance(p, str) else p.markdown().rstrip("\n") for p in parts]
    return "\n\n".join([*shown, origin(results)]) + "\n"


def _ops(results: dict) -> str:
    return _part(
        results,
        f"""Time of operations by themselves on this machine's {results["machine"]["backend"]}, over
forward, training forward and forward with backward, in float32 and bfloat16, on shapes of real
models. The figures are jaxnorm's time over each peer's, as geometric mean (worst cell), and
bandwidth as a share of the bandwidth of a copy.""",
        speed.summary(results, by="norm"),
    )


def _blocks(results: dict) -> str:
    return _part(
        results,
        """Milliseconds of whole train steps, median and quartiles of interleaved rounds. The last
column compares the time that the norms add to a step without norms.""",
        speed.blocks(results),
    )


def _tpu(results: dict) -> str:
    return _part(
        results,
        f"""Passes over HBM in programs for TPUs, as the TPU compiler schedules them,
{results["settings"]["compiler"]}; no TPU was needed. A single operation, forward; forward and
backward:""",
        programs.alone(results, shapes=1),
        """Whole blocks: extra passes for each norm layer over the same blocks without norms,
gradient of a mean squared error:""",
        programs.extra(results),
    )


def _memory(results: dict) -> str:
    return _part(
        results,
        "Kept under `jit` from forward to backward for bfloat16 `x`, in bytes of `x`:",
        programs.memory(results, traced=("jit",)),
    )


def _monitor(results: dict) -> str:
    return _part(
        results,
        """Time of a training step with a monitor that samples every 64th step, or every step, over
the same step without a monitor; median and quartiles of interleaved rounds:""",
        speed.monitoring(results),
    )


def _compile(results: dict) -> str:
    return _part(
        results,
        "Seconds to trace and compile the gradient of eight layers:",
        speed.compiling(results),
    )


def _scaling(results: dict) -> str:
    shares = " or ".join(
        f"{shape(sizes)} ({network})"
        for network, sizes in results["settings"]["a device's inputs"].items()
    )
    grown: list[str | Table] = []
    if "growth" in results:
        grown = [
            """Milliseconds against rows and features, with exponents fitted by least squares on
logarithms; memory traffic has the exponent one:""",
            speed.growth(results),
        ]
    return _part(
        results,
        *grown,
        f"""A training step on TPUs, from a board to a pod, as the TPU compiler schedules it. Each
device has {shares}, on any number of devices, and its work does not
grow with their number. "Statistics" are the all-reduces that the network waits for, forward +
backward. For batch normalization these are one each way per layer, unless XLA merges those of two
layers. Nothing waits for the all-reduces of the gradients. There are no other collectives, except
in branches of `lax.cond` that a layer takes if its batch is far from the running mean. ResNet-50
is missing for v6e and tpu7x, where this compiler overflows its stack on it (for v6e with Flax's
layers too).""",
        programs.devices(results),
    )


def _accuracy(results: dict) -> str:
    return _part(
        results,
        """Worst error of `y` over batch, layer, RMS, group and instance norm in float32, by offset
of the data, against a float64 oracle, in units of the dtype's rounding of max(1, |y|). "Two-pass"
is Flax with `use_fast_variance=False`.""",
        accuracy.accuracy(results, by="offset"),
        """Worst error of any first derivative on the same inputs, if they are well conditioned, in
units of rounding of the largest element:""",
        accuracy.derivatives(results),
        "Inputs at the edge:",
        accuracy.special(results),
    )


_PARTS: dict[str, Callable[[dict], str]] = {
    "accuracy": _accuracy,
    "ops": _ops,
    "blocks": _blocks,
    "tpu": _tpu,
    "memory": _memory,
    "compile": _compile,
    "scaling": _scaling,
    "monitor": _monitor,
}
