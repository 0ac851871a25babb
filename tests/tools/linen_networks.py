"""Small forms of public architectures in Flax Linen, as other people write them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxnorm.linen as jnn

EXACT = ((1, 1), (1, 1))


class BasicBlock(nn.Module):
    features: int
    stride: int = 1
    padding: Any = "SAME"

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        pad = self.padding
        y = nn.Conv(self.features, (3, 3), self.stride, padding=pad, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.features, (3, 3), padding=pad, use_bias=False)(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if y.shape != x.shape:
            x = nn.Conv(self.features, (1, 1), self.stride, use_bias=False, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-4)
        conv = partial(nn.Conv, use_bias=False)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.stride, padding=((1, 1), (1, 1)))(y)))
        y = norm()(conv(2 * self.features, (1, 1))(y))
        if y.shape != x.shape:
            x = norm()(conv(2 * self.features, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet v1: the stem, one stage of each stride, a head."""

    block: Any = BasicBlock
    stem_padding: Any = ((3, 3), (3, 3))

    @nn.compact
    def __call__(self, x, train: bool):
        pad = self.stem_padding
        x = nn.Conv(6, (7, 7), 2, padding=pad, use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = self.block(6)(x, train)
        x = self.block(8, 2)(x, train)
        return nn.Dense(5)(x.mean((1, 2)))


class PreActivationResNet(nn.Module):
    """ResNet v2: norm, relu, conv; the sum is read by the next norm and by the next sum."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(6, (3, 3))(x)
        for features, stride in ((6, 1), (8, 2)):
            y = nn.relu(norm()(x))
            shortcut = nn.Conv(features, (1, 1), stride)(y) if stride > 1 else x
            y = nn.Conv(features, (3, 3), stride, use_bias=False)(y)
            y = nn.Conv(features, (3, 3))(nn.relu(norm()(y)))
            x = shortcut + y
        return nn.Dense(5)(nn.relu(norm()(x)).mean((1, 2)))


class NormBeforeConv(nn.Module):
    """Norms directly before convolutions of every padding."""

    padding: Any = "SAME"
    stride: int = 1

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(6, (3, 3), self.stride, padding=self.padding, use_bias=False)(norm()(x))
        x = nn.tanh(x)
        x = nn.Conv(4, (2, 3), padding=self.padding, feature_group_count=2)(norm()(x))
        x = nn.tanh(x).reshape(x.shape[0], -1)
        return nn.Dense(3)(norm(use_bias=False)(x))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        for _ in range(2):
            y = nn.Conv(8, (1, 1), use_bias=False)(nn.relu(norm()(x)))
            y = nn.Conv(3, (3, 3), use_bias=False)(nn.relu(norm()(y)))
            x = jnp.concatenate([x, y], -1)
        x = nn.Conv(6, (1, 1), use_bias=False)(nn.relu(norm()(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(norm()(x).mean((1, 2)))


class MBConv(nn.Module):
    """A block of EfficientNet: expansion, depthwise, squeeze and excitation, projection."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-3, momentum=0.99)
        wide = 2 * x.shape[-1]
        y = nn.swish(norm()(nn.Conv(wide, (1, 1), use_bias=False)(x)))
        depthwise = nn.Conv(
            wide, (3, 3), self.stride, feature_group_count=wide, use_bias=False, name="depthwise"
        )
        y = nn.swish(norm()(depthwise(y)))
        se = nn.Conv(2, (1, 1))(y.mean((1, 2), keepdims=True))
        y = y * nn.sigmoid(nn.Conv(wide, (1, 1))(nn.swish(se)))
        y = norm()(nn.Conv(self.features, (1, 1), use_bias=False)(y))
        y = nn.Dropout(0.2, broadcast_dims=(1, 2, 3))(y, deterministic=not train)
        return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
    @nn.compact
    def __call__(self, x, training: bool = False):
        x = nn.Conv(4, (3, 3), 2, use_bias=False)(x)
        x = nn.swish(nn.BatchNorm(not training, epsilon=1e-3)(x))
        x = MBConv(6, 2)(x, training)
        x = MBConv(6, 1)(x, training)
        x = nn.Dropout(0.2)(x.mean((1, 2)), deterministic=not training)
        return nn.Dense(5)(x)


class UNet(nn.Module):
    """Transposed convolutions of both kernel layouts, and concatenations."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        first = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        second = nn.max_pool(first, (2, 2), (2, 2))
        second = nn.relu(norm()(nn.Conv(6, (3, 3))(second)))
        bottom = nn.relu(norm()(nn.Conv(8, (3, 3), 2)(second)))
        up = nn.ConvTranspose(6, (2, 2), (2, 2), transpose_kernel=True, use_bias=False)(bottom)
        up = nn.relu(jnp.concatenate([norm()(up), second], -1))
        up = norm()(nn.ConvTranspose(4, (3, 3), (2, 2), padding="VALID")(up))
        up = jnp.concatenate([nn.relu(up)[:, :-1, :-1], first], -1)
        return nn.Conv(2, (1, 1))(up)


class SharedConv(nn.Module):
    """One convolution that is used twice, each time with another norm."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = nn.Conv(x.shape[-1], (3, 3), name="shared")
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(conv(x)))
        return x


