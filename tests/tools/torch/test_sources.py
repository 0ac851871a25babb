"""Sources of weights: files whole and damaged, code in them, dicts that do not fit; arguments."""

import json
import pickle
import zipfile

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxnorm.tools import from_torch, match_torch, to_torch
from jaxnorm.tools.torch.sources import read

RNG = np.random.default_rng(7)
W = RNG.normal(size=(4, 3)).astype(np.float32)
B = W[:, 0]


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def converted(state, model, x, **options):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return from_torch(state, model, variables, x, show=None, **options)


def test_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    state = {"z.weight": draw(4, 3), "a.weight": draw(5, 4)}
    model, x = nn.Sequential([nn.Dense(4, use_bias=False), nn.Dense(5, use_bias=False)]), draw(1, 3)
    path = tmp_path / "w.safetensors"
    safetensors.save_file(state, path)
    new = converted(path, model, x, order=list(state))["params"]
    np.testing.assert_array_equal(new["layers_1"]["kernel"], state["a.weight"].T)
    with pytest.raises(ValueError, match=r"left over.*z\.weight"):
        converted(path, model, x)
    with pytest.raises(ValueError, match=r"order must hold.*z\.weight"):
        converted(path, model, x, order=["a.weight"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"must be whole.*bytes.*again"):
        converted(path, model, x)
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].decode()
    item = json.loads(header)["a.weight"]
    twice = header.rstrip().rstrip("}") + '},"a.weight":' + json.dumps(item) + "}"
    size = len(twice).to_bytes(8, "little")
    path.write_bytes(size + twice.encode() + whole[8 + len(header) :])
    with pytest.raises(ValueError, match=r"a\.weight is there twice"):
        converted(path, model, x)


def test_layers_that_a_safetensors_file_does_not_tell_apart(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model, x = nn.Sequential([nn.Dense(3, use_bias=False) for _ in range(2)]), W
    path = tmp_path / "w.safetensors"
    safetensors.save_file({"up.weight": W[:3], "down.weight": W[1:]}, path)
    with pytest.raises(ValueError, match=r"does not keep the order.*down, up for layers_0"):
        converted(path, model, x)
    safetensors.save_file({"l.10.weight": W[:3], "l.9.weight": W[1:]}, path)
    kernel = converted(path, model, x)["params"]["layers_1"]["kernel"]
    np.testing.assert_array_equal(kernel, W[:3].T)


class Attack:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('hacked').touch()",)


def test_code_in_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps({"f.weight": Attack()}))
    with pytest.raises(ValueError, match=r"from_torch: .*names builtins.exec.*torch.save"):
        converted(path, nn.Dense(4), draw(1, 3))
    assert not (tmp_path / "hacked").exists()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="whole zip archive"):
        converted(path, nn.Dense(4), draw(1, 3))
    with zipfile.ZipFile(path, "w") as archive:
        pickled = b"ccollections\nOrderedDict\n)R(S'f.bias'\nI1\nS'f.bias'\nI2\nu."
        archive.writestr("w/data.pkl", pickled)
    with pytest.raises(ValueError, match=r"got f\.bias twice"):
        converted(path, nn.Dense(4), draw(1, 3))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_give_an_error_or_their_weights(tmp_path, suffix):
    state = {"f.weight": W, "f.bias": B}
    path, rng = tmp_path / f"w{suffix}", np.random.default_rng(3)
    if suffix == ".pt":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w/data.pkl", pickle.dumps({"f.weight": 1, "f.bias": [2.0]}))
    else:
        pytest.importorskip("safetensors.numpy").save_file(state, path)
    whole = path.read_bytes()
    errors = 0
    for number in range(200):
        damaged = bytearray(whole[: rng.integers(len(whole))] if number % 2 else whole)
        for _ in range(3 * (1 - number % 2)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read("read", path)
        except ValueError as error:
            assert str(error).startswith("read: ")
            errors += 1
    assert errors > 100


BAD = {
    "missing": ({"f.weight": W}, ValueError, r"left over in the source: .*f.weight \(4, 3\)"),
    "shape": ({"f.weight": W.T, "f.bias": draw(3)}, ValueError, r"dense Dense \(bias \(4,\)"),
    "too many": ({"f.weight": W, "f.bias": B, "g.weight": W}, ValueError, r"g.weight \(4, 3\)"),
    "not finite": ({"f.weight": W * np.nan, "f.bias": B}, ValueError, r"12 of 12 values of f.wei"),
    "nothing": ({}, ValueError, "at least one"),
    "no array": ({"f.weight": 3.0}, ValueError, "dict of arrays by name"),
    "no source": (3, TypeError, "a path, a dict of arrays or a torch.nn.Module; got int"),
    "no file": ("gone.pt", ValueError, "exists; got gone.pt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources(name):
    source, error, text = BAD[name]
    with pytest.raises(error, match=f"(?s)^from_torch: .*{text}"):
        converted(source, nn.Dense(4), draw(1, 3))


def test_bad_arguments():
    model, x, state = nn.Dense(4), draw(1, 3), {"f.weight": W, "f.bias": B}
    for options, text in [
        ({"names": {"g": "x"}}, r"every entry of names.*'g'.*layers are f"),
        ({"names": {"f": "x"}}, r"'x' for 'f', which is no layer"),
        ({"names": {"f": "{i}"}}, r"both sides"),
        ({"skip": ["x.*"]}, r"skip must match.*'x\.\*'.*f.weight"),
        ({"keep": ["x"]}, r"keep must match"),
        ({"scale_offset": {"f": 1.0}}, r"scale_offset must match"),
    ]:
        with pytest.raises(ValueError, match=text):
            converted(state, model, x, **options)
    with pytest.raises(TypeError, match="must come with its variables"):
        from_torch(state, model)
    with pytest.raises(TypeError, match="Flax module, Linen or NNX; got int"):
        from_torch(state, 3)
    with pytest.raises(TypeError, match="'params'; got dict with a"):
        from_torch(state, model, {"a": 1})
    other = nn.Dense(5).init(jax.random.key(0), x)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="like must be an assignment of this model"):
        to_torch(nn.Dense(5), other, like=match_torch(state, model, variables, x))
