"""The TPU compiler's program for a normalization: by itself, and inside whole blocks.

It is the real compiler, and no TPU is needed. *Passes* are bytes that the scheduled program moves
to and from HBM, in units of the bytes of `x`. Activations are bfloat16, parameters float32. One
device of each topology is used.
"""

import functools
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

import jaxnorm
from benchmarks import models
from benchmarks import peers as p
from benchmarks.hlo import Program
from benchmarks.running import Plan, Unit

TOPOLOGIES = ("v5e:2x2x1", "v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1")
PEERS = (p.FLAX, *p.FORMS)
ROWS, IMAGES = ((65536, 1024), (16384, 4096)), ((256, 56, 56, 128),)
OPERATIONS = {"layer": ROWS, "rms": ROWS, "add rms": ROWS, "batch": IMAGES, "group": IMAGES,
         "instance": IMAGES}  # fmt: skip
GROUPS = 32
NORMS = {norm.name: norm for norm in p.norms(GROUPS)}


@dataclass(frozen=True)
class Block:
    """Four blocks in a row around a norm, and the shape of their input."""

    network: str
    model: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    norms: tuple[str, ...]


BLOCKS = (
    Block("pre-norm MLP", models.MLPBlocks, (32768, 2048), ("layer", "rms")),
    Block("bottleneck", models.Bottlenecks, (256, 28, 28, 512), ("batch", "group")),
)
QUICK_BLOCK = Block("small pre-norm MLP", models.MLPBlocks, (256, 128), ("layer",))


def plan(*, quick: bool = False) -> Plan:
    """The plan of the run.

    It takes an hour of compilation; the quick form takes small shapes and one topology, a minute.
    """
    require_compiler("tpu")
    settings = {
        "compiler": f"libtpu {importlib.metadata.version('libtpu')}",
        "peers": [peer.name for peer in PEERS],
        "activations": "bfloat16",
        "parameters": "float32",
        "alone": "forward: y; forward and backward: y, dx and the parameters' gradients, given "
        "dy. add rms: x + residual and its norm, both results used, both with cotangents, "
        "the gradient that both summands have returned once",
        "blocks": "gradient of a mean squared error with respect to the parameters and the input, "
        "as inside of a network; extra passes per norm layer over the same network without norms, "
        "in units of that layer's input",
        "columns": {
            "passes": "bytes moved to and from HBM outside of branches / bytes of x",
            "temp bytes": "temporary memory",
            "on-chip bytes": "of all results that the schedule puts into on-chip memory",
            "kernels": "what is scheduled, by kind; hand-written kernels by name",
        },
    }
    return Plan(settings, list(_units(quick)))


def _units(quick: bool) -> Iterator[Unit]:
    for topology in TOPOLOGIES[:1] if quick else TOPOLOGIES:
        for name, shapes in {"layer": ((512, 256),)}.items() if quick else OPERATIONS.items():
            for shape in shapes:
                for peer in _having(name):
                    key = f"{name} {'x'.join(map(str, shape))} {peer.name} {topology}"
                    yield Unit(key, functools.partial(_operation_rows, peer, name, shape, topology))
        for block in (QUICK_BLOCK,) if quick else BLOCKS:
            for name in block.norms:
                for peer in _having(name):
                    key = f"{block.network} {name} {peer.name} {topology}"
                    yield Unit(key, functools.partial(_block_rows, block, peer, name, topology))


def _having(name: str) -> list:
    return [peer for peer in PEERS if peer is p.FLAX or peer.has(NORMS[name.removeprefix("add ")])]


def _operation_rows(peer, name: str, shape, topology: str) -> dict:
    return {
        "alone": [
            {
                "norm": name,
                "shape": list(shape),
                "topology": topology,
                "peer": peer.name,
                "pass": "forward and backward" if backward else "forward",
                **described(compiled, math.prod(shape) * 2),
            }
            for backward, compiled in zip(
                (False, True), compile_operation(peer, name, shape, topology)
            )
        ]
    }


def _block_rows(block: Block, peer, name: str, topology: str) -> dict:
    layers = models.normed(block.model, _input(block))
    found = in_subprocess(_block_found, block, peer.name, name, topology)
    row = {
        "network": block.network,
        "norm": name,
        "shape": list(block.shape),
        "topology": topology,
        "peer": peer.name,
        "layers": len(layers),
    }
    # The compiler may crash, as libtpu 0.0.42 does on ResNet-50 for v6e.
    return {"blocks": [{**row, **(found or {"extra passes": None})}]}


