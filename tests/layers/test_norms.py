"""What both libraries' normalizations say through `jaxnorm.layers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

# At this offset the textbook's rounded mean shows.
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)) + 3e4, jnp.float32)
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")


def results(name, **options):
    """Results of the Linen and of the NNX layer on one input."""
    x = X[None] if name == "InstanceNorm" else X
    if name == "GroupNorm":
        options["num_groups"] = 2
    layer = getattr(jaxnorm.nnx, name)(4, **options, rngs=nnx.Rngs(0))
    if name == "BatchNorm":
        options["use_running_average"] = False
    linen = getattr(jaxnorm.linen, name)(**options)
    return linen.init_with_output(jax.random.key(0), x)[0], layer(x)


@pytest.mark.parametrize("name", NORMS)
def test_both_libraries_give_one_result(name):
    np.testing.assert_array_equal(*results(name, activation=jnp.tanh))


@pytest.mark.parametrize("name", NORMS)
def test_flax_flag_and_implementation_ask_for_two_passes(name):
    flag, asked = results(name, use_fast_variance=False), results(name, implementation="two_pass")
    for g, w in zip(flag, asked):
        np.testing.assert_array_equal(g, w)
    if name != "RMSNorm":  # which has no mean to round
        assert (np.asarray(flag[0]) != np.asarray(results(name)[0])).any()


@pytest.mark.parametrize("name", NORMS)
def test_an_unknown_implementation_is_refused(name):
    with pytest.raises(
        ValueError, match=r"implementation must be None .* got implementation='all'"
    ):
        results(name, implementation="all")


def test_batch_norm_has_no_kernel():
    with pytest.raises(ValueError, match=r"batch_norm: .*implementation='pallas'.* no kernel"):
        results("BatchNorm", implementation="pallas")
