"""Kernels for GPUs: against the float64 oracle in Pallas's interpreter, and lowered for CUDA.

They await a measurement on a GPU and are never chosen, so these tests are few.
"""

import contextlib
import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.core.epilogue import Activation, Epilogue
from jaxnorm.core.measure import Measurement
from jaxnorm.core.slices import Slices
from jaxnorm.kernels import gpu, gpu_plan
from jaxnorm.kernels.block import KernelNorm
from jaxnorm.testing import assert_close, condition_number, oracle

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """A norm on an array of one shape, and the oracle of it."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    parameters: tuple[int, ...]
    blocks: tuple[int, int] | None = None
    adds: bool = False
    activation: Activation | None = None

    def norm(self, dtype, *, interpreted: bool = True) -> KernelNorm:
        measurement = Measurement(Slices(self.axes, self.blocks), 1e-6, self.name != "rms")
        epilogue = Epilogue(jnp.dtype(dtype), activation=self.activation)
        return KernelNorm(
            f"{self.name}_norm", measurement, epilogue, interpreted="cuda" if interpreted else None
        )

    def expected(self, x, scale, bias, dy):
        """y, dx and the derivatives of the parameters, in float64."""
        parameters = [p for p in (scale, bias) if p is not None]
        options = {"axis": self.axes} if self.name in ("layer", "rms") else {}
        options |= {"num_groups": self.blocks[1]} if self.blocks else {}
        value, pull = (getattr(oracle, f"{self.name}_norm{end}") for end in ("", "_vjp"))
        dx, *derived = pull(dy, x, *parameters, **options)
        return value(x, *parameters, **options), dx, derived

    def conditioning(self, x) -> float:
        axes = self.axes
        if self.blocks is not None:
            x, axes = x.reshape(*x.shape[:-1], self.blocks[1], -1), (*axes, x.ndim)
        return condition_number(x, axes, 1e-6, centered=self.name != "rms", terms=x.size)

    def abstract(self, dtype):
        x = jax.ShapeDtypeStruct(self.shape, dtype)
        p = jax.ShapeDtypeStruct(self.parameters, jnp.float32)
        return x, (p, None if self.name == "rms" else p)


CASES = {
    "layer, ragged": Case("layer", (7, 5, 33), (2,), (1, 1, 33)),
    "layer, of each sample": Case("layer", (4, 6, 40), (2,), (4, 1, 40)),
    "rms, sum": Case("rms", (3, 7, 130), (2,), (1, 1, 130), adds=True),
    "group": Case("group", (5, 3, 2, 12), (1, 2), (1, 1, 1, 12), blocks=(3, 3)),
}


def arrays(case: Case, dtype, offset: float):
    rng = np.random.default_rng(0)
    x, dy = ((rng.normal(size=case.shape) + o).astype(dtype) for o in (offset, 0))
    scale, bias = ((rng.normal(size=case.parameters) + 1).astype("f") for _ in range(2))
    return x, dy, scale, None if case.name == "rms" else bias


@pytest.fixture
def small_gpu(monkeypatch):
    """So few registers that programs have several blocks also where arrays are small."""
    monkeypatch.setattr(gpu_plan, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(gpu_plan, "SMALL", 64)
    monkeypatch.setattr(gpu_plan, "ROOM", 64)
    monkeypatch.setattr(gpu_plan, "ROOMY", 128)


@pytest.mark.sample
@pytest.mark.parametrize(("name", "dtype"), [(name, DTYPES[i % 2]) for i, name in enumerate(CASES)])
def test_value_and_derivatives(name, dtype, small_gpu):
    case = CASES[name]
    norm = case.norm(dtype)
    assert gpu_plan.refusal(norm, case.shape, dtype, [case.parameters]) is None
    value = jax.jit(partial(gpu.forward, norm))
    pull = jax.jit(lambda x, p, *cotangents: gpu.backward(norm, x, p, *cotangents))
    for offset in (0.0, 1e4):
        x, dy, scale, bias = arrays(case, dtype, offset)
        residual = np.flip(x, 0) if case.adds else None
        y, *total = value(x, residual, scale, bias)
        if case.adds:
            wanted = (x.astype("f") + residual.astype("f")).astype(dtype)
            np.testing.assert_array_equal(total[0], wanted)
            x = wanted
        dx, *derived = pull(x, (scale, bias), dy, dy if case.adds else None)
        wanted_y, wanted_dx, wanted = case.expected(x, scale, bias, dy)
        wanted_dx = wanted_dx + dy.astype(np.float64) if case.adds else wanted_dx
        conditioning = max(1.0, case.conditioning(x))
        assert y.dtype == dx.dtype == dtype
        assert_close(y, wanted_y, floor=8.0, name=f"{name} {offset} y")
        for what, got, want in zip(("dx", "dscale", "dbias"), (dx, *derived), (wanted_dx, *wanted)):
            assert_close(
                got, want, what="derivative", conditioning=conditioning,
                floor=float(np.abs(want).max()), name=f"{name} {offset} {what}",
            )  # fmt: skip
        assert len(derived) == len(wanted)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_programs_write_every_element_once_and_read_none_outside(
    name, sums, small_gpu, monkeypatch
):
    """The interpreter would forgive a wrong index; a GPU would not."""
    case = CASES[name]
    norm = case.norm("bfloat16")
    plan = gpu_plan.plan_of(norm, case.shape, jnp.bfloat16, [case.parameters], sums=sums)

    class Ref:
        dtype = jnp.bfloat16
        at = property(lambda self: self)

        def __getitem__(self, index):
            return index

    def elements(index, mask):
        mask = True if mask is None else np.asarray(mask)
        index = np.broadcast_arrays(*map(np.asarray, index), mask)
        return tuple(i[index[-1]] for i in index[:-1])

    written = np.zeros(plan.view, int)

    def load(index, *, mask, **_):
        for along, size in zip(elements(index, mask), plan.view):
            assert np.all((along >= 0) & (along < size))
        return np.zeros(plan.block, jnp.bfloat16)

    def store(index, block, *, mask):
        np.add.at(written, elements(index, mask), 1)

    monkeypatch.setattr(gpu.plgpu, "load", load)
    monkeypatch.setattr(gpu.plgpu, "store", store)
    for row in range(plan.programs):
        for group in range(plan.columns):
            program = gpu.GpuProgram(plan, row, group)
            for step in range(plan.steps):
                address = program.address(step)
                address.store(Ref(), address.load(Ref()))
            if plan.steps > 1:  # what is loaded while the last block is computed
                assert not np.any(program.address(plan.steps).inside)
    assert np.all(written == 1)


def test_what_fills_a_block_up_takes_no_part():
    """A constant slice at the end of the range: zeros beside it would be infinitely far away."""
    case = Case("group", (2, 3, 8), (1,), (1, 1, 8), blocks=(2, 2))
    x = np.full(case.shape, 3e38, "f") * np.asarray([1, -1], "f")[:, None, None]
    scale, bias = np.ones((1, 1, 8), "f"), np.arange(8, dtype="f").reshape(1, 1, 8)
    norm = case.norm("float32")

    @jax.jit
    def run(x, dy, scale, bias):
        forward = gpu.forward(norm, x, None, scale, bias)
        return forward, gpu.backward(norm, x, (scale, bias), dy, None)

    (y,), (dx, dscale, dbias) = run(x, np.ones_like(x), scale, bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    np.testing.assert_array_equal(dx, np.zeros_like(dx))
    np.testing.assert_array_equal(dscale, np.zeros_like(dscale))
    np.testing.assert_array_equal(dbias, np.full_like(dbias, 6.0))


def on_hopper():
    """What stands for a GPU where there is none; older JAX takes a Hopper by itself."""
    if jax.__version_info__ < (0, 12):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


LOWERED = {
    "wide, sum": Case("rms", (512, 32768), (1,), (1, 32768), adds=True),
    "groups, activation": Case(
        "group", (64, 16, 16, 320), (1, 2), (1, 1, 1, 320), blocks=(3, 32),
        activation=Activation("group_norm", jax.nn.silu),
    ),
}  # fmt: skip


@pytest.mark.sample
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    case = LOWERED[name]
    norm = case.norm("bfloat16", interpreted=False)
    assert gpu_plan.refusal(norm, case.shape, jnp.bfloat16, [case.parameters]) is None
    x, parameters = case.abstract(jnp.bfloat16)
    other = x if case.adds else None
    runs = {
        lambda x, other, p: gpu.forward(norm, x, other, *p): (x, other, parameters),
        lambda x, p, *dy: gpu.backward(norm, x, p, *dy): (x, parameters, x, other),
    }
    for run, operands in runs.items():
        with on_hopper():
            text = jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        (call,) = re.findall(r"custom_call @__gpu\$xla.gpu.triton.*", text)
        assert f'name = "{case.name}_norm"' in call
        assert "atomic" not in call
        assert "stablehlo.transpose" not in text


def test_refusals_tell_why():
    def reason(shape, axes, parameters=(), dtype="bfloat16", blocks=None, **options):
        norm = Case("layer", shape, axes, (), blocks, **options).norm("bfloat16")
        return gpu_plan.refusal(norm, shape, dtype, parameters)

    assert "x is float64" in reason((4, 8), (1,), dtype="float64")
    assert "x is complex64" in reason((4, 8), (1,), dtype="complex64")
    assert "neighbouring axes" in reason((4, 5, 6, 7), (1, 3))
    assert "last axis into groups" in reason((4, 8, 6), (2,), blocks=(1, 2))
    assert "1 x 1 x 1 x 65536" in reason((4, 40000), (1,))
    assert "only 16 bytes" in reason((2, 64, 64, 64), (1, 2))
    assert "each feature or sample" in reason((2, 3, 8), (2,), [(1, 3, 8)])
    assert "each feature or sample" in reason((2, 3, 8), (1,), [(1, 3, 8)])
    erf = Activation("layer_norm", jax.scipy.special.erf)
    assert "no erf" in reason((2, 8), (1,), activation=erf)
    assert "positive sizes" in reason((0, 8), (1,))
