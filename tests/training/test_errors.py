"""Bad input is refused at trace time, in three parts: operation, given values, what to do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import Dense, Linear
from flax import linen as nn
from flax import nnx

from jaxnorm.training import (
    create_sweep_state,
    create_train_state,
    make_eval_step,
    make_sweep_eval_step,
    make_sweep_step,
    make_train_step,
    sweep_member,
)

X = np.ones((4, 3), np.float32)
SGD = optax.sgd(0.1)
DENSE = Dense(1)


def mean(y, batch):
    return y.mean()


class NoMode(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


class Widening(nn.Module):
    """A layer that writes its statistic in another dtype than the initial one."""

    dtype: str = "float16"

    @nn.compact
    def __call__(self, x, train):
        var = self.variable("batch_stats", "var", jnp.ones, (3,), jnp.float32)
        if train and not self.is_initializing():
            var.value = x.var(0).astype(self.dtype)
        return Dense(1)(x)


class Growing(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        self.sow("kept", "h", x.mean())
        return Dense(1)(x)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


@functools.cache  # a refused call does not change the state
def start(model=DENSE):
    return create_train_state(model, SGD, 0, X)


def run(model=DENSE, loss=mean, batch=X, state_model=None, **options):
    state = start(state_model or model)
    return make_train_step(model, SGD, loss, **options)(state, batch)


def sweep(model=DENSE, make=optax.sgd, seeds=(0, 1), rates=(0.1, 0.2), **options):
    values = {"learning_rate": list(rates)}
    return create_sweep_state(model, make, seeds, values, X)


two_members = functools.cache(sweep)


def swept(batch=X, **options):
    return make_sweep_step(DENSE, optax.sgd, mean, **options)(two_members(), batch)


CASES = {
    "no model": (TypeError, lambda: make_train_step(3, SGD, mean), "got 3. Pass an instance"),
    "linen class": (TypeError, lambda: make_eval_step(nn.Dense, mean), "got the class Dense"),
    "factory": (
        TypeError,
        lambda: create_train_state(lambda rngs: 3, SGD, 0, X),
        "called with nnx.Rngs returned int",
    ),
    "linen factory": (
        TypeError,
        lambda: make_train_step(lambda rngs: DENSE, SGD, mean),
        "returned Dense. Pass an instance",
    ),
    "optimizer": (
        TypeError,
        lambda: make_train_step(DENSE, optax.sgd, mean),
        "got sgd. Call it with its hyperparameters",
    ),
    "multi steps": (
        TypeError,
        lambda: create_train_state(DENSE, optax.MultiSteps(SGD, 2), 0, X),
        "Pass optimizer.gradient_transformation()",
    ),
    "seed": (
        TypeError,
        lambda: create_train_state(DENSE, SGD, "0", X),
        "rng must be an integer seed or one random key; got '0'",
    ),
    "keys": (
        TypeError,
        lambda: create_train_state(DENSE, SGD, jax.random.split(jax.random.key(0)), X),
        "got an array of shape (2,) and dtype key<fry>",
    ),
    "inputs of init": (
        TypeError,
        lambda: create_train_state(DENSE, SGD, 0, X, X),
        "was given ((4, 3), (4, 3)): too many positional arguments. Choose the inputs",
    ),
    "loss shape": (
        ValueError,
        lambda: run(loss=lambda y, b: y),
        "loss_fn returned shape (4, 1). Reduce it",
    ),
    "loss dtype": (
        TypeError,
        lambda: run(loss=lambda y, b: y.mean().astype(int)),
        "loss_fn returned int32",
    ),
    "loss none": (TypeError, lambda: run(loss=lambda y, b: None), "got NoneType. Return a scalar"),
    "loss pair": (
        TypeError,
        lambda: run(loss=lambda y, b: (y.mean(), 3)),
        "got a tuple of array, int",
    ),
    "loss twice": (
        ValueError,
        lambda: run(loss=lambda y, b: (y.mean(), {"loss": 1})),
        "Rename that metric",
    ),
    "batch dict": (
        ValueError,
        lambda: run(batch={"image": X}),
        "got a dict with the keys 'image'. Say where it is: inputs=",
    ),
    "batch empty": (ValueError, lambda: run(batch=()), "got an empty tuple"),
    "inputs": (
        ValueError,
        lambda: run(inputs=lambda b: [b]),
        "inputs(batch) must return the model's inputs; got list",
    ),
    "too many inputs": (
        TypeError,
        lambda: run(inputs=lambda b: (b, b)),
        "the model must accept its inputs; Dense.__call__",
    ),
    "no mode": (
        ValueError,
        lambda: run(NoMode()),
        "make_train_step: a model with batch statistics must be told whether it trains; NoMode",
    ),
    "no mode in eval": (
        ValueError,
        lambda: make_eval_step(NoMode(), mean)(start(NoMode()), X),
        'eval_kwargs={"my_flag": ...}',
    ),
    "unknown flag": (
        TypeError,
        lambda: make_train_step(NoMode(), SGD, mean, train_kwargs={"train": True}),
        "got train for NoMode.__call__(self, x)",
    ),
    "unknown flag of nnx": (
        TypeError,
        lambda: make_eval_step(Net(nnx.Rngs(0)), mean, eval_kwargs={"is_train": False}),
        "got is_train for Net.__call__(self, x)",
    ),
    "dtype of a statistic": (
        TypeError,
        lambda: run(Widening()),
        "state.batch_stats['var'] was float32[3] and became float16[3]. A state keeps",
    ),
    "structure of the state": (
        TypeError,
        lambda: run(Growing()),
        "state.model_state['kept']['h'][1] was absent and became float32[]",
    ),
    "state of another model": (
        ValueError,
        lambda: run(Net, state_model=DENSE),
        "the state must belong to the model; Net and the state differ in",
    ),
    "no state": (
        TypeError,
        lambda: make_train_step(DENSE, SGD, mean)({"params": X}, X),
        "must be a TrainState; got dict",
    ),
    "metrics": (
        TypeError,
        lambda: make_eval_step(DENSE, mean)(start(), X),
        "metrics_fn must return a dict of arrays",
    ),
    "scan": (
        ValueError,
        lambda: run(scan=True, batch=(X, X[:2])),
        "with scan=True, steps; got leaves of shape (4, 3), (2, 3)",
    ),
    "sweep lengths": (
        ValueError,
        lambda: sweep(rates=[0.1]),
        "got 2 seeds and hyperparameters of shape {'learning_rate': (1,)}",
    ),
    "sweep without members": (ValueError, lambda: sweep(seeds=(), rates=()), "got 0 seeds"),
    "sweep of an instance": (
        ValueError,
        lambda: sweep(model=Net(nnx.Rngs(0))),
        "got 2 seeds and an instance of Net",
    ),
    "sweep optimizer": (TypeError, lambda: sweep(make=SGD), "Pass optax.sgd rather than"),
    "sweep names": (
        ValueError,
        lambda: sweep(make=lambda lr: optax.sgd(lr)),
        "it was to be called with learning_rate: missing",
    ),
    "sweep factory": (
        TypeError,
        lambda: sweep(make=lambda learning_rate: 3),
        "optimizer must be an optax.GradientTransformation; got int",
    ),
    "sweep state": (
        TypeError,
        lambda: make_sweep_eval_step(DENSE, mean)(start(), X),
        "must be the state of a sweep; got a TrainState with step of shape ()",
    ),
    "single step of a sweep": (
        TypeError,
        lambda: make_train_step(DENSE, SGD, mean)(two_members(), X),
        "the state must be that of one run; got a sweep of 2 members. Use",
    ),
    "sweep batch": (
        ValueError,
        lambda: swept(batch_per_member=True),
        "each of the 2 members; its leaves have a leading axis of 4",
    ),
    "member": (IndexError, lambda: sweep_member(two_members(), 2), "one of the sweep's 2; got 2"),
}


@pytest.mark.sample
@pytest.mark.parametrize("name", CASES)
def test_refusal(name):
    error, call, message = CASES[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    text = str(caught.value)
    assert re.match(r"(make|create|sweep)_\w+: ", text), text
    assert len(re.findall(r"[.:;] ", text)) >= 2, text


def test_a_refused_state_is_not_donated():
    state = create_train_state(Widening(), SGD, 0, X)
    with pytest.raises(TypeError):
        make_train_step(Widening(), SGD, mean)(state, X)
    state, _ = make_train_step(Widening("float32"), SGD, mean)(state, X)
    assert int(state.step) == 1
