"""Training for any Linen or NNX model, Optax optimizer and loss, batch statistics included.

    state = create_train_state(model, optimizer, seed, example_input)
    step = make_train_step(model, optimizer, loss_fn)
    evaluate = make_eval_step(model, metrics_fn)

Statistics are part of the state that goes in and comes out, and each step updates them once. An
evaluation cannot write them. `create_sweep_state`, `make_sweep_step` and `make_sweep_eval_step`
train many seeds and hyperparameters at once in one compiled program, with the same model, loss and
batches.

A `Layout` runs the same training over a mesh of devices, in one process or many:

    layout = Layout.fully_sharded()
    state = create_train_state(model, optimizer, seed, example_input, layout=layout)
    step = make_train_step(model, optimizer, loss_fn, layout=layout)

This package imports Flax and Optax. `import jaxnorm` does not import this package.
"""

from jaxnorm.training.checkpoint import Checkpoints, DamagedCheckpointError
from jaxnorm.training.create import create_train_state
from jaxnorm.training.layout import Layout
from jaxnorm.training.state import NonFiniteLossError, TrainState, check_finite
from jaxnorm.training.steps import make_eval_step, make_train_step
from jaxnorm.training.sweep import (
    create_sweep_state,
    grid,
    make_sweep_eval_step,
    make_sweep_step,
    sweep_member,
)

__all__ = [
    "Checkpoints",
    "DamagedCheckpointError",
    "Layout",
    "NonFiniteLossError",
    "TrainState",
    "check_finite",
    "create_sweep_state",
    "create_train_state",
    "grid",
    "make_eval_step",
    "make_sweep_eval_step",
    "make_sweep_step",
    "make_train_step",
    "sweep_member",
]
