"""Time against rows and features, and one training step on TPU pods.

The real compiler compiles the step ahead of time, so no TPU is needed. Weak scaling: every device
has the same share of the batch, so the work of a device must not grow with the number of devices.
The step is forward, backward, statistics and SGD with momentum, and its state is donated. Batches
are sharded over all devices, and the state is on each device.
"""

import functools
import importlib.metadata
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm.linen as jnn
from benchmarks import growth, models, tpu
from benchmarks.hlo import Collective, Program
from benchmarks.running import Plan, Unit
from jaxnorm.training import create_train_state, make_train_step

# For each generation a board and, if the compiler knows it, a pod.
TOPOLOGIES = ("v5e:2x2x1", "v5e:16x16", "v6e:2x2x1", "v6e:16x16", "v5p:2x2x1", "v5p:8x8x8",
              "tpu7x:2x2x1")  # fmt: skip
AXIS = "data"
LAYERS = {"batch": jnn.BatchNorm, "layer": jnn.LayerNorm, "rms": jnn.RMSNorm}


@dataclass(frozen=True)
class Case:
    """A network, one device's share of its batch, and how the batch is sharded."""

    network: str
    norm: str
    model: type[nn.Module]
    shape: tuple[int, ...]
    """Of one device's inputs: images with channels, or tokens."""
    program: str = "jit"
    """"jit", where the compiler places the collectives, or "shard_map", where the layer does."""
    sizes: tuple[tuple[str, int | tuple[int, ...]], ...] = ()
    topologies: tuple[str, ...] = TOPOLOGIES

    def network_of(self, norm) -> nn.Module:
        """The network around that normalization."""
        return self.model(norm, **dict(self.sizes))

    def inputs(self, devices: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch of all devices: inputs `x` and labels `y`."""
        shape = (self.shape[0] * devices, *self.shape[1:])
        if len(shape) == 2:
            tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
            return {"x": tokens, "y": tokens}
        labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        return {"x": jax.ShapeDtypeStruct(shape, models.DTYPE), "y": labels}


IMAGES, TOKENS = (64, 224, 224, 3), (16, 512)
# libtpu 0.0.42 overflows its own stack on this network for v6e and tpu7x; for v6e also with Flax's
# batch norm.
COMPILING = tuple(t for t in TOPOLOGIES if not t.startswith(("v6e", "tpu7x")))
CASES = (
    Case("ResNet-50", "batch", models.ResNet, IMAGES, topologies=COMPILING),
    Case("ResNet-50", "batch", models.ResNet, IMAGES, "shard_map", topologies=TOPOLOGIES[:2]),
    Case("transformer", "layer", models.Transformer, TOKENS),
    Case("transformer", "rms", models.Transformer, TOKENS),
)
QUICK = tuple(
    Case("small ResNet", "batch", models.ResNet, (4, 32, 32, 3), program,
         (("stages", stages), ("width", 8), ("classes", 8)), TOPOLOGIES[1:2])
    for program, stages in (("jit", (1,)), ("shard_map", ()))
)  # fmt: skip


def plan(*, quick: bool = False) -> Plan:
    """The plan of the run.

    It takes half an hour of compilation after some minutes of timing; the quick form takes seconds.
    """
    tpu.require_compiler("scaling")
    settings = {
        **growth.settings(),
        "compiler": f"libtpu {importlib.metadata.version('libtpu')}",
        "activations": "bfloat16",
        "parameters": "float32",
        "step": "forward, backward, statistics, SGD with momentum; the state donated",
        "a device's inputs": {case.network: list(case.shape) for case in CASES},
        "columns": {
            **growth.COLUMNS,
            "forward, backward": "all-reduces that a later collective waits for (sums within the "
            "network) outside of branches: their number, their arrays, bytes of these",
            "gradients": "all-reduces of what no collective waits for: number and bytes; where "
            "XLA merged both kinds into one, it counts in both",
            "other": "collectives of other kinds outside of branches",
            "in branches": "number and bytes of collectives in branches of conditionals",
            "hbm bytes": "moved by one device outside of branches",
            "passes": "hbm bytes / bytes of one device's inputs of all norm layers",
            "temp bytes": "temporary memory of one device",
        },
    }
    devices = [
        Unit(
            f"{case.network} {case.norm} {case.program} {topology}",
            functools.partial(_sampled, case, topology),
        )
        for case in (QUICK if quick else CASES)
        for topology in case.topologies
    ]
    return Plan(settings, [*growth.units(quick=quick), *devices])


def _sampled(case: Case, topology: str) -> dict[str, list]:
    return {"samples": [sample(case, topology)]}


def sample(case: Case, topology: str) -> dict:
    """The work of the step of that case on one device of that topology."""
    mesh = tpu.mesh_of(topology)
    compiled = compile_step(case, mesh)
    program = Program(compiled.as_text())
    always = [c for c in program.collectives if not c.in_branch]
    branches = [c for c in program.collectives if c.in_branch]
    reduces = [c for c in always if c.kind == "all-reduce"]
    rest = [c for c in reduces if not all(c.awaited)]
    normed = models.normed(case.network_of, case.inputs(1)["x"])
    return {
        "network": case.network,
        "norm": case.norm,
        "layers": len(normed),
        "program": case.program,
        "topology": topology,
        "devices": mesh.size,
        "forward": _sums([c for c in reduces if not c.backward]),
        "backward": _sums([c for c in reduces if c.backward]),
        "gradients": [len(rest), sum(c.bytes(awaited=False) for c in rest)],
        "other": sorted({c.kind for c in always} - {"all-reduce"}),
        "in branches": [len(branches), sum(c.bytes() for c in branches)],
        "hbm bytes": program.hbm_bytes,
        "passes": round(program.hbm_bytes / sum(normed), 2),
        "temp bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def compile_step(case: Case, mesh: Mesh) -> Any:
    """The training step of `jaxnorm.training`, compiled for the mesh."""
    mapped = case.program == "shard_map"

    def loss(outputs, batch):
        mean = models.cross_entropy(outputs, batch["y"])
        return jax.lax.pmean(mean, AXIS) if mapped else mean

    options = {"use_running_average": False, "momentum": 0.9} if case.norm == "batch" else {}
    options |= {"axis_name": AXIS} if mapped else {}
    norm = functools.partial(LAYERS[case.norm], dtype=models.DTYPE, **options)
    model, optimizer = case.network_of(norm), optax.sgd(0.1, momentum=0.9)
    step: Any = make_train_step(model, optimizer, loss, train_kwargs={})
    if mapped:
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P()))
        step = jax.jit(step, donate_argnums=0)
    batch = case.inputs(mesh.size)
    state = jax.eval_shape(
        functools.partial(create_train_state, model, optimizer), jax.random.key(0), batch["x"]
    )
    arguments = _placed(state, mesh, P()), _placed(batch, mesh, P(AXIS))
    return step.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def _placed(tree, mesh: Mesh, spec: P):
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def _sums(reduces: list[Collective]) -> list[int]:
    """Number, arrays and bytes of the all-reduces that another operation waits for."""
    awaited = [c for c in reduces if any(c.awaited)]
    return [len(awaited), sum(sum(c.awaited) for c in awaited),
            sum(c.bytes(awaited=True) for c in awaited)]  # fmt: skip
