"""The TPU compiler on every kernel: it fits, and every element crosses the memory bus once."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Program

import jaxnorm

pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
pytestmark = pytest.mark.optimized

TOPOLOGIES = ("v5e:2x2x1", "v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1")


def mesh(topology: str, devices: int, kind: AxisType) -> Mesh:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(found[:devices]), ("data",), axis_types=(kind,))


@dataclass(frozen=True)
class Case:
    """A norm with kernels asked for, and how often x may cross the bus, forward and backward."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    options: dict = field(default_factory=dict)
    parameters: tuple[int, ...] | None = None
    passes: float = 5.1
    relaid: bool = False
    """Whether XLA keeps such arrays in another order between programs, as it does where sizes fill
    no registers, and copies them at both ends."""

    def __str__(self):
        return f"{self.name} {self.shape} {self.dtype} {' '.join(self.options)}"

    @property
    def adds(self) -> bool:
        return self.name.startswith("add")

    def __call__(self, x, residual, scale, bias):
        parameters = (scale,) if "rms" in self.name else (scale, bias)
        summands = (x, residual) if self.adds else (x,)
        options = {"implementation": "pallas", "dtype": x.dtype, **self.options}
        return getattr(jaxnorm, self.name)(*summands, *parameters, **options)

    def forward(self, x, residual, scale, bias, dy, dtotal):
        return self(x, residual, scale, bias)

    def both(self, x, residual, scale, bias, dy, dtotal):
        if self.adds:
            # Of the two summands' gradients, which are one, but one: results cannot share memory.
            function = lambda x, *given: self(x, residual, *given)  # noqa: E731
            out, pull = jax.vjp(function, x, scale, bias)
            return out, pull((dy, dtotal))
        y, pull = jax.vjp(lambda x, *given: self(x, None, *given), x, scale, bias)
        return y, pull(dy)

    def arguments(self, mesh: Mesh, spec=P()):
        sizes = self.parameters or (self.shape[-1],)
        large, small = (self.shape, self.dtype, spec), (sizes, jnp.float32, P())
        return [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, s))
            for shape, dtype, s in (large, large, small, small, large, large)
        ]


# Shapes as they come, and where the compiler finds it hard: rows that are no multiple of anything,
# few features (which it would rather have lie in columns), features that fill the chip, channels
# that are cut. Large enough not to be put on the chip as a whole.
CASES = (
    Case("layer_norm", (65536, 1024)),
    Case("layer_norm", (40001, 1000), "float32", relaid=True),
    Case("layer_norm", (512, 197, 768), options={"activation": jax.nn.gelu}, relaid=True),
    Case("layer_norm", (512, 256, 768), parameters=(512, 1, 768), options={"scale_offset": 1.0}),
    Case("layer_norm", (128, 128, 8, 128), options={"axis": (2, 3)}, parameters=(8, 128)),
    Case("rms_norm", (1000000, 48), "float32", relaid=True),
    Case("rms_norm", (1024, 32768)),
    Case("add_rms_norm", (16384, 4096), passes=8.2),
    Case("add_layer_norm", (30000, 1536), "float32", passes=8.2),
    Case("group_norm", (256, 56, 56, 128)),
    Case("group_norm", (512, 14, 14, 320), "float32", relaid=True),
    Case("instance_norm", (256, 56, 56, 128)),
    Case("instance_norm", (64, 40, 40, 300)),
)


def assert_passes(case: Case, function, topology: str, most: float, kernels: int):
    arguments = case.arguments(mesh(topology, 1, AxisType.Auto))
    compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    program = Program(compiled.as_text())
    size = math.prod(case.shape) * jnp.dtype(case.dtype).itemsize
    assert 1.9 < program.hbm_bytes / size <= most
    found = [i for i in program.entry.values() if "tpu_custom_call" in i.attributes]
    assert len(found) == kernels


# Each case for one generation, in turn.
COMPILED = [(case, TOPOLOGIES[i % len(TOPOLOGIES)]) for i, case in enumerate(CASES)]


@pytest.mark.sample
@pytest.mark.parametrize(("case", "topology"), COMPILED, ids=str)
def test_every_element_crosses_the_bus_once_each_way(case, topology):
    assert_passes(case, case.both, topology, case.passes + 8 * case.relaid, kernels=2)


# The forward pass is part of the above, which leaves no room for one more; so a few are enough.
@pytest.mark.parametrize(("case", "topology"), COMPILED[::3], ids=str)
def test_a_forward_pass_by_itself(case, topology):
    assert_passes(case, case.forward, topology, 2.05, kernels=1)


CUT = (
    Case("layer_norm", (64, 2**21)),
    Case("add_rms_norm", (24, 3000001), "float32"),
    Case("group_norm", (8, 300, 300, 256), options={"activation": jax.nn.silu}),
)


@pytest.mark.parametrize(
    ("case", "topology"), [*zip((CUT[0], CUT[2], CUT[1], CUT[0]), TOPOLOGIES)], ids=str
)
def test_slices_larger_than_the_chip_have_kernels_too(case, topology):
    arguments = case.arguments(mesh(topology, 1, AxisType.Auto))
    compiled = jax.jit(case.both).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(
    ("name", "manual", "topology"),
    [*zip(("layer_norm",) * 2 + ("group_norm",) * 2, (False, True) * 2, TOPOLOGIES)],
)
def test_on_a_mesh_each_device_runs_its_own_slices(name, manual, topology):
    case = Case(name, (64, 8, 8, 256))
    chips = mesh(topology, 4, AxisType.Auto if manual else AxisType.Explicit)
    arguments = case.arguments(chips, P("data"))
    function, whole, spread = case.both, P(), P("data")
    if manual:
        function = jax.shard_map(
            function,
            mesh=chips,
            in_specs=(spread, spread, whole, whole, spread, spread),
            out_specs=(spread, (spread, whole, whole)),
        )
    with jax.set_mesh(chips):
        compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    program = Program(compiled.as_text())
    # The parameters' gradients are summed over the devices; the activation stays where it is.
    assert {c.kind for c in program.collectives} == {"all-reduce"}
    assert sum(c.bytes() for c in program.collectives) == 2 * 4 * 256
    share = math.prod(case.shape) * 2 / 4
    assert program.hbm_bytes / share < 5.3
