"""No rule finds anything in a normalized network of the demo, trained in the same way.

One of each network is trained here. `judge.py` judges all recordings of a demo.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn

from jaxnorm.lab.data import batch_rows, load_digits
from jaxnorm.lab.networks import build_network, draw_kernels
from jaxnorm.monitor import Monitor, Recording, diagnose
from jaxnorm.training import create_train_state, make_train_step

# The best rates of `jaxnorm demo`.
RATES = {"mlp": {"batch": 0.3}, "conv": {"batch": 1.0}}
STEPS, SIZES = {"mlp": 400, "conv": 100}, {"mlp": 60, "conv": 32}
SEED = 7
PAIRS = [("mlp", "batch"), pytest.param("conv", "batch", marks=pytest.mark.slow)]


def train(network, normalization, folder):
    data = load_digits(0)
    images, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.labels)
    # All kernels are drawn anew below.
    net = build_network(network, normalization, data.classes).clone(kernel_init=drawn)
    rate = RATES[network][normalization]
    if network == "conv":
        rate = optax.cosine_decay_schedule(rate, STEPS[network])
    state = create_train_state(net, optax.sgd(rate), 0, images[:2])
    one = draw_kernels(jax.tree.map(lambda a: np.asarray(a)[None], state.params), [SEED])
    params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[0]), one)
    state = state.replace(params=params)

    def loss(logits, rows):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    step = make_train_step(
        net, optax.sgd(rate), loss, inputs=lambda rows: (images[rows],), scan=True,
        monitor=Monitor(every=STEPS[network] // 20, channels=True),
    )  # fmt: skip
    state, metrics = step(state, batch_rows(len(images), SIZES[network], STEPS[network], SEED))
    recording = Recording(folder)
    recording.append(state)
    return recording, float(metrics["loss"][-20:].mean())


@pytest.mark.seconds(90, "it trains a deep network")
@pytest.mark.parametrize("network, normalization", PAIRS)
def test_nothing_is_found(network, normalization, tmp_path):
    recording, loss = train(network, normalization, tmp_path)
    assert loss < 1.2 and len(recording) == 20  # it learns
    assert diagnose(recording) == ()


@pytest.mark.seconds(90, "it trains a deep network")
def test_without_normalization_the_deep_network_is_found_ill(tmp_path, monkeypatch):
    monkeypatch.setitem(RATES, "mlp", {"none": 0.3})
    recording, loss = train("mlp", "none", tmp_path)
    assert loss > 2.2  # it does not
    assert [finding.rule for finding in diagnose(recording)] == ["depth-gradients"]
