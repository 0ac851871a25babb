"""What is chosen, what is refused and why, and that programs hold what `explain` names."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen as jnn
import jaxnorm.nnx
from jaxnorm.kernels import block, dispatch
from jaxnorm.kernels.dispatch import interpreted

X = jnp.ones((16, 4, 4, 64), jnp.bfloat16)
NORMS = {
    "layer_norm": jaxnorm.layer_norm,
    "rms_norm": jaxnorm.rms_norm,
    "group_norm": jaxnorm.group_norm,
    "instance_norm": jaxnorm.instance_norm,
}
STATS = jaxnorm.init_batch_stats(64)


def batch_norm(x, *, training=True, **options):
    return jaxnorm.batch_norm(x, None, None, STATS, training=training, **options)


def compiled(function, x=X, topology="v6e:2x2x1", devices=1, spec=P()) -> str:
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(found[:devices]), ("data",))
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    lowered = jax.jit(function).trace(abstract).lower(lowering_platforms=("tpu",))
    return lowered.compile().as_text()


def kernels_in(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


def table(monkeypatch, xla: float, pallas: float):
    row = {"platform": "tpu", "block": "test", "measure": "passes", "xla": xla, "pallas": pallas}
    rows = [{**row, "operation": name} for name in NORMS]
    monkeypatch.setattr(dispatch, "evidence", lambda: rows)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("layer_norm", "xla")] + [(name, i) for name in NORMS for i in (None, "pallas")],
)
def test_the_program_holds_what_explain_names(name, implementation):
    function = NORMS[name]
    ((*_, runs, why),) = jaxnorm.explain(function, X, platform="tpu", implementation=implementation)
    text = compiled(lambda x: function(x, implementation=implementation))
    assert kernels_in(text) == (runs == "pallas"), why


@pytest.mark.parametrize(("xla", "pallas"), [(3.0, 2.0), (2.0, 3.0), (2.0, 2.0)])
def test_the_table_decides(monkeypatch, xla, pallas):
    table(monkeypatch, xla, pallas)
    better = pallas < xla
    explained = jaxnorm.explain(jaxnorm.layer_norm, X, platform="tpu")
    assert [row[3] for row in explained] == ["pallas" if better else "xla"]
    assert f"xla {xla:g}, pallas {pallas:g}" in str(explained)
    # Not the function itself: what was compiled with another table would be found again.
    assert kernels_in(compiled(lambda x: jaxnorm.layer_norm(x))) == better
    # On other platforms the same program is XLA's.
    assert jnp.allclose(jaxnorm.layer_norm(jnp.arange(8.0)), jaxnorm.layer_norm(
        jnp.arange(8.0), implementation="xla"))  # fmt: skip


def test_a_program_that_is_partitioned_automatically(monkeypatch):
    sharded = {"devices": 4, "spec": P("data")}
    with pytest.raises(ValueError, match=r"layer_norm: .*got a program for 4 devices.*Explicit"):
        compiled(lambda x: jaxnorm.layer_norm(x, implementation="pallas"), **sharded)
    table(monkeypatch, 3.0, 2.0)
    assert kernels_in(compiled(lambda x: jaxnorm.layer_norm(x), **sharded)) == 0


REFUSED = {
    "mask": (lambda x, o: jaxnorm.layer_norm(x, mask=x > 0, **o), "it takes no mask"),
    "output": (lambda x, o: jaxnorm.layer_norm(x, save="output", **o), "keeps the input"),
    "closure": (lambda x, o: jaxnorm.rms_norm(x, activation=lambda y: y * 2, **o), "jax.nn"),
    "complex": (lambda x, o: jaxnorm.layer_norm(x.astype(jnp.complex64), **o), "float32"),
    "groups": (
        lambda x, o: jaxnorm.group_norm(x, feature_axis=1, num_groups=2, **o), "the last axis"
    ),
    "empty": (lambda x, o: jaxnorm.layer_norm(x[:0], **o), "no element"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused_with_the_reason(name):
    function, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"_norm: implementation='pallas'.*{reason}.*; got x.sha"):
        function(X, {"implementation": "pallas"})
    # and explained, where XLA is chosen for it.
    assert reason in str(jaxnorm.explain(lambda x: function(x, {}), X, platform="tpu"))


def test_groups_that_do_not_fit():
    x = jax.ShapeDtypeStruct((2, 8, 2**21), jnp.float32)
    with pytest.raises(ValueError, match=r"a block of \(1, 8, 1048576\) does not fit"):
        jax.eval_shape(lambda x: jaxnorm.group_norm(x, num_groups=2, implementation="pallas"), x)


def refuse(*_, **__):
    raise AssertionError("something was built")


@pytest.mark.parametrize("implementation", [None, "xla", "two_pass"])
@pytest.mark.parametrize("name", [*NORMS, "batch_norm", "add_rms_norm"])
def test_nothing_is_built_where_no_kernel_can_run(name, implementation, monkeypatch):
    monkeypatch.setattr(dispatch, "Decision", refuse)
    monkeypatch.setattr(dispatch.Request, "of", refuse)
    monkeypatch.setattr(block.KernelNorm, "__init__", refuse)
    functions = {**NORMS, "batch_norm": batch_norm}
    functions["add_rms_norm"] = lambda x, **o: jaxnorm.add_rms_norm(x, x, **o)
    run = lambda x: functions[name](x, implementation=implementation)  # noqa: E731
    jax.eval_shape(run, X)
    with pytest.raises(AssertionError):  # so that the test sees it where it is
        jaxnorm.explain(run, X, platform="tpu")


IMPORTS = """
import sys
import jax, jax.numpy as jnp, jaxnorm

