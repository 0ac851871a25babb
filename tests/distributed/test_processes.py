"""Norms over arrays that several real processes share agree with one device."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import run

HERE = Path(__file__).parent
ROWS, FEATURES = 16, 8
GRADIENTS = ("dx", "dscale", "dbias", "d2x", "d2scale", "d2bias")
FOUR = ("jit masked",)
TWO = ("jit", "jit explicit", "shard_map masked", "layer_norm features", "rms_norm features")

spec = importlib.util.spec_from_file_location("worker", HERE / "worker.py")
assert spec and spec.loader
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    # Each pair of rows has a mean of its own, so that a mean of variances would be wrong.
    x = rng.normal(size=(ROWS, FEATURES)) + np.arange(ROWS)[:, None] // 2
    # The four devices keep 4, 1, 2 and no rows; of two processes one keeps 5, the other 2.
    mask = np.isin(np.arange(ROWS), (0, 1, 2, 3, 6, 8, 11)).reshape(ROWS, 1)
    scale, bias = rng.normal(size=(2, FEATURES)) + 1
    ct, direction = rng.normal(size=(2, ROWS, FEATURES))
    arrays = {"x 0": x, "x 10000": x + 1e4, "scale": scale, "bias": bias, "ct": ct}
    arrays = {k: v.astype(np.float32) for k, v in (arrays | {"direction": direction}).items()}
    return arrays | {"mask": mask}


def results(folder: Path, names, **options) -> dict[str, np.ndarray]:
    np.savez(folder / "inputs.npz", **inputs())  # type: ignore[arg-type]
    done = run(HERE / "worker.py", folder, *names, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "results.npz"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return results(folder, TWO, processes=2, devices=2)


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    return results(tmp_path_factory.mktemp("four"), FOUR, processes=4)


def plain(norm, mask, x, scale, bias):
    """The textbook's two passes, for autodiff in float64."""
    axis, epsilon = (0, 1e-5) if norm == "batch_norm" else (1, 1e-6)
    count = mask.sum() if axis == 0 else FEATURES
    mean = (x * mask).sum(axis, keepdims=True) / count * (norm != "rms_norm")
    var = ((x - mean) ** 2 * mask).sum(axis, keepdims=True) / count
    y = (x - mean) / jnp.sqrt(var + epsilon) * scale + bias
    return y, (0.1 * mean[0], 0.9 + 0.1 * var[0]) if axis == 0 else ()


@functools.cache
def on_one_device(norm):
    """The results of one process with one device, in float64."""

    @jax.jit
    def compute(mask, *arrays):
        return jax.tree.leaves(worker.derivatives(functools.partial(plain, norm, mask), *arrays))

    return compute


def check(got, case, offset):
    norm = case.split()[0] if "features" in case else "batch_norm"
    masked = worker.CASES[case][-1]
    with jax.enable_x64(True):
        given = {k: jnp.asarray(v, jnp.float64) for k, v in inputs().items()}
        mask = given["mask"] if masked else jnp.ones((ROWS, 1))
        arrays = [given[k] for k in (f"x {offset:g}", "scale", "bias", "ct", "direction")]
        wanted = [np.asarray(leaf) for leaf in on_one_device(norm)(mask, *arrays)]
    labels = (("y", "mean", "var") if norm == "batch_norm" else ("y",)) + GRADIENTS
    for i, (label, leaf) in enumerate(zip(labels, wanted, strict=True)):
        value, size = got[f"{case} {offset:g} {i}"], np.abs(leaf).max() or 1.0
        assert value.dtype == np.float32, label
        np.testing.assert_allclose(value / size, leaf / size, atol=3e-6, rtol=0, err_msg=label)


@pytest.mark.sample
@pytest.mark.seconds(90, "two processes")
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("case", TWO)
def test_two_processes_agree_with_one_device(case, offset, two_processes):
    check(two_processes, case, offset)


@pytest.mark.seconds(90, "four processes")
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("case", FOUR)
def test_four_processes_one_of_them_with_nothing(case, offset, four_processes):
    check(four_processes, case, offset)
