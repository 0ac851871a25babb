"""A tiny study: the same seed gives the same numbers, whatever runs beside it."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from jaxnorm.lab import data, study
from jaxnorm.lab.networks import NORMALIZATIONS
from jaxnorm.monitor import Recording

NAMES = ("none", "batch", "instance")
TINY = study.StudyConfig(
    plans=(
        study.TrainingPlan("mlp", 7, 20, (0.1, 1e38), NAMES),
        study.TrainingPlan("conv", 2, 10, (0.1,), ("instance",)),
    ),
    seeds=2,
    samples=3,
)


@pytest.fixture(scope="module")
def digits():
    return data.load_digits(0)


@pytest.fixture(scope="module")
def result(digits):
    seen = []
    found = study.run_study(TINY, digits, seen.append)
    return found, seen


@pytest.mark.seconds(90, "it trains three networks")
def test_every_pair_that_fits_is_trained(result):
    found, _ = result
    assert [(each.network, each.normalization) for each in found.curves] == [
        ("mlp", "none"),
        ("mlp", "batch"),
        ("conv", "instance"),
    ]
    rows = [(row.network, row.normalization, row.applicable) for row in found.summaries]
    assert rows[2] == ("mlp", "instance", False) and len(rows) == 4


def test_progress_ends_with_every_step_made(result):
    _, seen = result
    last = {(state.network, state.normalization): state for state in seen}
    assert len(last) == 3
    assert all(state.step == state.steps for state in last.values())


def test_shapes_and_sampled_steps(result):
    mlp = result[0].curves[0]
    assert mlp.steps == (0, 2, 4, 6, 7)
    assert mlp.validation_accuracy.shape == (2, 2, 5)
    assert mlp.train_loss.shape == (2, 2, 4)


def test_what_the_monitor_saw_is_of_the_first_seed_at_the_best_rate(result, tmp_path):
    found, _ = result
    recordings = found.write_recordings(tmp_path)
    assert list(recordings) == [(each.network, each.normalization) for each in found.curves]
    for curves in found.curves:
        recording = recordings[curves.network, curves.normalization]
        assert recording.settings["learning rate"] == curves.learning_rates[curves.best]
        # The last chunk has one step, so that its mean loss is that step's loss.
        if curves.network == "mlp":
            assert recording.steps.tolist() == [0, 2, 4, 6]
            loss = curves.train_loss[curves.best, 0, -1]
            np.testing.assert_allclose(recording.metrics["loss"][-1], loss, rtol=1e-6)
        assert (recording.shift is None) == (curves.normalization == "instance")


def test_the_monitor_sees_a_signal_die_and_normalization_keep_it(result, tmp_path):
    recordings = result[0].write_recordings(tmp_path)

    def deviation(normalization):
        recording = recordings["mlp", normalization]
        inputs = [recording[f"sigmoid_{i}:input"].channels.moments for i in range(4)]
        return [float(np.sqrt(channels.var[0]).mean()) for channels in inputs]

    np.testing.assert_allclose(deviation("batch"), 1, atol=0.02)
    none = deviation("none")
    assert all(b < 0.5 * a for a, b in itertools.pairwise(none))  # a sigmoid's slope is 1/4


def test_recordings_of_an_earlier_study_are_replaced(result, tmp_path):
    first = result[0].write_recordings(tmp_path)
    (tmp_path / "conv-instance" / "samples-00000007.npz").write_bytes(b"of a longer run")
    again = result[0].write_recordings(tmp_path)
    for key, recording in first.items():
        read = Recording(again[key].folder)
        np.testing.assert_array_equal(read.steps, recording.steps)
        np.testing.assert_array_equal(read.metrics["loss"], recording.metrics["loss"])


def test_a_run_that_diverges_is_not_stable_and_becomes_null(result):
    found, _ = result
    mlp = found.curves[0]
    assert not np.isfinite(mlp.final_loss[1]).any() and np.isfinite(mlp.final_loss[0]).all()
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["curves"][0]["final_loss"][1] == [None, None]


@pytest.mark.seconds(90, "it trains two networks")
def test_the_same_seed_gives_the_same_numbers(result, digits):
    batch = dataclasses.replace(TINY.plans[0], normalizations=("batch",))
    config = dataclasses.replace(TINY, plans=(batch,))
    again = study.run_study(config, digits, workers=1).curves[0]
    before = result[0].curves[1]
    jax.tree.map(
        np.testing.assert_array_equal, dataclasses.asdict(before), dataclasses.asdict(again)
    )
    other = study.run_study(dataclasses.replace(config, seed=1), digits).curves[0]
    assert not np.array_equal(other.train_loss[0], before.train_loss[0])


@pytest.mark.seconds(90, "it begins to train")
def test_an_error_in_the_callback_ends_the_study(digits):
    def interrupt(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run_study(TINY, digits, interrupt)


def test_the_demo_trains_with_every_normalization_quick_or_not():
    full, quick = study.demo_config(), study.demo_config(quick=True, steps=100)
    pairs = [[name for names in each.pairs().values() for name in names] for each in (full, quick)]
    assert pairs[0] == pairs[1] and set(pairs[0]) == set(NORMALIZATIONS)
    assert [plan.steps for plan in quick.plans] == [100, 20]
    assert all(
        set(q.learning_rates) < set(f.learning_rates) for q, f in zip(quick.plans, full.plans)
    )