def loaded():
    kernels = [name for name in sys.modules if name.startswith("jaxnorm.kernels.")]
    names = {name.rpartition(".")[2] for name in kernels}
    return "jax.experimental.pallas" in sys.modules, names & {"operator", "tpu", "gpu", "gpu_plan"}

x, stats = jnp.ones((2, 4)), jaxnorm.init_batch_stats(4)
jax.grad(lambda x: jaxnorm.batch_norm(x, None, None, stats, training=True)[0].sum())(x)
jax.grad(lambda x: jaxnorm.rms_norm(jaxnorm.layer_norm(x)).sum())(x)
print(jaxnorm.explain(jaxnorm.layer_norm, x, platform="cuda"))
assert loaded() == (False, set()), loaded()
jax.jit(lambda x: jaxnorm.layer_norm(x, implementation="pallas")).trace(x)
assert loaded() == (False, {"operator", "gpu_plan"}), loaded()
"""


def test_kernels_are_imported_only_where_they_are_lowered():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_what_a_platform_refuses_is_asked_only_where_a_kernel_would_run(platform, monkeypatch):
    monkeypatch.setattr(dispatch.Request, "unsupported_on", refuse)
    assert "xla" in str(jaxnorm.explain(jaxnorm.layer_norm, X, platform=platform))
    with pytest.raises(AssertionError):
        jaxnorm.explain(jaxnorm.layer_norm, X, platform=platform, implementation="pallas")


@pytest.mark.parametrize("name", NORMS)
def test_gpu_kernels_await_a_measurement(name):
    assert all(row["platform"] == "tpu" for row in dispatch.evidence())
    ((*_, runs, why),) = jaxnorm.explain(NORMS[name], X, platform="gpu")
    assert runs == "xla" and why == f"kernels await a measurement of blocks with {name} on cuda"


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_goes_through_the_same_door(training):
    def explained(implementation):
        options = {"training": training, "implementation": implementation}
        (row,) = jaxnorm.explain(lambda x: batch_norm(x, **options), X, platform="tpu")
        return row

    none = "none is written for batch_norm"
    shape = ("batch_norm", X.shape, "bfloat16")
    assert explained(None) == (*shape, "xla", f"no kernel: {none}")
    for name in ("xla", "two_pass"):
        assert explained(name) == (*shape, name, f"asked for by implementation={name!r}")
    with pytest.raises(ValueError, match=rf"batch_norm: .*'pallas'.*{none}; got x.*Leave impl"):
        batch_norm(X, training=training, implementation="pallas")
    with pytest.raises(ValueError, match=r"batch_norm: .*one of 'xla', 'two_pass', 'pallas'; got"):
        batch_norm(X, training=training, implementation="cuda")


def test_layers_of_batch_norm_pass_the_implementation_on():
    from flax import nnx

    layer = jnn.BatchNorm(use_running_average=False, implementation="pallas")
    with pytest.raises(ValueError, match="none is written for batch_norm"):
        layer.init(jax.random.key(0), X)
    layer = jaxnorm.nnx.BatchNorm(64, implementation="xla", rngs=nnx.Rngs(0))
    (row,) = jaxnorm.explain(nnx.view(layer, use_running_average=True), X, platform="tpu")
    assert row[3:] == ("xla", "asked for by implementation='xla'")


def test_no_kernel_for_this_platform():
    with pytest.raises(ValueError, match=r"layer_norm: implementation='pallas' has kernels for"):
        jaxnorm.layer_norm(X, implementation="pallas")


def test_unknown_implementations_are_named():
    with pytest.raises(ValueError, match=r"one of 'xla', 'two_pass', 'pallas'; got .*'cuda'"):
        jaxnorm.layer_norm(X, implementation="cuda")


@pytest.mark.sample
def test_a_model_is_explained_layer_by_layer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnn.BatchNorm(use_running_average=True)(jnn.GroupNorm(8)(x))
            return jnn.LayerNorm(implementation="pallas")(nn.relu(x))

    model, key = Model(), jax.random.key(0)
    with interpreted():
        variables = jax.eval_shape(model.init, key, X)
    explained = list(jaxnorm.explain(model.apply, variables, X, platform="tpu"))
    assert [(row[0], row[1], row[3]) for row in explained] == [
        ("group_norm", X.shape, "xla"),
        ("batch_norm", X.shape, "xla"),
        ("layer_norm", X.shape, "pallas"),
    ]


def test_nnx_layers_pass_the_implementation_on():
    from flax import nnx

    layer = jaxnorm.nnx.RMSNorm(64, implementation="pallas", rngs=nnx.Rngs(0))
    (row,) = jaxnorm.explain(layer, X, platform="tpu")
    assert row[3] == "pallas"


def test_explain_says_what_it_cannot():
    with pytest.raises(ValueError, match="explain: no normalization was traced"):
        jaxnorm.explain(jnp.sin, X)
    with pytest.raises(ValueError, match="platform must be one of"):
        jaxnorm.explain(jaxnorm.layer_norm, X, platform="abacus")
