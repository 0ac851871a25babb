"""Whole networks with the weights of PyTorch's: the same outputs, the same running statistics."""

import copy
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
import timm
import torch
import torchvision
from flax import nnx
from torch_suite import flax_networks as nets

from jaxnorm.testing import assert_close
from jaxnorm.tools import from_torch, match_torch, to_torch


def efficient_net():
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    settings = [(1, 3, 1, 8, 8, 1), (4, 3, 2, 8, 16, 1), (4, 5, 2, 16, 24, 2)]
    norm = partial(torch.nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    theirs = EfficientNet(
        [MBConvConfig(*s, 1.0, 1.0) for s in settings],
        dropout=0.0, stochastic_depth_prob=0.0, num_classes=5, norm_layer=norm,
    )  # fmt: skip
    blocks = ((8, 8, 1, 3, 1), (8, 16, 4, 3, 2), (16, 24, 4, 5, 2), (24, 24, 4, 5, 1))
    return theirs, nets.EfficientNet(blocks)


# PyTorch's network and ours, size of images, number of layers one after another
NETWORKS = {
    "ResNet-50": lambda: (torchvision.models.resnet50(num_classes=10), nets.ResNet(), 64, 50),
    "ConvNeXt": lambda: (
        timm.models.convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5),
        nets.ConvNeXt((1, 1, 2, 1), (8, 16, 24, 32)), 64, 24,
    ),
    "EfficientNet": lambda: (*efficient_net(), 48, 18),
    "ViT": lambda: (
        timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
        ),
        nets.ViT(), 32, 12,
    ),
}  # fmt: skip


def exact(theirs, x, train):
    """Outputs and state of PyTorch's network after a step, computed in float64."""
    theirs = copy.deepcopy(theirs).double().train(train)
    y = theirs(torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2))
    return y.detach().numpy(), theirs


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree(name, train):
    theirs, ours, size, depth = NETWORKS[name]()
    nets.randomized(theirs)
    x = nets.draw(4, size, size, 3)
    variables = jax.eval_shape(ours.init, jax.random.key(0), x)
    shown = []
    variables = from_torch(theirs, ours, variables, x, show=shown.append)
    assert len(shown[0]) == len(jax.tree.leaves(variables))
    y, stepped = exact(theirs, x, train)
    assert np.abs(y).max() > 0.01
    step = jax.jit(partial(ours.apply, train=train, mutable=["batch_stats"]))
    z, new = step(variables, x)
    assert_close(z, y, np.float32, conditioning=depth, floor=np.abs(y).max())
    written = to_torch(ours, variables | new, like=shown[0])
    for key, value in stepped.state_dict().items():
        if "running" in key:
            scale = float(value.abs().max())
            assert_close(
                written[key], value.numpy(), np.float32, conditioning=depth, floor=scale, name=key
            )


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_is_exact(name):
    theirs, ours, size, _ = NETWORKS[name]()
    x = nets.draw(1, size, size, 3)
    variables = jax.eval_shape(ours.init, jax.random.key(0), x)
    assignment = match_torch(theirs, ours, variables, x)
    variables = from_torch(theirs.state_dict(), ours, variables, x, show=None)
    state = to_torch(ours, variables, like=assignment, tensors=True)
    theirs.load_state_dict(state)
    assert list(state) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(state[key], value) and state[key].dtype == value.dtype


def test_resnet_in_nnx():
    theirs = nets.randomized(torchvision.models.resnet18(num_classes=10))
    x = nets.draw(4, 64, 64, 3)
    blank = nets.ResNet18(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(blank))
    ours = from_torch(theirs, blank, show=None)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(blank))))
    y, _ = exact(theirs, x, False)
    ours.eval()
    assert_close(nnx.jit(ours)(x), y, np.float32, conditioning=18, floor=np.abs(y).max())
    y, stepped = exact(theirs, x, True)
    ours.train()
    step = nnx.jit(lambda model, x: model(x))
    z = step(ours, x)
    assert_close(z, y, np.float32, conditioning=18, floor=np.abs(y).max())
    written = to_torch(ours, like=match_torch(theirs, blank, x))
    for key, value in stepped.state_dict().items():
        if "running" in key:
            assert_close(written[key], value.numpy(), np.float32, conditioning=18, name=key)


@pytest.mark.parametrize("given", ["module", "state dict"])
def test_gpt2_in_nnx(given):
    theirs, words = nets.randomized(nets.TorchGPT2()), np.arange(14).reshape(2, 7) * 2
    source = theirs if given == "module" else theirs.state_dict()
    ours = from_torch(source, nets.GPT2(nnx.Rngs(0)), words, show=None)
    y = theirs.double()(torch.tensor(words)).detach().numpy()
    assert_close(ours(words), y, np.float32, conditioning=12, floor=np.abs(y).max())


