"""Arrays of many blocks, the last of them reaching over the edge, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm.kernels import tiles
from jaxnorm.kernels.choice import interpreted
from jaxnorm.testing import assert_close, condition_number, oracle

# Norm, shape, shape of the parameters, reduced axes, options; with a room of 2048 elements.
CASES = {
    "ragged rows": ("layer", (50, 33), (33,), (1,), {}),
    "rows of images": ("layer", (3, 37, 20), (20,), (2,), {}),
    "two axes": ("layer", (40, 3, 10), (3, 10), (1, 2), {"axis": (1, 2)}),
    "of each sample": ("layer", (5, 30, 16), (5, 1, 16), (2,), {}),
    "cut channels": ("instance", (3, 5, 300), (300,), (1,), {}),
    "groups": ("group", (3, 4, 2, 12), (12,), (1, 2), {"num_groups": 4}),
}


@pytest.fixture
def little_room(monkeypatch):
    monkeypatch.setattr(tiles, "_ROOM", 2**11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_many_blocks(name, dtype, little_room):
    norm, shape, sizes, axes, options = CASES[name]
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=shape) + offset, dtype) for offset in (3, 0))
    scale, bias = (jnp.asarray(rng.normal(size=sizes) + 1, jnp.float32) for _ in range(2))

    def function(x, scale, bias):
        return getattr(jaxnorm, f"{norm}_norm")(
            x, scale, bias, implementation="pallas", dtype=x.dtype, **options
        )

    with interpreted():
        y, pull = jax.vjp(jax.jit(function), x, scale, bias)
        derivatives = pull(dy)
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


def test_the_cases_are_what_they_are_called(little_room):
    ragged = tiles.tiles_of((50, 33), (1,), jnp.float32)
    assert ragged.grid[0] > 1 and ragged.ragged == (0,)
    cut = tiles.tiles_of((3, 5, 300), (1,), jnp.float32)
    assert cut.grid[2] > 1 and cut.ragged == (2,)
