"""A backward pass from the output: as exact as the output's rounding allows, and without x."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cotangent
from test_package import kept

import jaxnorm
from jaxnorm.testing import oracle

SHAPE = (6, 5, 32)
AXIS = -1
DTYPES = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # with their eps
EPSILON = 1e-6
NORMS = {
    "layer": (jaxnorm.layer_norm, oracle.layer_norm, oracle.layer_norm_vjp),
    "rms": (jaxnorm.rms_norm, oracle.rms_norm, oracle.rms_norm_vjp),
}
each_norm = pytest.mark.parametrize("name", NORMS)


def arguments(name, dtype, offset=0.0, deviation=1.0, parameters=(32,), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE) * deviation + offset
    scale, bias = 1 + rng.uniform(-0.5, 0.5, parameters), rng.normal(size=parameters) * 0.5
    given = (x, scale, bias) if name == "layer" else (x, scale)
    return tuple(jnp.asarray(a, dtype) for a in given)


def bounds(name, dtype, dy, x, scale, bias=None, mask=None):
    """The derivatives, and how far they may be off: 64 units of float32, a rounding, and xhat's.

    xhat errs by d = eps/2 |y / scale|, the rounding of y. With g = dy * scale, the cotangent of
    xhat, dx = rstd (g - <g> - xhat <xhat g>) errs by rstd (d |<xhat g>| + |xhat| <|d g|>), and
    dscale = sum(dy xhat) by sum |dy d|; dbias, a sum of dy alone, by nothing.
    """
    _, reference, backward = NORMS[name]
    given = (x, scale) if bias is None else (x, scale, bias)
    y, wanted = reference(*given, mask=mask), backward(dy, *given, mask=mask)
    shift = 0.0 if bias is None else np.asarray(bias, float)
    scale, dy, x = (np.asarray(a, float) for a in (scale, dy, x))
    xhat = (y - shift) / scale
    eps = DTYPES[dtype]
    d = (eps / 2 * np.abs(y) + 2.0**-22 * (np.abs(y) + np.abs(shift))) / np.abs(scale)

    inside = np.broadcast_to(True if mask is None else mask, x.shape)
    mean = partial(np.mean, axis=AXIS, keepdims=True, where=inside)
    spread = x - mean(x) if name == "layer" else x
    rstd = 1 / np.sqrt(mean(spread**2) + EPSILON)

    def total(a):
        """Of all of a slice, over the number of elements that count in it."""
        return np.sum(a, AXIS, keepdims=True) / np.sum(inside, AXIS, keepdims=True)

    g = dy * scale
    dx = rstd * (d * np.abs(total(xhat * g)) + (np.abs(xhat) + d) * total(d * np.abs(g)))
    full = scale.ndim == x.ndim
    repeated = tuple(a for a in range(x.ndim) if scale.shape[a] == 1) if full else (0, 1)
    dscale = np.sum(np.abs(dy) * d, axis=repeated, keepdims=full)
    return [
        (w, off + eps / 2 * np.abs(w) + 64 * 2.0**-23 * max(1.0, np.abs(w).max()))
        for w, off in zip(wanted, (dx, dscale, 0.0))
    ]


def pulled(function, dy, *arguments):
    """The derivatives, in one program."""
    return jax.jit(lambda dy, *a: jax.vjp(function, *a)[1](dy))(dy, *arguments)


def assert_within(got, wanted_and_bounds, dtype):
    for what, g, (wanted, bound) in zip(("dx", "dscale", "dbias"), got, wanted_and_bounds):
        assert g.dtype == dtype and g.shape == wanted.shape
        error = np.abs(np.asarray(g, float) - wanted)
        assert (error <= bound).all(), (what, float((error / bound).max()))


@pytest.mark.sample
@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [((32,), dtype) for dtype in DTYPES]
    + [((6, 1, 32), "float32"), ((6, 1, 32), "bfloat16"), (SHAPE, "float32"), (SHAPE, "float16")],
    ids=str,
)
@each_norm
def test_derivatives(name, dtype, parameters):
    norm = NORMS[name][0]
    # Two programs, so that the second gets the output as it was rounded.
    forward = jax.jit(partial(jax.vjp, partial(norm, save="output")))
    backward = jax.jit(lambda back, dy: back(dy))
    dy = cotangent(SHAPE, dtype=dtype)
    for offset in (0.0, 1e4):
        deviation = 300.0 if offset and dtype != "float32" else 1.0
        if name == "rms":
            # Else xhat is 1 throughout, and dx nothing but rounding.
            deviation = max(deviation, offset)
        a = arguments(name, dtype, offset, deviation, parameters)
        y, back = forward(*a)
        np.testing.assert_array_equal(y, norm(*a))
        wanted = bounds(name, dtype, *map(np.asarray, (dy, *a)))
        assert_within(backward(back, dy), wanted, dtype)


@each_norm
def test_masks(name):
    a = arguments(name, "float32")
    mask = np.random.default_rng(1).random((6, 5, 32)) < 0.7
    dy = cotangent(SHAPE)
    function = partial(NORMS[name][0], save="output")
    got = pulled(partial(function, mask=mask), dy, *a)
    assert_within(got, bounds(name, "float32", *map(np.asarray, (dy, *a)), mask=mask), "float32")
    nothing = pulled(partial(function, mask=np.zeros((1, 1, 1), bool)), dy, *a)
    np.testing.assert_array_equal(nothing[0], np.zeros(SHAPE))


@each_norm
def test_forward_mode_is_the_adjoint(name):
    """<u, J t> = <J* u, t>, in the oracle's J*."""
    a = arguments(name, "float32", 1e2)
    tangents = tuple(cotangent(b.shape, 20 + i) for i, b in enumerate(a))
    u = cotangent(SHAPE)
    function = partial(NORMS[name][0], save="output")
    tangent = jax.jit(lambda *both: jax.jvp(function, *both)[1])(a, tangents)
    wanted = NORMS[name][2](*map(np.asarray, (u, *a)))
    right = sum(float(np.sum(w * np.asarray(t))) for w, t in zip(wanted, tangents))
    np.testing.assert_allclose(np.vdot(u, np.asarray(tangent, float)), right, rtol=1e-5)


