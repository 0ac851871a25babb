"""Kernels divided by lengths and by singular values, beside float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.core.reparameterize import spectral_norm, weight_norm
from jaxnorm.testing import assert_close

RNG = np.random.default_rng(0)
# The largest singular value is far from the others, so that power iteration converges.
KERNEL = (RNG.normal(size=(3, 4, 5)) + 2).astype("f")
START = RNG.normal(size=(1, 5)).astype("f")
SIZES = [1e-30, 1e-9, 1.0, 1e20, 1e37]


def largest(kernel) -> float:
    exact = np.asarray(kernel)
    exact = exact.astype(complex if np.iscomplexobj(exact) else float)
    return np.linalg.svd(exact.reshape(-1, exact.shape[-1]), compute_uv=False)[0]


def iterated(kernel, u, steps=1):
    """Vectors v and u, and sigma, by the formula of Miyato et al. in float64."""
    matrix = np.asarray(kernel, float).reshape(-1, kernel.shape[-1])
    u = np.asarray(u, float)
    for _ in range(steps):
        v = u @ matrix.T / np.linalg.norm(u @ matrix.T)
        u = v @ matrix / np.linalg.norm(v @ matrix)
    return v, u, float((v @ matrix @ u.T)[0, 0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_divided_by_the_largest_singular_value(dtype):
    kernel = jnp.asarray(KERNEL + (1j * KERNEL[::-1] if dtype == "complex64" else 0), dtype)
    u = jnp.asarray(START, "complex64" if dtype == "complex64" else "float32")
    got, _, sigma = jax.jit(lambda k, u: spectral_norm(k, u, steps=30, epsilon=1e-12))(kernel, u)
    assert got.dtype == jnp.promote_types(dtype, "float32")
    np.testing.assert_allclose(sigma, largest(kernel), rtol=1e-5)
    np.testing.assert_allclose(got, np.asarray(kernel) / largest(kernel), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_no_scale_is_too_small_or_too_large(size):
    kernel = jnp.asarray(size * KERNEL)
    got, u, sigma = spectral_norm(kernel, jnp.asarray(START), steps=1, epsilon=1e-12)
    _, wanted_u, wanted = iterated(KERNEL, START)
    np.testing.assert_allclose(sigma, size * wanted, rtol=1e-5)
    np.testing.assert_allclose(got, KERNEL / wanted, rtol=1e-5)
    np.testing.assert_allclose(u, wanted_u, atol=1e-6)
    normal = weight_norm(kernel, None, features=(2,), epsilon=0.0)
    exact = KERNEL.astype(float)
    assert_close(normal, exact / np.linalg.norm(exact.reshape(-1, 5), axis=0))


def test_in_double_precision():
    with jax.enable_x64(True):
        kernel = jnp.asarray(RNG.normal(size=(6, 4)))
        u = jnp.asarray(RNG.normal(size=(1, 4)))
        got, _, sigma = spectral_norm(kernel, u, steps=2, epsilon=0.0)
        wanted = iterated(kernel, u, 2)[2]
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(sigma, wanted, rtol=1e-14)
        np.testing.assert_allclose(got, np.asarray(kernel) / wanted, rtol=1e-14)


def test_it_never_overestimates_and_approaches():
    u, found = jnp.asarray(START), []
    kernel = jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32)
    for _ in range(12):
        _, u, sigma = spectral_norm(kernel, u, steps=1, epsilon=1e-12)
        found.append(float(sigma))
    assert max(found) <= largest(kernel) * (1 + 1e-6)
    assert np.all(np.diff(found) >= -1e-6)
    assert found[-1] > 0.99 * largest(kernel)


def test_gradient_takes_the_singular_vectors_as_constants():
    """d<C, W / sigma> = C / sigma - <C, W> v'u / sigma^2."""
    c = RNG.normal(size=(12, 5))
    v, u, sigma = iterated(KERNEL, START, 2)
    matrix = KERNEL.reshape(12, 5).astype(float)
    wanted = c / sigma - (c * matrix).sum() * (v.T @ u) / sigma**2

    def loss(kernel, u):
        normalized, new, sigma = spectral_norm(kernel, u, steps=2, epsilon=1e-12)
        return (normalized.reshape(12, 5) * c).sum() + 0 * (new.sum() + sigma)

    for size in (1e-9, 1.0, 1e9):
        got, to_u = jax.grad(loss, (0, 1))(jnp.asarray(size * KERNEL), jnp.asarray(START))
        np.testing.assert_allclose(size * got.reshape(12, 5), wanted, atol=1e-5)
        assert not to_u.any()


