"""The oracle against independent results: JAX, finite differences, fractions."""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import value_and_vjp

from jaxnorm.testing import assert_close, oracle


class Case(NamedTuple):
    """A call of the oracle, and its layout written by hand for the independent formula."""

    function: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    view: tuple[int, ...]
    over: tuple[int, ...]  # reduced axes of the view
    parameter: tuple[int, ...]  # scale's shape
    broadcast: tuple[int, ...]  # scale's shape when it broadcasts to x
    centered: bool = True

    @property
    def names(self):
        return {"rms_norm": ("scale",), "standardize_weight": ("gain",)}.get(
            self.function, ("scale", "bias")
        )


TRAIN = {"training": True, "epsilon": 1e-3}
CASES = {
    "batch": Case("batch_norm", (3, 4, 5), TRAIN, (3, 4, 5), (0, 1), (5,), (1, 1, 5)),
    "batch, two feature axes": Case(
        "batch_norm", (3, 4, 5), TRAIN | {"feature_axis": (-1, 0)}, (3, 4, 5), (1,), (3, 5),
        (3, 1, 5),
    ),
    "layer": Case("layer_norm", (3, 4, 5), {}, (3, 4, 5), (2,), (5,), (1, 1, 5)),
    "layer, two axes": Case(
        "layer_norm", (3, 4, 5), {"axis": (2, -2)}, (3, 4, 5), (1, 2), (4, 5), (1, 4, 5)
    ),
    "layer, other features": Case(
        "layer_norm", (5, 4, 3), {"axis": 0, "feature_axis": 1}, (5, 4, 3), (0,), (4,), (1, 4, 1)
    ),
    "rms": Case(
        "rms_norm", (3, 4, 5), {"scale_offset": 1.0}, (3, 4, 5), (2,), (5,), (1, 1, 5), False
    ),
    "rms, one axis of two": Case(
        "rms_norm", (3, 4, 5), {"axis": 1, "feature_axis": (1, 2)}, (3, 4, 5), (1,), (4, 5),
        (1, 4, 5), False,
    ),
    "group": Case(
        "group_norm", (2, 5, 6), {"num_groups": 2}, (2, 5, 2, 3), (1, 3), (6,), (1, 1, 6)
    ),
    "group, features first": Case(
        "group_norm", (2, 6, 3, 2), {"num_groups": 3, "feature_axis": 1}, (2, 3, 2, 3, 2),
        (2, 3, 4), (6,), (1, 6, 1, 1),
    ),
    "group, own axes": Case(
        "group_norm", (2, 5, 6), {"num_groups": 2, "axis": (0, 2)}, (2, 5, 2, 3), (0, 3), (6,),
        (1, 1, 6),
    ),
    "instance": Case("instance_norm", (2, 3, 4, 5), {}, (2, 3, 4, 5), (1, 2), (5,), (1, 1, 1, 5)),
    "layer, each sample": Case(
        "layer_norm", (3, 4, 5), {"scale_offset": 1.0}, (3, 4, 5), (2,), (3, 1, 5), (3, 1, 5)
    ),
    "rms, each element": Case(
        "rms_norm", (3, 4, 5), {}, (3, 4, 5), (2,), (3, 4, 5), (3, 4, 5), False
    ),
    "group, each sample": Case(
        "group_norm", (2, 5, 6), {"num_groups": 2, "scale_offset": 0.5}, (2, 5, 2, 3), (1, 3),
        (2, 1, 6), (2, 1, 6),
    ),
    "instance, each place": Case(
        "instance_norm", (2, 3, 4, 5), {"scale_offset": -1.0}, (2, 3, 4, 5), (1, 2), (1, 3, 1, 1),
        (1, 3, 1, 1),
    ),
    "weight": Case("standardize_weight", (3, 2, 4), {}, (3, 2, 4), (0, 1), (4,), (1, 1, 4)),
    "weight, own axis": Case(
        "standardize_weight", (3, 2, 4), {"axis": 2}, (3, 2, 4), (2,), (3, 2), (3, 2, 1)
    ),
}  # fmt: skip
NO_MASK = {"standardize_weight"}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
kinds = pytest.mark.parametrize("kind", ["real", "complex", "complex with real parameters"])


