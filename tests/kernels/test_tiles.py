"""Blocks: whole slices, room in on-chip memory, shapes that a TPU can address."""

import math

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnorm.kernels.tiles import LANES, MOST, tiles_of

SHAPES = st.lists(st.integers(1, 700), min_size=1, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(SHAPES, st.data())
def test_blocks_hold_whole_slices_and_are_addressable(shape, data):
    axes = st.integers(0, len(shape) - 1)
    whole = tuple(sorted(data.draw(st.sets(axes, min_size=1))))
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    tiles = tiles_of(shape, whole, dtype)
    assert all(tiles.block[a] == shape[a] for a in whole if a not in tiles.cut)
    assert all(tiles.block[a] < shape[a] and a in whole for a in tiles.cut)
    assert tiles.elements <= MOST
    assert all(1 <= b <= n for b, n in zip(tiles.block, shape))
    packed = 8 if dtype == jnp.float32 else 16
    # The two last axes of a block: all of the array's, or a multiple of what a register holds.
    assert tiles.block[-1] in (shape[-1],) or tiles.block[-1] % LANES == 0
    if len(shape) > 1:
        assert tiles.block[-2] == shape[-2] or tiles.block[-2] % packed == 0
    assert all(g * b >= n for g, b, n in zip(tiles.grid, tiles.block, shape))


@pytest.mark.parametrize("shape", [(65536, 1024), (64, 197, 768), (8, 4096, 8192), (100000, 1)])
def test_a_block_is_large_and_fits(shape):
    tiles = tiles_of(shape, (len(shape) - 1,), jnp.bfloat16)
    assert 2**16 < tiles.elements <= MOST
    assert math.prod(tiles.grid) > 1


def test_blocks_hold_whole_groups():
    tiles = tiles_of((4, 28, 28, 960), (1, 2), jnp.float32, blocks=(3, 20))  # groups of 48
    assert tiles.block[3] % 48 == 0 and tiles.block[3] % LANES == 0
    assert tiles.block[:3] == (1, 28, 28)


@pytest.mark.parametrize(
    ("shape", "whole", "groups", "cut"),
    [
        ((64, 2**21), (1,), None, (1,)),
        ((2**23,), (0,), None, (0,)),
        ((8, 300, 300, 200), (1, 2), 25, (1,)),
        ((4, 3, 2**14, 2**12), (1, 2, 3), None, (1, 2)),
    ],
)
def test_slices_that_are_too_large_are_cut_into_large_chunks(shape, whole, groups, cut):
    blocks = None if groups is None else (len(shape) - 1, groups)
    tiles = tiles_of(shape, whole, jnp.bfloat16, blocks)
    assert tiles.cut == cut
    assert 2**16 < tiles.elements <= MOST


def test_slices_that_fit_are_not_cut():
    assert tiles_of((16, 2**16), (1,), jnp.bfloat16).cut == ()


def test_the_blocks_of_what_broadcasts():
    tiles = tiles_of((64, 256, 1024), (2,), jnp.float32)
    assert tiles.block_of((1, 1, 1024)) == (1, 1, 1024)
    assert tiles.index_of((64, 1, 1024), (3, 5, 0)) == (3, 0, 0)
