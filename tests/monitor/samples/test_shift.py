"""Measures of shift against SciPy-free closed forms in NumPy, and at their edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm.monitor import (
    EDGES,
    excess_kurtosis,
    internal_covariate_shift,
    kl_divergence,
    loss_landscape,
    mean_drift,
    population_stability_index,
    quantiles,
    skewness,
    track_covariate_shift,
    variance_ratio,
)

RNG = np.random.default_rng(0)
BEFORE, NOW = RNG.normal(0.3, 1.5, (40, 7)), RNG.gamma(2.0, 1.0, (40, 7))


def floats(*arrays):
    return [np.asarray(a, np.float32) for a in arrays]


def test_quantiles_lie_where_those_of_the_numbers_do():
    values, edges = RNG.gamma(2.0, 1.0, (3, 4000)), np.linspace(0, 20, 201)
    counts = [np.bincount(np.searchsorted(edges, row), minlength=202) for row in values]
    shares, ends = (0.1, 0.33, 0.5, 0.9), {"minimum": values.min(-1), "maximum": values.max(-1)}
    got = quantiles(counts, shares, edges=edges, **ends)
    # A fifth of a bin's width.
    np.testing.assert_allclose(got, np.quantile(values, shares, axis=-1).T, atol=0.02)


def test_drift_ratio_and_divergence_of_arrays():
    drift, ratio, divergence = jax.jit(
        lambda *given: [measure(*given) for measure in (mean_drift, variance_ratio, kl_divergence)]
    )(*floats(NOW, BEFORE))
    np.testing.assert_allclose(drift, abs(NOW.mean() - BEFORE.mean()), rtol=1e-5)
    np.testing.assert_allclose(ratio, NOW.var() / BEFORE.var(), rtol=1e-5)
    # The divergence as an integral of p ln(p / q), on a fine grid.
    x = np.linspace(-40, 40, 400001)

    def density(data):
        return np.exp(-((x - data.mean()) ** 2) / (2 * data.var())) / np.sqrt(
            2 * np.pi * data.var()
        )

    p, q = density(NOW), density(BEFORE)
    inside = p > 0
    integral = (p[inside] * np.log(p[inside] / q[inside])).sum() * (x[1] - x[0])
    np.testing.assert_allclose(divergence, integral, rtol=1e-4)


def test_moments_of_channels_are_compared_one_by_one():
    @jax.jit
    def compare(*given):
        now, before = (jaxnorm.moments(a, 0) for a in given)
        alone = jax.vmap(kl_divergence, 1)(*given)
        drift, ratio = mean_drift(now, before), variance_ratio(now, before)
        return drift, ratio, kl_divergence(now, before), alone

    drift, ratio, divergence, alone = compare(*floats(NOW, BEFORE))
    np.testing.assert_allclose(drift, abs(NOW.mean(0) - BEFORE.mean(0)), rtol=1e-4)
    np.testing.assert_allclose(ratio, NOW.var(0) / BEFORE.var(0), rtol=1e-4)
    np.testing.assert_allclose(divergence, alone, rtol=1e-4)


def test_histograms():
    p, q = RNG.integers(0, 50, (3, 20)), RNG.integers(0, 50, (3, 20))
    p[:, 3] = 0
    shares = [(h + 0.5) / (h + 0.5).sum(-1, keepdims=True) for h in (p, q)]
    forth = (shares[0] * np.log(shares[0] / shares[1])).sum(-1)
    back = (shares[1] * np.log(shares[1] / shares[0])).sum(-1)

    @jax.jit
    def compare(p, q):
        empty = kl_divergence(p, 0 * q, histograms=True, smoothing=0.0)
        return kl_divergence(p, q, histograms=True), population_stability_index(p, q), empty

    divergence, index, empty = compare(p, q)
    np.testing.assert_allclose(divergence, forth, rtol=1e-5)
    np.testing.assert_allclose(index, forth + back, rtol=1e-5)
    assert np.isfinite(empty).all()


def test_shape_of_a_distribution():
    shape = jax.jit(lambda x: (skewness(x), excess_kurtosis(x)))
    for data in (NOW, BEFORE, 100 + NOW):
        z = (data - data.mean()) / data.std()
        expected = (z**3).mean(), (z**4).mean() - 3
        np.testing.assert_allclose(shape(*floats(data)), expected, rtol=1e-3, atol=1e-5)
    many = RNG.gamma(2.0, 1.0, 200000)
    counts = np.histogram(many, [-np.inf, *EDGES, np.inf])[0]
    shape = jax.jit(lambda x: (skewness(x, edges=EDGES), excess_kurtosis(x, edges=EDGES)))
    skew, kurtosis = shape(counts)
    np.testing.assert_allclose(skew, np.sqrt(2), rtol=0.05)
    np.testing.assert_allclose(kurtosis, 3.0, rtol=0.15)


def test_what_has_no_variance():
    @jax.jit
    def compare(still, moving):
        ratios = [variance_ratio(*p) for p in ((still, still), (still, moving), (moving, still))]
        divergences = kl_divergence(still, still), kl_divergence(moving, still)
        return ratios, divergences, (skewness(still), excess_kurtosis(still))

    still, moving = np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    ratios, divergences, shape = compare(still, moving)
    assert ratios == [1, 0, np.inf] and divergences == (0, np.inf) and shape == (0, 0)


def test_tracking_a_history():
    history = {0: NOW, 10: 2 * NOW + 1, 25: 2 * NOW + 1}
    rows = track_covariate_shift({step: floats(a)[0] for step, a in history.items()})
    assert [row["step"] for row in rows] == [10, 25]
    np.testing.assert_allclose(rows[0]["mean_shift"], NOW.mean() + 1, rtol=1e-4)
    np.testing.assert_allclose(rows[0]["variance_ratio"], 4, rtol=1e-4)
    assert rows[1] == {"step": 25, "mean_shift": 0.0, "variance_ratio": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: mean_drift(jnp.arange(3), jnp.ones(3)), TypeError, "int32"),
        (lambda: variance_ratio(jnp.ones(0), jnp.ones(3)), ValueError, "an element"),
        (lambda: kl_divergence(np.ones(3), np.ones(4), histograms=True), ValueError, "share"),
        (lambda: population_stability_index([1, 2], [1, 2], smoothing=-1), ValueError, "negative"),
        (lambda: skewness(jnp.ones(3), edges=[1.0]), ValueError, "one bin more"),
        (lambda: track_covariate_shift([jnp.ones(3)]), ValueError, "two steps"),
        (lambda: loss_landscape(jnp.sum, jnp.ones(2), 0.1), ValueError, "a list"),
        (
            lambda: internal_covariate_shift(jnp.sum, {"a": jnp.ones(2)}, {"b": jnp.ones(2)}),
            ValueError,
            "structure",
        ),
    ],
)
def test_refused(call, error, says):
    with pytest.raises(error, match=says) as raised:
        call()
    assert str(raised.value).split(":")[0] in globals()


def layers(params, x):
    """Named so that their alphabetical order is not that in which they are used."""
    h = jnp.tanh(x @ params["third"]["kernel"] + params["third"]["bias"])
    h = jnp.tanh(h @ params["first"]["kernel"])
    return h @ params["second"]["kernel"]


@pytest.mark.sample
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_internal_covariate_shift_is_definition_two_point_one(batch_size):
    rng = np.random.default_rng(1)

    def draw():
        shapes = {"third": (4, 5), "first": (5, 6), "second": (6, 2)}
        tree = {k: {"kernel": rng.normal(size=s)} for k, s in shapes.items()}
        tree["third"]["bias"] = rng.normal(size=5)
        return jax.tree.map(np.float32, tree)

    x, old, new = rng.normal(size=(8, 4)).astype(np.float32), draw(), draw()
    loss = lambda p: (layers(p, x) ** 2).mean()  # noqa: E731
    shift = jax.jit(partial(internal_covariate_shift, loss, batch_size=batch_size))
    found, gradient = shift(old, new), jax.jit(jax.grad(loss))
    assert found.layers == ("third", "first", "second")
    before = gradient(old)
    for i, name in enumerate(found.layers):
        mixed = {k: new[k] if k in found.layers[:i] else old[k] for k in old}
        a, b = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g[name])])
            for g in (before, gradient(mixed))
        )
        np.testing.assert_allclose(found.l2[i], np.linalg.norm(a - b), rtol=1e-4, atol=1e-6)
        angle = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose(found.cosine[i], angle, rtol=1e-4)


def test_landscape_of_a_quadratic():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(5, 5))
    a, w = a @ a.T, rng.normal(size=5)
    matrix, start = floats(a, w)
    etas = np.array([0.01, 0.05, 0.2])

    def loss(p):
        return 0.5 * p["w"] @ matrix @ p["w"]

    found = jax.jit(lambda p: loss_landscape(loss, p, etas))({"w": start})
    g = a @ w
    losses = [0.5 * (w - e * g) @ a @ (w - e * g) for e in etas]
    change = [e * np.linalg.norm(a @ g) for e in etas]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(found.gradient_change, change, rtol=1e-4)
    smoothness = np.linalg.norm(a @ g) / np.linalg.norm(g)
    np.testing.assert_allclose(found.effective_smoothness, smoothness, rtol=1e-4)
    np.testing.assert_allclose(found.loss_variation, max(losses) - min(losses), rtol=1e-4)
    np.testing.assert_allclose(found.gradient_predictiveness, max(change), rtol=1e-4)
