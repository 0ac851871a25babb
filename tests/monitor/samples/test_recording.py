"""A recording holds what was seen, through crashes and restarts; what cannot be read is refused."""

import json

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from recordings import invent

from jaxnorm.monitor import Monitor, Recording, RecordingError, attach, observe
from jaxnorm.monitor.samples.buffer import Buffer
from jaxnorm.training import (
    create_sweep_state,
    create_train_state,
    make_sweep_step,
    make_train_step,
)

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
MODEL = nn.Sequential([nn.Dense(5), nn.BatchNorm(use_running_average=False), nn.relu, nn.Dense(2)])
OPTIMIZER = optax.sgd(0.1)
NORM = "layers_1:input"


def loss(y, _):
    return (y**2).mean()


@pytest.fixture(scope="module")
def step():
    monitor = Monitor(every=2, capacity=3)
    return make_train_step(MODEL, OPTIMIZER, loss, monitor=monitor, train_kwargs={}, donate=False)


@pytest.fixture(scope="module")
def states(step):
    """Of seven steps, after each."""
    found = [create_train_state(MODEL, OPTIMIZER, 0, X)]
    for _ in range(7):
        found.append(step(found[-1], X)[0])
    return found[1:]


def recorded(folder, states, **options):
    recording = Recording(folder, **options)
    for state in states:
        recording.append(state)
    return recording


def same(a, b):
    assert a.steps.tolist() == b.steps.tolist() and a.places == b.places and a.lost == b.lost
    for name in a:
        jax.tree.map(np.testing.assert_array_equal, a[name], b[name])


