"""What holds for the package as a whole: its layers, its imports, its memory, its traces."""

import ast
import json
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ADD_RMS, BATCH, BATCH_EVAL, CASES, FROM_OUTPUT, LAYER, SAMPLED, WEIGHT
from launching import NO_BACKEND

import jaxnorm
import jaxnorm.linen as jnn

pytestmark = pytest.mark.sample

ROOT = Path(jaxnorm.__file__).parent
# Each room may use those before it.
ROOMS = (
    "_jax", "files", "text", "testing", "core", "distributed", "kernels", "functional", "layers",
    "linen", "nnx", "models", "training", "tools", "monitor", "lab", "report", "examples", "cli",
)  # fmt: skip
APART = {("linen", "nnx"), ("nnx", "linen")}
# Within the monitor: from what goes into a program to what is judged on the host.
MONITOR = ("markup", "probe", "samples", "diagnosis")


# Two shells for two frameworks, and the oracle, which has the names of what it judges.
MIRRORS = ("linen", "nnx", "testing/oracle")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_a_class_has_a_name_of_its_own():
    found = defaultdict(list)
    for path in ROOT.rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not where.startswith(MIRRORS):
                found[node.name].append(where)
    twice = {name: files for name, files in found.items() if len(files) > 1}
    assert not twice, twice


def test_imports_go_upward():
    for path in ROOT.rglob("*.py"):
        here = room(path)
        if here in ("__init__", "__main__"):
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != "jaxnorm" or len(parts) < 2 or parts[1] not in ROOMS:
                continue
            assert ROOMS.index(parts[1]) <= ROOMS.index(here), f"{path}: {name}"
            assert (here, parts[1]) not in APART, f"{path}: {name}"
        flax_free = here in ("_jax", "core", "distributed", "functional", "kernels", "layers")
        assert not (flax_free and any(n.split(".")[0] == "flax" for n in imported(path))), path


def test_the_rooms_of_the_monitor_import_one_way():
    for number, here in enumerate(MONITOR):
        for path in (ROOT / "monitor" / here).rglob("*.py"):
            for name in imported(path):
                if name.startswith("jaxnorm.monitor."):
                    assert name.split(".")[2] in MONITOR[: number + 1], f"{path}: {name}"


def test_the_oracle_shares_no_code_with_what_it_judges():
    for path in (ROOT / "testing").rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            assert parts[0] != "jax", path
            assert parts[0] != "jaxnorm" or parts[1] == "testing", path


def test_no_file_is_two_ideas():
    long = {str(p): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long


PROBE = """
import json, sys
import jax
before = set(sys.modules)
import jaxnorm
found = sorted(set(sys.modules) - before)
print(json.dumps(found))
"""


def test_importing_loads_little_beside_jax_and_starts_no_backend():
    run = subprocess.run(
        [sys.executable, "-c", PROBE + NO_BACKEND], capture_output=True, check=True
    )
    found = json.loads(run.stdout)
    packages = Counter(name.split(".")[0] for name in found)
    assert set(packages) <= {"jaxnorm", "jaxtyping", "jax", "numpy"}
    assert 1 < packages["jaxnorm"] <= 45, packages  # the rooms that one function needs
    assert len(found) <= 60, packages  # of 711 that JAX has loaded before


def kept(function, *arguments) -> int:
    """Bytes that live between the forward and the backward pass."""
    _, back = jax.vjp(function, *arguments)
    return size(back)


def kept_when_traced(function, *arguments) -> int:
    """The same of a function that is not run."""
    return size(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *arguments))


def size(tree) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


# What keeps something else, or more parameters, is tested in core/test_fused.py.
KEEPS_X = [c for c in CASES if c not in (ADD_RMS, FROM_OUTPUT, SAMPLED, WEIGHT)]


@pytest.mark.parametrize("case", KEEPS_X, ids=lambda c: c.name)
def test_the_backward_keeps_x_and_little_else(case):
    shape = (4, 512, 128)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)
    scale, bias = (jnp.asarray(np.full(128, value, "f")) for value in (1, 0))
    function = case.function
    if case is BATCH_EVAL:
        stats = jaxnorm.init_batch_stats(128)
        function = lambda *a: jaxnorm.batch_norm(*a, stats, training=False)[0]  # noqa: E731
    found = [kept_when_traced(run, x, scale, bias) for run in (function, jax.jit(function))]
    if case in (BATCH, LAYER):
        found.append(kept(function, x, scale, bias))
    for number in found:
        assert x.nbytes <= number <= 1.05 * x.nbytes


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm"])
def test_modules_keep_a_sixth_of_flax(name):
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    share = {}
    for module in (jnn, nn):
        extra = {"use_running_average": False} if name == "BatchNorm" else {}
        layer = getattr(module, name)(dtype=jnp.bfloat16, **extra)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        run = lambda v, x, m=layer: m.apply(v, x, mutable=["batch_stats"])[0]  # noqa: E731
        share[module] = kept_when_traced(run, variables, x) / size(x)
    assert 1 <= share[jnn] <= 1.05
    assert share[nn] >= 3 * share[jnn]  # else Flax has changed, and the README with it


@pytest.mark.parametrize("x64", [False, True])
def test_a_training_loop_traces_once(x64):
    traces = []
    with jax.enable_x64(x64):

        @jax.jit
        def step(x, scale, bias, stats):
            traces.append(None)

            def loss(scale, bias):
                y, new = jaxnorm.batch_norm(x, scale, bias, stats, training=True)
                return ((y - 1) ** 2).mean(), new

            (dscale, dbias), new = jax.grad(loss, argnums=(0, 1), has_aux=True)(scale, bias)
            return scale - 0.1 * dscale, bias - 0.1 * dbias, new

        rng = np.random.default_rng(0)
        dtype = jnp.float64 if x64 else jnp.float32
        scale, bias, stats = jnp.ones(3, dtype), jnp.zeros(3, dtype), jaxnorm.init_batch_stats(3)
        for _ in range(100):
            x = jnp.asarray(rng.normal(size=(16, 3)) + 2, dtype)
            scale, bias, stats = step(x, scale, bias, stats)
        assert len(traces) == 1
        assert int(stats.count) == 100
        assert {a.dtype.name for a in stats[:2]} == {"float32"}
        np.testing.assert_allclose(stats.mean, 2, atol=0.9)


def results(x_dtype, p_dtype, **options):
    x, p = jax.ShapeDtypeStruct((4, 3, 6), x_dtype), jax.ShapeDtypeStruct((6,), p_dtype)
    for case in CASES[:-1]:
        yield jax.eval_shape(partial(case.function, **options), x, p, p).dtype


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("p_dtype", ["bfloat16", "float32"])
def test_result_dtype_follows_flax(x_dtype, p_dtype):
    assert set(results(x_dtype, p_dtype)) == {jnp.promote_types(x_dtype, p_dtype)}


def test_result_dtype_is_what_is_asked_for():
    assert set(results("bfloat16", "float32", dtype=jnp.float16)) == {jnp.dtype("float16")}
