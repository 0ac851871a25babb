"""Arrays of many blocks, the last of them reaching over the edge, against the float64 oracle.

Slices, too, where they are larger than a block may be.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm.kernels import tiles
from jaxnorm.kernels.dispatch import interpreted
from jaxnorm.testing import assert_close, condition_number, oracle

# Norm, shape, shape of the parameters, reduced axes, options; with a room of 2048 elements, and of
# 4096 for a slice.
CASES = {
    "ragged rows": ("layer", (50, 33), (33,), (1,), {}),
    "rows of images": ("layer", (3, 37, 20), (20,), (2,), {}),
    "two axes": ("layer", (40, 3, 10), (3, 10), (1, 2), {"axis": (1, 2)}),
    "of each sample": ("layer", (5, 30, 16), (5, 1, 16), (2,), {}),
    "cut channels": ("instance", (3, 5, 300), (300,), (1,), {}),
    "groups": ("group", (3, 4, 2, 12), (12,), (1, 2), {"num_groups": 4}),
    "chunks of rows": ("layer", (20, 2000), (2000,), (1,), {}),
    "chunks of a vector": ("layer", (9000,), (9000,), (0,), {}),
    "equal chunks": ("layer", (3, 64, 256), (64, 256), (1, 2), {"axis": (1, 2)}),
    "chunks of an image": ("instance", (2, 9, 50, 60), (60,), (1, 2), {}),
    "chunks of groups": ("group", (2, 9, 50, 60), (60,), (1, 2), {"num_groups": 6}),
}


@pytest.fixture
def little_room(monkeypatch):
    monkeypatch.setattr(tiles, "ROOM", 2**11)
    monkeypatch.setattr(tiles, "MOST", 2**12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES]
    + [(name, "bfloat16") for name in ("ragged rows", "chunks of rows")],
)
def test_many_blocks(name, dtype, little_room):
    norm, shape, sizes, axes, options = CASES[name]
    rng = np.random.default_rng(0)
    x, dy = ((rng.normal(size=shape) + offset).astype(dtype) for offset in (3, 0))
    scale, bias = ((rng.normal(size=sizes) + 1).astype("f") for _ in range(2))

    def function(x, scale, bias):
        return getattr(jaxnorm, f"{norm}_norm")(
            x, scale, bias, implementation="pallas", dtype=x.dtype, **options
        )

    @jax.jit
    def run(dy, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(dy)

    with interpreted():
        y, derivatives = run(dy, x, scale, bias)
    numbers = [np.asarray(a, np.float64) for a in (x, scale, bias)]
    value, backward = (getattr(oracle, f"{norm}_norm{end}") for end in ("", "_vjp"))
    assert_close(y, value(*numbers, **options), floor=4.0)
    conditioning = condition_number(numbers[0], axes, 1e-6, terms=numbers[0].size)
    wanted = backward(np.asarray(dy, np.float64), *numbers, **options)
    for what, got, want in zip(("dx", "dscale", "dbias"), derivatives, wanted):
        assert_close(
            got, want, what="derivative", conditioning=max(1.0, conditioning),
            floor=float(np.abs(want).max()), name=what,
        )  # fmt: skip


def _chunks(first, second, size=9000):
    """Rows that begin with the one and go on with the other, by less than a chunk."""
    rng = np.random.default_rng(1)
    rows = np.full((2, size), second, np.float64)
    rows[:, :100] = first
    return (rows * (1 + 1e-3 * rng.normal(size=rows.shape))).astype("f")


def test_chunks_that_are_far_apart(little_room):
    @jax.jit
    def run(x):
        norm = partial(jaxnorm.layer_norm, implementation="pallas", epsilon=0.0)
        return norm(x), jax.grad(lambda x: jnp.sum(norm(x)[:, :50]))(x)

    for first, second in ((0, 1e4), (1e4, 1), (-1e30, 1e30), (0, 1e-15)):
        x = _chunks(first, second)
        with interpreted():
            y, dx = run(x)
        wanted = oracle.layer_norm(x.astype(np.float64), epsilon=0.0)
        assert_close(y, wanted, floor=4.0, name=f"{first} {second}")
        assert np.isfinite(dx).all(), (first, second)


def test_a_constant_slice_in_chunks_is_its_bias(little_room):
    x, bias = np.full((3, 9000), 10000.1, "f"), np.arange(9000, dtype="f")
    with interpreted():
        y = jax.jit(partial(jaxnorm.layer_norm, implementation="pallas"))(x, None, bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


def test_chunks_of_a_sum(little_room):
    rng = np.random.default_rng(0)
    x, residual, dy, dtotal = rng.normal(size=(4, 20, 3000)).astype("f")
    scale = rng.normal(size=3000).astype("f")

    @jax.jit
    def run(cotangents, *arguments):
        out, pull = jax.vjp(partial(jaxnorm.add_rms_norm, implementation="pallas"), *arguments)
        return out, pull(cotangents)

    with interpreted():
        (y, total), derivatives = run((dy, dtotal), x, residual, scale)
    np.testing.assert_array_equal(total, x + residual)
    numbers = np.asarray(total, np.float64), np.asarray(scale, np.float64)
    assert_close(y, oracle.rms_norm(*numbers), floor=4.0)
    dx, dscale = oracle.rms_norm_vjp(np.asarray(dy, np.float64), *numbers)
    dx = dx + np.asarray(dtotal, np.float64)
    for got, want in zip(derivatives, (dx, dx, dscale)):
        assert_close(got, want, what="derivative", floor=float(np.abs(want).max()))


def test_the_cases_are_what_they_are_called(little_room):
    ragged = tiles.tiles_of((50, 33), (1,), jnp.float32)
    assert ragged.grid[0] > 1 and ragged.ragged == (0,)
    cut = tiles.tiles_of((3, 5, 300), (1,), jnp.float32)
    assert cut.grid[2] > 1 and cut.ragged == (2,)
    for name, (_, shape, _, axes, options) in CASES.items():
        blocks = (len(shape) - 1, options["num_groups"]) if options.get("num_groups") else None
        tiling = tiles.tiles_of(shape, axes, jnp.float32, blocks)
        assert bool(tiling.cut) == ("chunks" in name), name
        assert bool(set(tiling.cut) & set(tiling.ragged)) == name.startswith("chunks"), name
