"""Value and derivatives of every peer, compared with the float64 oracle.

Errors are in units of rounding of the input's dtype: of `max(1, |y|)` for a value, of the largest
derivative for a derivative.
"""

import functools
import itertools
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from benchmarks import peers as p
from benchmarks.running import Plan, Unit
from jaxnorm.testing import condition_number, rounding_units

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
NONFINITE = "nonfinite"
PEERS = ("jaxnorm", "flax", "flax two-pass", "torch")
MOST_CONDITIONING = 2.0  # largest condition_number for which a derivative is judged


@dataclass(frozen=True)
class Layout:
    """A shape with its features last, and whether a part of it is masked out."""

    name: str
    shape: tuple[int, ...]
    groups: int
    masked: bool = False


LAYOUTS = (
    Layout("images", (8, 14, 14, 64), 8),
    Layout("ragged", (7, 9, 33), 3),
    Layout("ragged, masked", (7, 9, 33), 3, masked=True),
)


@dataclass(frozen=True)
class Grid:
    """The inputs of a run: every combination of these values."""

    layouts: tuple[Layout, ...] = LAYOUTS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    offsets: tuple[float, ...] = (0.0, 1e2, 1e4, 1e6)
    deviations: tuple[float, ...] = (1e-3, 1.0, 1e3)
    outliers: tuple[str, ...] = ("none", "first", "middle")


QUICK = Grid(
    layouts=LAYOUTS[1:], dtypes=("float32",), offsets=(0.0, 1e4), deviations=(1e-3, 1.0),
    outliers=("none", "first"),
)  # fmt: skip
OUTLIER = 1e4  # deviations


def plan(*, quick: bool = False, peers: tuple[str, ...] = PEERS) -> Plan:
    """The plan of the run.

    It takes some minutes; the quick form takes a few inputs. `peers` are names; peers that are not
    installed are left out.
    """
    grid = QUICK if quick else Grid()
    chosen = p.named(peers)
    settings = {
        "peers": [c.name for c in chosen],
        "columns": ["norm", "dtype", "layout", "offset", "deviation", "outlier", "units by peer"],
        "units": "value: eps max(1, |y|); derivative: eps max |derivative|; eps of the input",
        "layouts": {layout.name: layout.shape for layout in grid.layouts},
        "outlier": f"one element off by {OUTLIER:g} deviations",
    }
    units = [
        Unit(
            f"{norm.name} {layout.name} {dtype}",
            functools.partial(_rows, grid, norm, dtype, layout, chosen),
        )
        for layout, dtype in itertools.product(grid.layouts, grid.dtypes)
        for norm in p.norms(layout.groups)
    ]
    special = Unit("edge", lambda: {"special": list(_special_rows(chosen))})
    return Plan(settings, [*units, special])


def _rows(grid: Grid, norm: p.Norm, dtype: str, layout: Layout, chosen) -> dict[str, list]:
    values, derivatives = [], []
    for offset, deviation, outlier in itertools.product(
        grid.offsets, grid.deviations, grid.outliers
    ):
        value, derivative = _sample(norm, dtype, layout, offset, deviation, outlier, chosen)
        row = [norm.name, dtype, layout.name, offset, deviation, outlier]
        values.append([*row, value])
        if derivative is not None:
            derivatives.append([*row, derivative])
    return {"values": values, "derivatives": derivatives}


def _sample(norm, dtype, layout, offset, deviation, outlier, chosen):
    """Units of the value for each peer, and of the derivatives if they are well conditioned."""
    inputs = inputs_of(layout, DTYPES[dtype], offset, deviation, outlier)
    exact = norm.exact(**inputs)
    judged = outlier == "none" and _well_conditioned(norm, layout, inputs)
    value, derivative = [], []
    for peer in chosen:
        got = peer.run(norm, **inputs)
        units = {} if got is None else _units(got, exact, DTYPES[dtype])
        value.append(units.get("y"))
        derivative.append([units.get(k) for k in p.OUTPUTS[1 : len(exact)]])
    return value, derivative if judged else None