@pytest.mark.sample
def test_what_was_written_is_what_was_seen(states, tmp_path):
    recording = recorded(tmp_path / "run", states, settings={"rate": 0.1})
    assert recording.steps.tolist() == [0, 2, 4, 6] and recording.lost == 0
    assert [place.layer for place in recording.places] == ["layers_1"] * 2 + ["relu_0"] * 2
    # The last sample, against an observation of that step by itself.
    before = states[5]
    model = attach(MODEL)

    def loss_of(params):
        variables = {"params": params, "batch_stats": before.batch_stats}
        return loss(model.apply(variables, X, mutable=["batch_stats"])[0], None)

    (value, grads), seen = jax.jit(observe(jax.value_and_grad(loss_of)))(before.params)
    for name in recording:
        for a, b in zip(jax.tree.leaves(recording[name]), jax.tree.leaves(seen[name])):
            np.testing.assert_allclose(a[-1], b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(recording.metrics["loss"][-1], value, rtol=1e-5)
    norms = recording.parameters["layers_0/kernel"]
    kernel = np.linalg.norm(before.params["layers_0"]["kernel"])
    np.testing.assert_allclose(norms.weight[-1], kernel, rtol=1e-5)
    slope = np.linalg.norm(grads["layers_0"]["kernel"])
    np.testing.assert_allclose(norms.update[-1], 0.1 * slope, rtol=1e-3, atol=1e-8)
    # And all of it read again from disk.
    again = Recording(tmp_path / "run")
    same(recording, again)
    assert again.settings == {"rate": 0.1}
    assert dict(again.places[0].facts)["momentum"] == 0.99


def test_the_names_on_disk_are_those_of_format_1(states, tmp_path):
    """Written down here, since recordings of other versions of jaxnorm have them."""
    recorded(tmp_path / "run", states[-1:])
    head = json.loads((tmp_path / "run" / "recording.json").read_text())
    assert head["format"] == 1 and set(head["schema"]) == {
        "columns", "places", "with_gradient", "parameters", "shift_layers"
    }  # fmt: skip
    stored = [path for path, _ in head["schema"]["columns"]]
    moments = ["moments|count", "moments|mean", "moments|m2"]
    summary = ["size", *moments, "minimum", "maximum", "nonfinite"]
    values = [*summary, "zeros", "saturated", "dead", "histogram"]
    batch = [*moments, "running_mean", "running_var", "examples", "independent"]
    assert stored == [
        *(f"sights|values|{field}" for field in values),
        *(f"sights|gradients|{field}" for field in summary),
        *(f"sights|batches|{NORM}|{field}" for field in batch),
        *(f"parameters|{field}" for field in ("weight", "gradient", "update")),
        *("metrics|loss",),
    ]
    assert set(head["schema"]["places"][0]) == {
        "layer", "kind", "side", "order", "is_norm", "scans", "facts"
    }  # fmt: skip
    assert Recording(tmp_path / "run").schema == states[-1].monitor.schema


def test_what_was_overwritten_is_counted(states, tmp_path):
    recording = recorded(tmp_path, states[-1:])
    assert recording.steps.tolist() == [2, 4, 6] and recording.lost == 1
    assert Recording(tmp_path).lost == 1


def test_a_killed_run_goes_on_where_its_last_flush_was(states, tmp_path):
    recorded(tmp_path, states[:3])
    (tmp_path / ".half-written").write_bytes(b"PK")
    # Restarted from a checkpoint of the third step, whose samples are in the buffer still.
    resumed = recorded(tmp_path, states[2:])
    same(resumed, recorded(tmp_path / "whole", states))
    same(Recording(tmp_path), resumed)


def test_what_is_on_disk_is_neither_lost_nor_written_twice(states, tmp_path):
    recorded(tmp_path, states)
    chunks = sorted(tmp_path.glob("*.npz"))
    again = Recording(tmp_path)
    # Of its four samples the buffer holds three, and all four are here.
    assert again.append(states[-1]) == 0 and again.lost == 0
    assert sorted(tmp_path.glob("*.npz")) == chunks


def test_a_run_that_is_taken_back_is_recorded_on(step, states, tmp_path):
    recording = recorded(tmp_path / "run", states)
    state = step(states[2], 2 * X)[0]  # the fourth step, otherwise
    state = step(state, 2 * X)[0]
    assert recording.append(state) == 1
    assert recording.steps.tolist() == [0, 2, 4, 6] and recording.lost == 0
    # Its third row is of the new run, as in a recording of nothing else.
    other = Recording(tmp_path / "other")
    other.append(state)
    assert other.steps.tolist() == [0, 2, 4]
    for place in recording.places:
        ours, theirs = (jax.tree.leaves(r[place.name]) for r in (recording, other))
        for got, wanted in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(got[:3], wanted)


@pytest.mark.sample
def test_frames_trackers_and_tensorboard(states, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard, which reads what is written for it, is not installed",
    )
    recording = recorded(tmp_path / "run", states)
    frame = recording.to_dataframe()
    assert len(frame) == 4 * 4
    of_norm = frame[frame.place == NORM]
    np.testing.assert_array_equal(of_norm.step, recording.steps)
    mean = np.asarray(recording[NORM].value.moments.mean)
    np.testing.assert_allclose(of_norm["mean"], mean)
    told = {}
    recording.report_to(lambda step, numbers: told.update({step: numbers}))
    assert list(told) == [0, 2, 4, 6]
    np.testing.assert_allclose([n[f"{NORM}/mean"] for n in told.values()], mean)
    recording.to_tensorboard(tmp_path / "events")
    events = accumulator.EventAccumulator(str(tmp_path / "events"), {"tensors": 0})
    events.Reload()
    shown = events.Tensors(f"{NORM}/mean")
    assert [event.step for event in shown] == [0, 2, 4, 6]
    values = [event.tensor_proto.float_val[0] for event in shown]
    np.testing.assert_allclose(values, mean, rtol=1e-6)
    assert set(events.Tags()["tensors"]) == set(told[0])


def test_trackers_are_told_what_is_new(states, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown():
        events = EventAccumulator(str(tmp_path / "events"), {"tensors": 0})
        events.Reload()
        found = events.Tensors("metrics/loss")
        return [e.step for e in found], [e.tensor_proto.float_val[0] for e in found]

    def files():
        return sorted((tmp_path / "events").iterdir())

    (tmp_path / "events").mkdir()
    other = tmp_path / "events" / "events.out.tfevents.1.of.another"
    other.touch()
    recording = recorded(tmp_path / "run", states[:1])
    seen = list(recording.steps)
    recording.to_tensorboard(tmp_path / "events")
    assert shown()[0] == seen and len(seen) < 4
    recording.append(states[-1])
    for _ in range(2):
        recording.to_tensorboard(tmp_path / "events")
        assert shown()[0] == [0, 2, 4, 6]
        written = files()
    recording.to_tensorboard(tmp_path / "events")
    assert files() == written  # there is nothing to write
    told = []
    recording.report_to(lambda step, _: told.append(step), after=seen[-1])
    assert told == [step for step in (0, 2, 4, 6) if step > seen[-1]]

    # A restart makes step 4 and what follows again, with other numbers.
    made, rows, _ = states[-1].monitor.read()
    rows[1:] += 1
    free = np.zeros((1, rows.shape[1]), np.float32)
    again = recorded(tmp_path / "again", states[:1])
    schema = states[-1].monitor.schema
    again.append(Buffer(np.concatenate([rows, free]), np.append(made, 0), 3, schema))
    again.to_tensorboard(tmp_path / "events")
    steps, losses = shown()
    assert steps == [0, 2, 4, 6]
    np.testing.assert_allclose(losses, again.metrics["loss"], rtol=1e-6)
    assert not np.allclose(losses[2:], recording.metrics["loss"][2:])
    assert other.exists()
    elsewhere = recorded(tmp_path / "elsewhere", states[-1:])
    (tmp_path / "of another").mkdir()
    invent(tmp_path / "invented").to_tensorboard(tmp_path / "of another")
    with pytest.raises(ValueError, match="scalars of another, with no sample"):
        elsewhere.to_tensorboard(tmp_path / "of another")


def test_a_file_is_no_folder_for_a_recording(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RecordingError, match="which is a file"):
        Recording(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_an_empty_recording(tmp_path):
    recording = Recording(tmp_path / "run")
    assert len(recording) == 0 and list(recording) == [] and recording.metrics == {}
    assert recording.to_dataframe().empty and list(recording.numbers()) == []
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyError, match=r"\(none\)"):
        recording["x:input"]


def damage(folder, what):
    head, chunk = folder / "recording.json", sorted(folder.glob("*.npz"))[0]
    if what == "truncated":
        chunk.write_bytes(chunk.read_bytes()[:100])
    elif what == "empty":
        chunk.write_bytes(b"")
    elif what == "another model's":
        np.savez(chunk, steps=np.arange(2), rows=np.zeros((2, 5)), lost=0)
    elif what == "no JSON":
        head.write_text("{")
    elif what == "another version":
        head.write_text(json.dumps({**json.loads(head.read_text()), "format": 99}))
    elif what == "incomplete":
        head.write_text(json.dumps({"format": 1, "settings": {}}))
    elif what == "no head":
        head.unlink()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("truncated", "npz'"), ("empty", "npz'"), ("another model's", "npz'"),
        ("no JSON", "json'"), ("incomplete", "json'"), ("another version", "format 99"),
        ("no head", r"no recording\.json"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_and_left_alone(states, tmp_path, what, says):
    recorded(tmp_path, states)
    damage(tmp_path, what)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RecordingError, match=says) as raised:
        Recording(tmp_path)
    assert str(raised.value).startswith("Recording: ")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_models_samples_are_refused(states, tmp_path):
    recording = recorded(tmp_path, states)
    model = nn.Sequential([nn.Dense(5), nn.LayerNorm()])
    state = create_train_state(model, OPTIMIZER, 0, X)
    other = make_train_step(model, OPTIMIZER, loss, monitor=Monitor(every=1))
    state, _ = other(state, X)
    with pytest.raises(RecordingError, match="of one model"):
        recording.append(state)
    with pytest.raises(TypeError, match="a monitor's buffer"):
        recording.append(state.replace(monitor=None))
    same(Recording(tmp_path), recording)


def test_a_sweep_is_refused_with_what_to_do(tmp_path):
    model = nn.Sequential([nn.Dense(2), nn.relu])
    state = create_sweep_state(model, optax.sgd, [0, 1], {"learning_rate": [0.1, 0.1]}, X)
    state, _ = make_sweep_step(model, optax.sgd, loss, monitor=Monitor(every=1))(state, X)
    with pytest.raises(TypeError, match="sweep_member"):
        Recording(tmp_path).append(state)