def test_complex():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype("complex64")

    a, dy = (draw(4, 5, 6), draw(6) + 2, draw(6)), draw(4, 5, 6)
    got = pulled(partial(jaxnorm.layer_norm, save="output"), dy, *a)
    for g, w in zip(got, oracle.layer_norm_vjp(dy, *a)):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-4)


def test_without_parameters():
    x, dy = arguments("layer", "float32")[0], cotangent(SHAPE)
    got = pulled(partial(jaxnorm.layer_norm, save="output"), dy, x)[0]
    np.testing.assert_allclose(got, oracle.layer_norm_vjp(*map(np.asarray, (dy, x)))[0], atol=1e-5)


@each_norm
def test_what_a_scale_of_zero_loses(name):
    """Those elements of dx, and that of dscale: NaN, not a silent zero. Nothing else."""
    a = arguments(name, "float32")
    lost = np.arange(32) == 3
    a = (a[0], np.where(lost, np.float32(0), a[1]), *a[2:])
    dy = cotangent(SHAPE)
    dx, dscale, *dbias = map(np.asarray, pulled(partial(NORMS[name][0], save="output"), dy, *a))
    wanted = NORMS[name][2](*map(np.asarray, (dy, *a)))
    assert np.isnan(dx[..., lost]).all() and np.isnan(dscale[lost]).all()
    for got, want in zip((dx[..., ~lost], dscale[~lost], *dbias),
                         (wanted[0][..., ~lost], wanted[1][~lost], *wanted[2:])):  # fmt: skip
        np.testing.assert_allclose(got, want, atol=2e-5)
    # A scale that starts at zero, and is stored as gamma - 1, loses nothing.
    function = partial(NORMS[name][0], save="output", scale_offset=1.0)
    gradient = pulled(function, dy, a[0], np.zeros(32, "f"))
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("add", [False, True])
@each_norm
def test_the_next_layer_keeps_all_that_is_needed(name, add, jit):
    """Of norm(x) @ w the output is kept, once, and a number for each slice: no x."""
    rows, features, dtype = 256, 512, jnp.bfloat16
    x, residual, w = (
        cotangent((n, features), i, dtype) for i, n in enumerate((rows, rows, features))
    )
    parameters = (jnp.ones(features, dtype), jnp.zeros(features, dtype))[: 1 + (name == "layer")]

    def layer(save, w, x, *parameters):
        if add:
            fused = getattr(jaxnorm, f"add_{name}_norm")
            return fused(x, residual, *parameters, save=save)[0] @ w
        return NORMS[name][0](x, *parameters, save=save) @ w

    def bytes_kept(save):
        function = partial(layer, save)
        _, back = jax.vjp(jax.jit(function) if jit else function, w, x, *parameters)
        distinct = {id(a): a.nbytes for a in jax.tree.leaves(back)}
        return sum(distinct.values()) - w.nbytes

    small = 4 * rows + sum(p.nbytes for p in parameters)
    assert bytes_kept("output") <= x.nbytes + small
    assert bytes_kept("input") >= 2 * x.nbytes  # else there is nothing to save


@each_norm
def test_alone_it_keeps_its_output(name):
    a = arguments(name, "bfloat16")
    y = NORMS[name][0](*a)
    for run in (lambda f: f, jax.jit):
        found = kept(run(partial(NORMS[name][0], save="output")), *a)
        assert found <= y.nbytes + 4 * y[..., 0].size + sum(p.nbytes for p in a[1:])