def _block_found(block: Block, peer: str, name: str, topology: str) -> dict:
    chosen = next(p for p in PEERS if p.name == peer)
    compiled, base = compile_block(block, chosen, name, topology), _without(block, topology)
    layers = models.normed(block.model, _input(block))
    size = sum(layers) // len(layers)
    return {
        "extra passes": round(_extra(compiled, base, layers), 3),
        "without": described(base, size),
        **described(compiled, size),
    }


_OTHERS: list[ProcessPoolExecutor] = []


def in_subprocess(function: Callable, *arguments) -> Any:
    """Call the function in another process; None if that process crashed."""
    if not _OTHERS:
        _OTHERS.append(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
    try:
        return _OTHERS[0].submit(function, *arguments).result()
    except BrokenProcessPool:
        _OTHERS.pop().shutdown()
        return None


def operation_passes(peer, name: str, shape: tuple[int, ...], topology: str) -> tuple[float, float]:
    """Passes of a peer's norm, or of "add rms": forward, and forward with backward."""
    size = math.prod(shape) * 2
    forward, both = (
        Program(compiled.as_text()).hbm_bytes / size
        for compiled in compile_operation(peer, name, shape, topology)
    )
    return forward, both


def _extra(compiled, base, layers: list[int]) -> float:
    moved = (Program(a.as_text()).hbm_bytes for a in (compiled, base))
    with_norms, without = moved
    return (with_norms - without) / sum(layers)


def described(compiled, size: int) -> dict:
    """Figures of a compiled program; passes in units of `size` bytes."""
    program = Program(compiled.as_text())
    return {
        "passes": round(program.hbm_bytes / size, 3),
        "temp bytes": compiled.memory_analysis().temp_size_in_bytes,
        "on-chip bytes": program.on_chip_bytes,
        "kernels": program.kernels,
    }


def compile_operation(peer, name: str, shape: tuple[int, ...], topology: str) -> tuple[Any, Any]:
    """The forward, and forward with backward, compiled for one device."""
    x = jax.ShapeDtypeStruct(shape, models.DTYPE)
    feature = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    if name == "add rms":
        function, inputs, dy = add_rms(peer), (x, x), (x, x)
        parameters = {"scale": feature}
    else:
        norm = NORMS[name]
        function, inputs, dy = peer.function(norm, models.DTYPE), (x,), x
        parameters = p.parameters_of(norm, feature, feature)

    def both(parameters, dy, *inputs):
        y, back, state = jax.vjp(function, parameters, *inputs, has_aux=True)
        return y, back(dy)[:2], state  # both summands have one gradient, which is returned once

    return (
        compile_for(topology, function, parameters, *inputs),
        compile_for(topology, both, parameters, dy, *inputs),
    )


def add_rms(peer) -> Callable:
    """A function of (parameters, x, residual) that returns the norm of their sum, and the sum."""
    plain = peer.function(NORMS["rms"], models.DTYPE)

    def apply(parameters, x, residual):
        if peer is p.FLAX:
            total = x + residual
            return (plain(parameters, total)[0], total), {}
        y, total = jaxnorm.add_rms_norm(
            x, residual, parameters["scale"], dtype=models.DTYPE, epsilon=NORMS["rms"].epsilon,
            implementation=peer.implementation,
        )  # fmt: skip
        return (y, total), {}

    return apply


def compile_block(block: Block, peer, name: str, topology: str) -> Any:
    """The gradient of the blocks with that norm; without norms if the peer is None."""

    def norm():
        return models.NoNorm() if peer is None else peer.layer(NORMS[name], models.DTYPE)

    network: Any = block.model(norm)
    x = _input(block)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)

    def loss(parameters, x, target, state):
        y, new = network.apply({"params": parameters, **state}, x, mutable=["batch_stats"])
        return models.mean_squared_error(y, target), new

    state = {k: v for k, v in variables.items() if k != "params"}
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return compile_for(topology, gradient, variables["params"], x, x, state)


@functools.cache
def _without(block: Block, topology: str) -> Any:
    return compile_block(block, None, "", topology)


def _input(block: Block) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(block.shape, models.DTYPE)


def compile_for(topology: str, function: Callable, *arguments) -> Any:
    """A function of arrays of these shapes, compiled for the first device of a topology."""
    sharding = SingleDeviceSharding(mesh_of(topology).devices.flat[0])
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    return jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()


@functools.cache
def mesh_of(topology: str) -> Mesh:
    """All devices of a TPU topology on the axis "data"; the chips need not exist."""
    # No chip is used: do not search for a machine that has one, or lock out other processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices), ("data",))


def require_compiler(name: str) -> None:
    """Raise if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"benchmarks: {name} compiles for TPUs with the compiler in libtpu; got an environment "
            'without it. Install it: pip install "jax[tpu]".'
        )