def draw(case: Case, kind: str = "real", *, masked: bool = False):
    """(x, parameters, dy, options) with every option of the case; the case is the seed."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))

    def normal(shape, is_complex):
        real = rng.normal(size=shape)
        return real + 1j * rng.normal(size=shape) if is_complex else real

    x, dy = (normal(case.shape, kind != "real") for _ in range(2))
    parameters = {n: normal(case.parameter, kind == "complex") for n in case.names}
    options = dict(case.options)
    if case.function == "batch_norm":
        options |= {"mean": np.zeros(case.parameter), "var": np.ones(case.parameter)}
    if masked:
        # Three elements stay in each slice: the definition has no value for none, and with two
        # real ones the terms of the derivative cancel.
        length = math.prod(case.view[a] for a in case.over)
        chosen = rng.random((length, math.prod(case.shape) // length)) < 0.6
        chosen[[0, 1, -1]] = True
        rest = [n for a, n in enumerate(case.view) if a not in case.over]
        chosen = chosen.reshape([*(case.view[a] for a in case.over), *rest])
        options["mask"] = np.moveaxis(chosen, range(len(case.over)), case.over).reshape(case.shape)
    return x, parameters, dy, options


def forward(case: Case, x, parameters, options):
    y = getattr(oracle, case.function)(x, **parameters, **options)
    return y[0] if case.function == "batch_norm" else y


def backward(case: Case, dy, x, parameters, options):
    """Cotangents by name, from the oracle's own backward."""
    found = getattr(oracle, case.function + "_vjp")(dy, x, **parameters, **options)
    return dict(zip(("x", *case.names), found, strict=True))


def naive(case: Case, x, parameters, options):
    """The definition in jnp, without care for precision or empty slices."""
    epsilon = options.get("epsilon", 1e-5 if case.function == "standardize_weight" else 1e-6)
    mask = jnp.broadcast_to(jnp.asarray(options.get("mask", True)), case.shape).reshape(case.view)
    v = x.reshape(case.view)

    def mean(a):
        total = jnp.sum(jnp.where(mask, a, jnp.zeros_like(a)), case.over, keepdims=True)
        return total / jnp.sum(mask, case.over, keepdims=True).astype(a.dtype)

    d = v - mean(v) if case.centered else v
    var = mean(jnp.real(d) ** 2 + jnp.imag(d) ** 2)
    y = (d / jnp.sqrt(var + epsilon).astype(d.dtype)).reshape(case.shape)
    scale, *bias = (parameters[n].reshape(case.broadcast).astype(x.dtype) for n in case.names)
    y = y * (options.get("scale_offset", 0.0) + scale)
    return y + bias[0] if bias else y


@pytest.mark.sample
@pytest.mark.parametrize(
    ("case", "kind", "masked"),
    [
        pytest.param(case, kind, masked, id=f"{name}, {kind}{', masked' * masked}")
        for name, case in CASES.items()
        for kind, masked in (
            ("real", False), ("complex", case.function not in NO_MASK),
            ("complex with real parameters", False),
        )
    ],
)  # fmt: skip
def test_forward_and_backward_equal_jax_autodiff(case, kind, masked):
    x, parameters, dy, options = draw(case, kind, masked=masked)
    with jax.enable_x64(True):

        @jax.jit  # one compilation instead of one for each operation
        def value_and_cotangents(primals, dy):
            y, vjp = jax.vjp(lambda x, p: naive(case, x, p, options), *primals)
            return y, vjp(dy)

        found = value_and_cotangents((x, parameters), dy)
        y, (dx, dparameters) = jax.tree.map(np.asarray, found)
    assert_close(forward(case, x, parameters, options), y, np.float64, name="y")
    ours = backward(case, dy, x, parameters, options)
    for name, theirs in ({"x": dx} | dparameters).items():
        assert ours[name].dtype == theirs.dtype
        # The reference works in float64 too and errs as much: twice the budget of one.
        assert_close(
            ours[name], theirs, np.float64, what="derivative", conditioning=2.0, name=f"d{name}"
        )