class SharedNorm(nn.Module):
    """One norm that is used after two convolutions."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = nn.BatchNorm(use_running_average=not train, name="shared")
        for _ in range(2):
            x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
        return x


class ListsAndDicts(nn.Module):
    """Layers in a list and in a dict, made in setup; `use_running_average` tells the mode."""

    def setup(self):
        self.blocks = [(nn.Conv(4, (3, 3)), nn.BatchNorm()) for _ in range(2)]
        self.heads = {"a": nn.Dense(3), "b": nn.Dense(2)}
        self.head_norms = {"a": nn.BatchNorm(), "b": nn.BatchNorm()}

    def __call__(self, x, use_running_average: bool = True):
        for conv, norm in self.blocks:
            x = nn.relu(norm(conv(x), use_running_average=use_running_average))
        x = x.mean((1, 2))
        return {
            name: self.head_norms[name](head(x), use_running_average=use_running_average)
            for name, head in self.heads.items()
        }


class MLP(nn.Module):
    """Dense, norm, relu, dropout; the norm comes before or after what changes only the shape."""

    @nn.compact
    def __call__(self, x, *, deterministic: bool = True):
        norm = partial(nn.BatchNorm, use_running_average=deterministic)
        x = nn.Dense(7, use_bias=False)(x)
        x = nn.relu(norm()(x))
        x = nn.Dropout(0.5)(x, deterministic=deterministic)
        x = nn.Dropout(0.1)(nn.Dense(6)(x), deterministic=deterministic)
        x = norm(use_scale=False)(x.reshape(-1, 6))
        x = nn.gelu(x)
        return nn.Dense(3)(norm()(x))


class GeneralMaps(nn.Module):
    """DenseGeneral and Einsum, each before a norm."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(axis=(-2, -1))(nn.DenseGeneral((3, 4), use_bias=False)(x)))
        x = nn.relu(norm()(nn.DenseGeneral(5, axis=(-2, -1))(x)))
        return norm()(nn.Einsum((5, 4), "...a,ab->...b")(x))


class Convolutions(nn.Module):
    """Grouped, depthwise, dilated, circular, local and one-dimensional convolutions."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(6, (3, 3), feature_group_count=2)(x)))
        x = nn.relu(norm()(nn.Conv(12, (3, 3), feature_group_count=6, padding="VALID")(x)))
        x = nn.relu(norm()(nn.Conv(4, (3, 2), kernel_dilation=2, padding="CIRCULAR")(x)))
        x = nn.relu(norm()(nn.Conv(5, (3, 3), input_dilation=(1, 2), padding=EXACT)(x)))
        x = nn.relu(norm()(nn.ConvLocal(4, (3, 3), (2, 2), padding="VALID")(x)))
        x = x.reshape(x.shape[0], -1, 4)
        return norm()(nn.Conv(3, (3,), 2, padding=((2, 1),))(x))


class StandardizedWeights(nn.Module):
    """jaxnorm's convolutions and dense layers of standardized kernels, with and without a gain."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = partial(jnn.Conv, weight_standardization=True)
        x = nn.relu(nn.GroupNorm(2)(conv(4, (3, 3))(x)))
        x = conv(6, (3, 3), 2, use_gain=True, use_bias=False)(x)
        x = nn.relu(jnn.BatchNorm(use_running_average=not train)(x))
        return jnn.Dense(3, weight_standardization=True)(x.mean((1, 2)))