def test_llama_block():
    theirs, x = nets.randomized(nets.TorchLlamaBlock()), nets.draw(2, 5, 12)
    ours = nets.LlamaBlock()
    variables = from_torch(theirs, ours, ours.init(jax.random.key(0), x), x, show=None)
    y = theirs.double()(torch.tensor(np.asarray(x, np.float64))).detach().numpy()
    assert_close(ours.apply(variables, x), y, np.float32, conditioning=6, floor=np.abs(y).max())


def test_files_of_torch_save(tmp_path):
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    theirs[1].to(torch.bfloat16)
    state = theirs.state_dict()
    state["0.weight"] = torch.randn(3, 4).T  # not contiguous
    adam = torch.optim.Adam(theirs.parameters())
    model = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 3), np.float32))
    for saved in (state, {"state_dict": state, "optimizer": adam.state_dict(), "epoch": 3}):
        torch.save(saved, tmp_path / "w.pt")
        new = from_torch(tmp_path / "w.pt", model, variables, show=None)["params"]
        np.testing.assert_array_equal(new["layers_0"]["kernel"], state["0.weight"].numpy().T)
        np.testing.assert_array_equal(
            new["layers_1"]["kernel"], state["1.weight"].float().numpy().T
        )
    torch.save(theirs, tmp_path / "w.pt")  # with its classes
    with pytest.raises(ValueError, match=r"it names torch\.nn.*Save weights alone"):
        from_torch(tmp_path / "w.pt", model, variables, show=None)
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="cut off or older"):
        from_torch(tmp_path / "w.pt", model, variables, show=None)


def first(x):
    return torch.tensor(np.asarray(x, np.float64)).movedim(-1, 1)


# PyTorch's layer, ours, shape of the input
LAYERS = {
    "transposed": lambda: (
        torch.nn.ConvTranspose2d(4, 6, (3, 5), 2, padding=1, output_padding=1),
        nn.ConvTranspose(6, (3, 5), (2, 2), padding=[(1, 2), (3, 4)], transpose_kernel=True),
        (2, 5, 6, 4),
    ),
    "transposed, SAME": lambda: (
        torch.nn.ConvTranspose1d(4, 6, 4, 2, padding=1),
        nn.ConvTranspose(6, (4,), (2,), padding="SAME"),
        (2, 5, 4),
    ),
    "three axes, dilated": lambda: (
        torch.nn.Conv3d(4, 6, 3, padding=2, dilation=2, groups=2),
        nn.Conv(6, (3, 3, 3), padding="SAME", kernel_dilation=2, feature_group_count=2),
        (1, 5, 6, 4, 4),
    ),
    "circular": lambda: (
        torch.nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv(6, (3,), padding="CIRCULAR"),
        (2, 5, 4),
    ),
    "group norm": lambda: (
        torch.nn.GroupNorm(2, 4, eps=1e-3),
        nn.GroupNorm(2, epsilon=1e-3),
        (2, 5, 5, 4),
    ),
    "instance norm": lambda: (
        torch.nn.InstanceNorm2d(4, affine=True, eps=1e-4),
        nn.InstanceNorm(epsilon=1e-4),
        (2, 5, 5, 4),
    ),
    "instance norm with statistics": lambda: (
        torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.BatchNorm(use_running_average=True, momentum=0.9),
        (2, 5, 5, 4),
    ),
    "weight norm": lambda: (
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 6, 3)),
        nn.Conv(6, (3,), padding="VALID"),
        (2, 7, 4),
    ),
    "weight norm, transposed": lambda: (
        torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(4, 6, 3)),
        nn.ConvTranspose(6, (3,), padding="VALID"),
        (2, 7, 4),
    ),
    "spectral norm": lambda: (
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv1d(4, 6, 3)),
        nn.Conv(6, (3,), padding="VALID"),
        (2, 7, 4),
    ),
    "spectral norm, transposed": lambda: (
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.ConvTranspose1d(6, 6, 3)),
        nn.ConvTranspose(6, (3,), padding="VALID", transpose_kernel=True),
        (2, 7, 6),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree(name):
    layer, ours, shape = LAYERS[name]()
    theirs = nets.randomized(torch.nn.Sequential(layer)).eval()
    x = nets.draw(*shape)
    model = nn.Sequential([ours])
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = from_torch(theirs, model, variables, x, show=None)
    y = theirs.double()(first(x)).movedim(1, -1).detach().numpy()
    assert_close(
        model.apply(variables, x), y, np.float32, conditioning=2, floor=max(1, np.abs(y).max())
    )


def test_a_transposed_padding_that_differs_is_an_error():
    theirs = torch.nn.ConvTranspose1d(4, 6, 3, 2, padding=1)
    model, x = nn.Sequential([nn.ConvTranspose(6, (3,), (2,))]), nets.draw(1, 5, 4)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"Set padding=\[\(1, 1\)\]"):
        from_torch(torch.nn.Sequential(theirs), model, variables, x, show=None)
