"""Every JAX transformation on every public function, against the plain formula under the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    ACTIVATED,
    BATCH,
    BATCH_EVAL,
    CASES,
    FUSED,
    GROUP,
    INSTANCE,
    KERNELS,
    RMS,
    WEIGHT,
    Case,
    cotangent,
)
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxnorm


def directions(arguments, seed=3):
    return tuple(cotangent(a.shape, seed + i) for i, a in enumerate(arguments))


def loss(function, arguments, ct):
    y = function(*arguments)
    return jnp.vdot(y, ct) + 0.1 * jnp.sum(y**2)


def jvp(f, a):
    return jax.jvp(f, a, directions(a))


def linearize(f, a):
    y, linear = jax.linearize(f, *a)
    return y, linear(*directions(a))


def vjp(f, a):
    y, back = jax.vjp(f, *a)
    return y, back(cotangent(y.shape))


def scalar(f, a):
    ct = cotangent(jax.eval_shape(f, *a).shape)
    return lambda *b: loss(f, b, ct)


def grad(f, a):
    return jax.value_and_grad(scalar(f, a), argnums=(0, 1, 2))(*a)


def hessian(f, a):
    whole = scalar(f, a)
    return jax.hessian(lambda row: whole(a[0].at[0, 0].set(row), *a[1:]))(a[0][0, 0])


def forward_over_reverse(f, a):
    return jax.jvp(jax.grad(scalar(f, a), argnums=(0, 1, 2)), a, directions(a))[1]


def reverse_over_reverse(f, a):
    v = directions(a)
    inner = lambda *b: sum(  # noqa: E731
        jnp.vdot(g, t) for g, t in zip(jax.grad(scalar(f, a), argnums=(0, 1, 2))(*b), v)
    )
    return jax.grad(inner, argnums=(0, 1, 2))(*a)


def reverse_over_forward(f, a):
    v = directions(a)
    ct = cotangent(a[0].shape)
    return jax.grad(lambda *b: jnp.vdot(jax.jvp(f, b, v)[1], ct), argnums=(0, 1, 2))(*a)


def third(f, a):
    v = directions(a)
    return jax.jvp(lambda *b: jax.jvp(jax.grad(scalar(f, a)), b, v)[1], a, v)[1]


def stacked(a, n=3):
    return tuple(jnp.stack([b * (1 + 0.1 * i) + 0.1 * i for i in range(n)]) for b in a)


def vmap(f, a):
    return jax.vmap(f)(*stacked(a))


def vmap_one(f, a):
    return jax.vmap(f, in_axes=(None, 0, None))(a[0], stacked(a)[1], a[2])


def vmap_of_vmap(f, a):
    xs = jnp.stack([stacked(a)[0], stacked(a)[0] + 1])
    return jax.vmap(jax.vmap(f, in_axes=(0, None, None)), in_axes=(0, None, None))(xs, *a[1:])


def vmap_of_grad(f, a):
    return jax.vmap(jax.grad(scalar(f, a), argnums=(0, 1, 2)))(*stacked(a))


def grad_of_vmap(f, a):
    xs = stacked(a)
    ct = cotangent(xs[0].shape)
    return jax.grad(lambda *b: jnp.vdot(jax.vmap(f)(*b), ct), argnums=(0, 1, 2))(*xs)


def scan(f, a):
    def total(x, *rest):
        def body(carry, factor):
            carry = f(carry * factor, *rest)
            return carry, carry.sum()

        return lax.scan(body, x, jnp.array([1.0, 1.5, 0.7]))[0]

    return jax.value_and_grad(scalar(total, a), argnums=(0, 1, 2))(*a)


def while_loop(f, a):
    # Forward mode only: JAX cannot reverse a while_loop of unknown length.
    def repeated(x, *rest):
        return lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1] * 1.5 + 0.1, *rest)), (0, x)
        )[1]

    return jax.jvp(repeated, a, directions(a))


def remat(f, a):
    return grad(jax.checkpoint(f), a)


def jit(f, a):
    return jax.jit(f)(*a), jax.jit(lambda *b: grad(f, b))(*a)


def shard_map(f, a, check_vma=True):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        f, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=P("d"), check_vma=check_vma
    )
    return grad(mapped, a)


def pmap(f, a):
    x = a[0].reshape(2, -1, *a[0].shape[1:])
    return jax.pmap(lambda *b: grad(f, b), in_axes=(0, None, None))(x, *a[1:])


TRANSFORMATIONS = [
    jvp, linearize, vjp, grad, hessian, forward_over_reverse, reverse_over_reverse,
    reverse_over_forward, third, vmap, vmap_one, vmap_of_vmap, vmap_of_grad, grad_of_vmap, scan,
    while_loop, remat, jit, shard_map, pmap,
]  # fmt: skip


# What shares its path with another case is spared some, and more where only the end is its own.
SOME = (linearize, grad, forward_over_reverse, reverse_over_reverse, vmap, vmap_of_grad, scan,
        shard_map)  # fmt: skip
MOST = (*SOME, hessian, reverse_over_forward, grad_of_vmap, while_loop)
BATCHED = (*MOST, vjp, third, vmap_one, vmap_of_vmap)  # a kernel has rules of its own for these
SPARED = (
    dict.fromkeys((BATCH_EVAL, INSTANCE, *FUSED), SOME)
    | dict.fromkeys((RMS, GROUP, WEIGHT), MOST)
    | dict.fromkeys(KERNELS, BATCHED)
)
TOGETHER = [
    (case, transformation) for case in CASES for transformation in SPARED.get(case, TRANSFORMATIONS)
]


@pytest.mark.sample
@pytest.mark.filterwarnings("ignore:jax.pmap is deprecated")
@pytest.mark.parametrize(
    ("case", "transformation"), TOGETHER, ids=[f"{c.name}-{t.__name__}" for c, t in TOGETHER]
)
def test_agrees_with_the_plain_formula(case: Case, transformation):
    a = case.arguments()
    if case in (BATCH, ACTIVATED, *KERNELS) and transformation is shard_map:
        # Where types tell that a batch is spread, each device's own statistics are refused; and
        # Pallas's interpreter does not know such types (the compilers do: tests/kernels).
        transformation = partial(shard_map, check_vma=False)

    def both(a):
        return transformation(case.function, a), transformation(case.plain, a)

    # These two compile by themselves; of the others one program has both.
    got, wanted = (both if transformation in (pmap, jit) else jax.jit(both))(a)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        size = max(1.0, float(np.abs(w).max()))
        np.testing.assert_allclose(np.asarray(g) / size, np.asarray(w) / size, atol=2e-5)


@pytest.mark.sample
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_shapes_without_running(case: Case):
    a = case.arguments(dtype=jnp.bfloat16)
    out = jax.eval_shape(case.function, *a)
    assert (out.shape, out.dtype) == (a[0].shape, jnp.bfloat16)


@pytest.mark.sample
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_export_runs_what_was_exported(case: Case):
    a = case.arguments()
    function = jax.jit(lambda *b: jax.vjp(case.function, *b)[0])
    exported = jax.export.deserialize(jax.export.export(function)(*a).serialize())
    np.testing.assert_allclose(exported.call(*a), jax.jit(case.function)(*a), atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_export_for_several_platforms(case: Case):
    a = case.arguments()
    function = jax.jit(lambda *b: jax.vjp(case.function, *b)[0])
    exported = jax.export.export(function, platforms=["cpu", "tpu"])(*a)
    np.testing.assert_allclose(exported.call(*a), function(*a), atol=1e-5)


def test_export_of_known_sizes_beside_a_symbolic_one():
    """The kernel is known, the batch is not."""
    (b,) = jax.export.symbolic_shape("b")
    z, w = np.ones((2, 4), "f"), np.arange(12, dtype="f").reshape(4, 3)
    function = jax.jit(lambda z, w: z @ jaxnorm.standardize_weight(w) + jaxnorm.layer_norm(w)[0])
    exported = jax.export.export(function)(jax.ShapeDtypeStruct((b, 4), z.dtype), w)
    np.testing.assert_allclose(exported.call(z, w), function(z, w), atol=1e-5)


def test_export_with_statistics_and_moments():
    x = BATCH.arguments()[0]
    stats = jaxnorm.init_batch_stats(x.shape[-1])

    def both(x, stats):
        y, new = jaxnorm.batch_norm(x, None, None, stats, training=True)
        return y, new, jaxnorm.moments(x, (0, 1))

    stored = jax.export.export(jax.jit(both))(x, stats).serialize()
    got = jax.export.deserialize(stored).call(x, stats)
    assert (type(got[1]), type(got[2])) == (jaxnorm.BatchStats, jaxnorm.Moments)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, jax.jit(both)(x, stats))


@pytest.mark.unchecked_types  # it does not know sizes that are symbols
@pytest.mark.parametrize("case", [c for c in CASES if c not in KERNELS], ids=lambda c: c.name)
def test_export_with_a_symbolic_size(case: Case):
    b, s = jax.export.symbolic_shape("b, s")
    x, scale, bias = case.arguments()
    symbolic = jax.ShapeDtypeStruct((b, s, x.shape[-1]), x.dtype)
    function = jax.jit(lambda x: jax.vjp(lambda x: case.function(x, scale, bias), x)[1](x)[0])
    exported = jax.export.export(function)(symbolic)
    np.testing.assert_allclose(exported.call(x), function(x), atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_export_for_tpu(case: Case):
    """Lowered for a platform that is not here: nothing in the program depends on this one."""
    a = case.arguments()
    exported = jax.export.export(jax.jit(jax.grad(scalar(case.function, a))), platforms=["tpu"])(*a)
    assert exported.platforms == ("tpu",)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_strict_promotion(case: Case):
    """No implicit upcast or broadcast anywhere, for any float dtype, forward and backward."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (jnp.bfloat16, jnp.float32):
            # It would be refused when it is traced.
            y, back = jax.eval_shape(partial(jax.vjp, case.function), *case.arguments(dtype=dtype))
            assert y.dtype == dtype
            assert [g.dtype for g in jax.eval_shape(back, y)] == [dtype] * 3