class NormedWeights(nn.Module):
    """Weight norm and spectral norm around layers."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.WeightNorm(nn.Conv(4, (3, 3)))(x))
        x = nn.WeightNorm(nn.Conv(4, (3, 3), use_bias=False))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)


class TransformerBlock(nn.Module):
    """Norms before q, k, v and before the MLP; `norm` has a scale, an offset of it, or a bias."""

    norm: Any = nn.LayerNorm
    layer_scale: bool = False

    @nn.compact
    def __call__(self, x):
        y = self.norm()(x)
        q, k, v = (nn.DenseGeneral((2, 4), use_bias=name != "k", name=name)(y) for name in "qkv")
        y = nn.dot_product_attention(q, k, v)
        x = x + self.scaled("gamma_1", nn.DenseGeneral(8, axis=(-2, -1), name="out")(y))
        y = self.norm()(x)
        y = nn.silu(nn.Dense(12, use_bias=False, name="gate")(y)) * nn.Dense(12, name="up")(y)
        x = x + self.scaled("gamma_2", nn.Dense(8, name="down")(y))
        return nn.Dense(3, name="head")(self.norm()(x))

    def scaled(self, name, y):
        if not self.layer_scale:
            return y
        return y * self.param(name, nn.initializers.constant(1e-2), (y.shape[-1],))


class PostNormBlock(nn.Module):
    """Norms after the sums: the next sum reads their output too."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x))))
        return nn.LayerNorm()(x + nn.Dense(8)(x))


class SecondReaders(nn.Module):
    """Norms whose output, and norms whose input, is used a second time."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = norm(name="output_twice")(x)
        y = nn.relu(nn.Conv(4, (1, 1))(x) + x.sum(-1, keepdims=True))
        y = nn.Conv(4, (3, 3))(y)
        y = nn.relu(norm(name="input_twice")(y)) + y
        return nn.Dense(3)(y.mean((1, 2)))


class NothingToFold(nn.Module):
    """Each norm is followed and preceded by a nonlinearity."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.tanh(nn.Dense(6)(x)))
        return nn.Dense(3)(nn.relu(x))


class _Layer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        y = nn.Conv(4, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=not self.train)(y)), None


class Stacked(nn.Module):
    """Layers in a scan, in a rematerialized and in a compiled part; a field tells the mode."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x, _ = nn.remat(_Layer)(self.train, name="remat")(x, None)
        x, _ = nn.jit(_Layer)(self.train, name="jit")(x, None)
        scanned = nn.scan(
            _Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True},
            length=2,
        )(self.train, name="scan")  # fmt: skip
        return scanned(x, None)[0]


class ByField(nn.Module):
    """The mode is a field of the model and of its layers."""

    use_running_average: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, use_bias=False)(x)
        x = nn.BatchNorm(self.use_running_average)(x)
        return nn.Dense(3)(nn.relu(x))


def image(channels=3, size=9, width=None):
    return jax.ShapeDtypeStruct((2, size, width or size - 1, channels), jnp.float32)


ROWS = jax.ShapeDtypeStruct((5, 7), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)

MODELS = {
    "resnet": lambda: (ResNet(), image(size=17)),
    "resnet_explicit": lambda: (
        ResNet(partial(BasicBlock, padding=EXACT), stem_padding="SAME"), image(size=16)
    ),
    "resnet_bottleneck": lambda: (ResNet(BottleneckBlock), image(size=17)),
    "resnet_preactivation": lambda: (PreActivationResNet(), image()),
    "norm_before_conv_same": lambda: (NormBeforeConv(), image()),
    "norm_before_conv_stride": lambda: (NormBeforeConv(stride=2), image()),
    "norm_before_conv_explicit": lambda: (NormBeforeConv(((2, 0), (1, 3)), stride=2), image()),
    "norm_before_conv_valid": lambda: (NormBeforeConv("VALID"), image()),
    "densenet": lambda: (DenseNet(), image(size=8)),
    "efficientnet": lambda: (EfficientNet(), image(size=13)),
    "unet": lambda: (UNet(), image(size=8, width=12)),
    "shared_conv": lambda: (SharedConv(), image()),
    "shared_norm": lambda: (SharedNorm(), image()),
    "lists_and_dicts": lambda: (ListsAndDicts(), image()),
    "mlp": lambda: (MLP(), ROWS),
    "general_maps": lambda: (GeneralMaps(), ROWS),
    "convolutions": lambda: (Convolutions(), image(4)),
    "standardized_weights": lambda: (StandardizedWeights(), image()),
    "normed_weights": lambda: (NormedWeights(), image()),
    "transformer": lambda: (TransformerBlock(), TOKENS),
    "transformer_rms": lambda: (TransformerBlock(nn.RMSNorm), TOKENS),
    "transformer_rms_offset": lambda: (
        TransformerBlock(partial(jnn.RMSNorm, scale_offset=1.0)), TOKENS
    ),
    "transformer_layer_scale": lambda: (TransformerBlock(layer_scale=True), TOKENS),
    "transformer_post_norm": lambda: (PostNormBlock(), TOKENS),
    "second_readers": lambda: (SecondReaders(), image(4)),
    "nothing_to_fold": lambda: (NothingToFold(), ROWS),
    "stacked": lambda: (Stacked(), image(4)),
    "by_field": lambda: (ByField(), ROWS),
}  # fmt: skip