def test_a_kernel_that_starts_at_zero_is_left_as_it_is():
    """As in Flax, whose biases of attention have two axes: W / sigma would jump to norm 1."""
    u = jnp.asarray(START)
    for kernel in (jnp.zeros((3, 4, 5)), jnp.asarray(1e-3 * KERNEL)):
        run = lambda w, u=u: spectral_norm(w, u, steps=1, epsilon=1e-12)[0].sum()  # noqa: E731
        np.testing.assert_allclose(jax.grad(run)(kernel), 1)
        got, u, sigma = spectral_norm(kernel, u, steps=1, epsilon=1e-12)
        np.testing.assert_array_equal(got, kernel)
        assert sigma == 0 and not u.any()


@pytest.mark.parametrize("features", [(2,), (0, 2), (), (0, 1, 2)])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 0.5])
def test_weight_norm(features, epsilon):
    scale = RNG.normal(size=[KERNEL.shape[a] for a in features]).astype("f")
    reduced = tuple(a for a in range(3) if a not in features)
    exact = KERNEL.astype(float)
    length = np.sqrt((exact**2).sum(reduced, keepdims=True) + epsilon)
    wanted = np.expand_dims(scale, reduced) * exact / length

    def function(kernel, scale):
        return weight_norm(kernel, scale, features=features, epsilon=epsilon)

    got, back = jax.vjp(function, jnp.asarray(KERNEL), jnp.asarray(scale))
    assert_close(got, wanted, conditioning=4.0)
    c = RNG.normal(size=KERNEL.shape).astype("f")
    dv, dg = back(jnp.asarray(c))
    inner = (c * exact).sum(reduced, keepdims=True)
    wanted_dv = np.expand_dims(scale, reduced) * (c / length - inner * exact / length**3)
    np.testing.assert_allclose(dv, wanted_dv, atol=1e-5)
    np.testing.assert_allclose(dg, np.squeeze(inner / length, reduced), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_weight_of_zeros_stays_zero(dtype):
    zeros = jnp.zeros((3, 2), dtype)
    for epsilon in (0.0, 1e-12):
        run = lambda v, e=epsilon: weight_norm(v, None, features=(1,), epsilon=e).sum()  # noqa: E731
        assert run(zeros) == 0
        assert np.isfinite(np.asarray(jax.grad(run)(zeros.astype(jnp.float32)))).all()


def test_half_precision_has_lengths_of_single_precision():
    v = jnp.asarray(KERNEL, jnp.bfloat16)
    got = weight_norm(v, None, features=(2,), epsilon=1e-12)
    exact = np.asarray(v, float)
    wanted = exact / np.linalg.norm(exact.reshape(-1, 5), axis=0)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_monitor_finds_no_relu_in_it():
    """It knows one by a maximum with 0."""
    kernel, u, scale = jnp.asarray(KERNEL), jnp.asarray(START), jnp.ones(5)

    def both(kernel, u, scale):
        normalized = spectral_norm(kernel, u, steps=1, epsilon=1e-12)[0]
        return normalized, weight_norm(kernel, scale, features=(2,), epsilon=1e-12)

    equations = jax.make_jaxpr(both)(kernel, u, scale).eqns
    maxima = [e for e in equations if e.primitive.name == "max"]
    assert maxima
    assert not any(getattr(v, "val", None) == 0 for e in maxima for v in e.invars)


def test_a_kernel_without_elements():
    empty = jnp.zeros((0, 5))
    got, u, sigma = spectral_norm(empty, jnp.asarray(START), steps=1, epsilon=1e-12)
    assert got.shape == (0, 5) and sigma == 0 and not u.any()
    assert weight_norm(empty, None, features=(1,), epsilon=1e-12).shape == (0, 5)
