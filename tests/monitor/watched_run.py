"""A run that is watched, in one process or as one of several: python watched_run.py FOLDER.

Process 0 records it.
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax

from jaxnorm.distributed import initialize
from jaxnorm.linen import BatchNorm
from jaxnorm.monitor import Monitor, Recording
from jaxnorm.training import Layout, create_train_state, make_train_step

X = np.random.default_rng(0).normal(1.0, 2.0, (32, 4)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = BatchNorm(not train, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.relu(x))


def train(folder: Path) -> None:
    """Eight steps with a sample of each third."""
    layout, optimizer = Layout.data_parallel(), optax.sgd(0.1)
    share = len(X) // jax.process_count()
    own = X[jax.process_index() * share :][:share]
    state = create_train_state(Net(), optimizer, 0, X, layout=layout)
    step = make_train_step(
        Net(), optimizer, lambda y, x: (y**2).mean(), layout=layout, monitor=Monitor(every=3)
    )
    for _ in range(8):
        state, _ = step(state, layout.batch(own))
    state.monitor.read()  # as all processes can
    if jax.process_index() == 0:
        Recording(folder).append(state)


if __name__ == "__main__":
    assert initialize(timeout=60)
    train(Path(sys.argv[1]))