@kinds
@cases
def test_backward_equals_finite_differences(case, kind):
    x, parameters, dy, options = draw(case, kind, masked=case.function not in NO_MASK)
    primals = {"x": x} | parameters
    ours = backward(case, dy, x, parameters, options)
    step, rng = 1e-4, np.random.default_rng(0)
    for name, primal in primals.items():
        wide = primal.astype(np.result_type(np.longdouble, primal.dtype))

        def loss(shift, name=name, wide=wide):
            moved = primals | {name: wide + shift}
            y = forward(case, moved.pop("x"), moved, options)
            return np.sum((dy * y).real)

        # No wrong element hides from a random direction.
        for _ in range(5):
            direction = rng.normal(size=wide.shape)
            if np.iscomplexobj(wide):
                direction = direction + 1j * rng.normal(size=wide.shape)
            direction = direction / np.linalg.norm(direction)
            near, far = (loss(h * direction) - loss(-h * direction) for h in (step, 2 * step))
            numeric = (8 * near - far) / (12 * step)
            # Truncation is step^4 * rstd^4 (below 1e4 here) times a moderate constant; rounding is
            # 1e-15 (1e-12 where longdouble is float64).
            scale = max(1.0, abs(numeric))
            slope = np.sum(ours[name] * direction).real
            np.testing.assert_allclose(slope, numeric, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_moments_and_their_backward_equal_jax(masked, kind):
    case = CASES["layer, two axes"]
    x, _, dy, options = draw(case, kind, masked=masked)
    mask = options.get("mask")
    dmean, dm2 = dy[0, :, 0], dy[1, :, 0].real
    with jax.enable_x64(True):

        def moments(x):
            m = jnp.broadcast_to(jnp.asarray(True if mask is None else mask), x.shape)
            n = jnp.sum(m, (0, 2), keepdims=True)
            kept = jnp.where(m, x, jnp.zeros_like(x))
            mean = jnp.sum(kept, (0, 2), keepdims=True) / n.astype(x.dtype)
            d = x - mean
            square = jnp.where(m, jnp.real(d) ** 2 + jnp.imag(d) ** 2, jnp.zeros(x.shape))
            return mean[0, :, 0], jnp.sum(square, (0, 2))

        @jax.jit
        def value_and_cotangent(x, cotangents):
            found, vjp = jax.vjp(moments, x)
            return *found, *vjp(cotangents)

        mean, m2, dx = value_and_cotangent(x, (dmean, dm2))
    ours = oracle.moments(x, (0, 2), mask=mask)
    assert_close(ours.mean, np.asarray(mean), np.float64)
    assert_close(ours.m2, np.asarray(m2), np.float64)
    dx_ours = oracle.moments_vjp(dmean, dm2, x, (0, 2), mask=mask)
    assert_close(dx_ours, np.asarray(dx), np.float64, what="derivative", conditioning=2.0)


def test_evaluation_backward_equals_jax_autodiff():
    rng = np.random.default_rng(6)
    x, dy = rng.normal(size=(2, 6, 3)) + 1j * rng.normal(size=(2, 6, 3))
    mean, scale, bias = rng.normal(size=(3, 3))
    var = rng.uniform(0.5, 2.0, size=3)
    with jax.enable_x64(True):

        def formula(x, scale, bias):
            rstd = (1 / jnp.sqrt(jnp.asarray(var) + 1e-5)) * scale
            shifted = x - jnp.asarray(mean, x.dtype)[None]
            return shifted * rstd.astype(x.dtype)[None] + bias.astype(x.dtype)[None]

        y, theirs = value_and_vjp(formula)(dy, x, scale, bias)
    options = {"training": False, "mask": np.zeros(3)}  # evaluation does not use the mask
    found, stats = oracle.batch_norm(x, scale, bias, mean, var, **options)
    assert_close(found, np.asarray(y), np.float64)
    np.testing.assert_array_equal(stats.mean, mean)
    np.testing.assert_array_equal(stats.var, var)
    ours = oracle.batch_norm_vjp(dy, x, scale, bias, mean, var, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, np.asarray(b), np.float64, what="derivative", conditioning=2.0)
