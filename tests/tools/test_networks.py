"""The shared networks themselves: each runs in evaluation, and its statistics are random."""

import jax
import numpy as np
import pytest
from flax import nnx
from tools.networks import NETWORKS

from jaxnorm.models.adapt import in_evaluation


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_random_and_finite(name):
    model, variables, inputs = NETWORKS[name]()
    run = jax.jit(lambda v, *args: in_evaluation("test", model, v, args, {}))
    found = np.concatenate([np.ravel(y) for y in jax.tree.leaves(run(variables, *inputs))])
    assert np.isfinite(found).all() and np.std(found) > 1e-3
    state = nnx.state(model) if variables is None else variables
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if "'scale'" in name and leaf.size > 3:
            assert np.ptp(np.sign(leaf)) == 2, name
        if "'var'" in name:
            assert (leaf > 0).all() and np.ptp(leaf) > 0, name
        if "'mean'" in name:
            assert np.abs(leaf).min() > 0, name
