"""A tiny study: the same seed gives the same numbers, whatever runs beside it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxnorm.lab import data, study

TINY = study.StudyConfig(
    plans=(study.Plan("mlp", 7, 20, (0.1, 1e38)), study.Plan("conv", 4, 10, (0.1,))),
    normalizations=("none", "batch", "instance"),
    seeds=2,
    samples=3,
    probe_images=16,
)


@pytest.fixture(scope="module")
def digits():
    return data.load_digits(0)


@pytest.fixture(scope="module")
def result(digits):
    seen = []
    found = study.run_study(TINY, digits, seen.append)
    return found, seen


def test_every_pair_that_fits_is_trained(result):
    found, _ = result
    assert [(each.network, each.normalization) for each in found.curves] == [
        ("mlp", "none"),
        ("mlp", "batch"),
        ("conv", "none"),
        ("conv", "batch"),
        ("conv", "instance"),
    ]
    rows = [(row.network, row.normalization, row.applicable) for row in found.summaries]
    assert rows[2] == ("mlp", "instance", False) and len(rows) == 6


def test_progress_ends_with_every_step_made(result):
    _, seen = result
    last = {(state.network, state.normalization): state for state in seen}
    assert len(last) == 5
    assert all(state.step == state.steps for state in last.values())


def test_shapes_and_sampled_steps(result):
    mlp = result[0].curves[0]
    assert mlp.steps == (0, 2, 4, 6, 7)
    assert mlp.validation_accuracy.shape == (2, 2, 5)
    assert mlp.train_loss.shape == (2, 2, 4)
    assert mlp.activations.spread.shape == (2, 2, 4, 5)
    assert mlp.activations.percentiles.shape == (2, 2, 4, 5, 3)


def test_activations_are_those_of_the_layers(result):
    none, batch = result[0].curves[:2]
    np.testing.assert_allclose(batch.activations.spread[0, :, :, 0], 1, atol=0.02)  # normalized
    spread = none.activations.spread[0, :, :, 0]
    assert (spread[:, 1:] < 0.5 * spread[:, :-1]).all()  # a sigmoid's slope is 1/4
    assert (none.activations.drift[:, :, :, 0] == 0).all()
    percentiles = none.activations.percentiles[0]
    assert (np.diff(percentiles, axis=-1) >= 0).all()


def test_a_run_that_diverges_is_not_stable_and_becomes_null(result):
    found, _ = result
    mlp = found.curves[0]
    assert not np.isfinite(mlp.final_loss[1]).any() and np.isfinite(mlp.final_loss[0]).all()
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["curves"][0]["final_loss"][1] == [None, None]


def test_the_same_seed_gives_the_same_numbers(result, digits):
    config = dataclasses.replace(TINY, plans=TINY.plans[:1], normalizations=("batch",))
    again = study.run_study(config, digits, workers=1).curves[0]
    before = result[0].curves[1]
    jax.tree.map(
        np.testing.assert_array_equal, dataclasses.asdict(before), dataclasses.asdict(again)
    )
    other = study.run_study(dataclasses.replace(config, seed=1), digits).curves[0]
    assert not np.array_equal(other.train_loss[0], before.train_loss[0])


def test_an_error_in_the_callback_ends_the_study(digits):
    def interrupt(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run_study(TINY, digits, interrupt)


def test_quick_keeps_every_normalization():
    full, quick = study.demo_config(), study.demo_config(quick=True, steps=100)
    assert quick.normalizations == full.normalizations
    assert [plan.steps for plan in quick.plans] == [100, 20]
    assert all(
        set(q.learning_rates) < set(f.learning_rates) for q, f in zip(quick.plans, full.plans)
    )