def inputs_of(layout: Layout, dtype, offset, deviation, outlier) -> dict:
    rng = np.random.default_rng(0)
    x = rng.normal(size=layout.shape) * deviation + offset
    if outlier != "none":
        x.flat[0 if outlier == "first" else x.size // 2] += OUTLIER * deviation
    mask = None
    if layout.masked:
        # At least three elements stay in every slice of every normalization. Fewer elements are no
        # question of accuracy; see the special cases.
        mask = rng.random(layout.shape) < 0.6
        mask[:, :3] = mask[..., :3] = mask[..., 11:14] = mask[..., 22:25] = True
    return {**_parameters(layout.shape[-1]), **_data(x, rng, dtype), "mask": mask}


def _data(x, rng, dtype) -> dict:
    return {"x": x.astype(dtype), "dy": rng.normal(size=x.shape).astype(dtype)}


def _parameters(features: int) -> dict:
    """Float32 parameters whose numbers bfloat16 holds too, so that every peer gets the same."""
    rng = np.random.default_rng(1)
    scale, bias = rng.normal(size=(2, features)) * 0.3 + [[1.0], [0.0]]
    rounded = (a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (scale, bias))
    return dict(zip(("scale", "bias"), rounded))


def _well_conditioned(norm: p.Norm, layout: Layout, inputs: dict) -> bool:
    x, mask = inputs["x"].astype(np.float64), inputs["mask"]
    included = np.ones(x.shape, bool) if mask is None else mask
    axes = norm.axes(x.ndim)
    if norm.groups:
        split = (*x.shape[:-1], norm.groups, -1)
        x, included = x.reshape(split), included.reshape(split)
        axes = (*axes[:-1], x.ndim - 1)
    low, high = np.where(included, x, np.inf), np.where(included, x, -np.inf)
    if np.min(high.max(axes) - low.min(axes)) == 0:
        return False  # all elements were rounded to one value, so there is no direction left
    centered = norm.name != "rms"
    condition = condition_number(x, axes, norm.epsilon, mask=included, centered=centered)
    return condition <= MOST_CONDITIONING


def _units(got: dict, exact: dict, dtype) -> dict:
    found = {}
    for name, want in exact.items():
        if want is None:
            continue
        what = "value" if name == "y" else "derivative"
        # Derivatives scale with 1 / deviation, so their errors are relative to the largest one.
        floor = 1.0 if name == "y" else min(1.0, float(np.abs(want).max())) or 1.0
        units = rounding_units(got[name], want, dtype, what=what, floor=floor)
        found[name] = float(f"{units:.3g}") if np.isfinite(units) else NONFINITE
    return found


def _special_rows(chosen):
    """Rows for inputs at the edge: [case, norm, [units of y, are derivatives finite] by peer]."""
    rng = np.random.default_rng(2)
    shape = (4, 6, 16)
    sign = rng.choice([-1.0, 1.0], size=shape)
    cases = {
        "a slice fully masked out": (rng.normal(size=shape), "float32"),
        "constant slices of 10000.1": (np.full(shape, 10000.1), "float32"),
        "1e30": (rng.normal(size=shape) * 1e30, "float32"),
        "edge of float16": (65504 * sign, "float16"),
    }
    for case, (x, dtype) in cases.items():
        for norm in p.norms(4):
            if case.startswith("constant") and norm.name == "rms":
                continue  # it subtracts no mean, so this input is not special for it
            inputs = {**_parameters(shape[-1]), **_data(x, rng, DTYPES[dtype]), "mask": None}
            if case.endswith("masked out"):
                inputs["mask"] = np.ones(shape, bool)
                inputs["mask"][(..., 0) if norm.name == "batch" else 0] = False
            exact = norm.exact(**inputs)
            row = []
            for peer in chosen:
                got = peer.run(norm, **inputs)
                if got is None:
                    row.append(None)
                    continue
                finite = all(np.isfinite(got[k]).all() for k in p.OUTPUTS[1:] if k in got)
                row.append([_units(got, exact, DTYPES[dtype])["y"], finite])
            yield [case, norm.name, row]
