"""Small forms of public architectures in Flax NNX, as other people write them."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from tools.linen_networks import EXACT, ROWS, TOKENS, image

import jaxnorm.nnx as jnnx


class BasicBlock(nnx.Module):
    def __init__(self, inputs, features, stride=1, padding="SAME", *, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), padding=padding, use_bias=False, rngs=rngs)
        self.conv1 = conv(inputs, features, strides=stride)
        self.bn1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(features, features)
        self.bn2 = nnx.BatchNorm(features, rngs=rngs)
        downsample = None
        if stride != 1 or inputs != features:
            downsample = nnx.Sequential(
                nnx.Conv(inputs, features, (1, 1), stride, use_bias=False, rngs=rngs),
                nnx.BatchNorm(features, rngs=rngs),
            )
        self.downsample = nnx.data(downsample)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class BottleneckBlock(nnx.Module):
    def __init__(self, inputs, features, stride=1, *, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, epsilon=1e-4, rngs=rngs)
        self.convs = nnx.List(
            [
                conv(inputs, 4, (1, 1)),
                conv(4, 4, (3, 3), stride, padding=EXACT),
                conv(4, features, (1, 1)),
            ]
        )
        self.norms = nnx.List([norm(4), norm(4), norm(features)])
        self.shortcut = conv(inputs, features, (1, 1), stride)
        self.shortcut_norm = norm(features)

    def __call__(self, x):
        y = x
        for conv, norm in zip(self.convs, self.norms):
            y = norm(conv(y))
            if conv is not self.convs[-1]:
                y = nnx.relu(y)
        return nnx.relu(y + self.shortcut_norm(self.shortcut(x)))


class ResNet(nnx.Module):
    def __init__(self, block=BasicBlock, *, rngs):
        self.conv1 = nnx.Conv(3, 6, (7, 7), 2, padding=((3, 3), (3, 3)), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(6, rngs=rngs)
        self.layers = nnx.List([block(6, 6, rngs=rngs), block(6, 8, 2, rngs=rngs)])
        self.fc = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.bn1(self.conv1(x))), (3, 3), (2, 2), "SAME")
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((1, 2)))


class PreActivationResNet(nnx.Module):
    def __init__(self, *, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.stem = conv(3, 6)
        self.norm1 = nnx.BatchNorm(6, rngs=rngs)
        self.conv1 = conv(6, 8, strides=2, use_bias=False)
        self.norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = conv(8, 8)
        self.shortcut = nnx.Conv(6, 8, (1, 1), 2, rngs=rngs)
        self.norm3 = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.stem(x)))
        x = self.shortcut(y) + self.conv2(nnx.relu(self.norm2(self.conv1(y))))
        return self.head(nnx.relu(self.norm3(x)).mean((1, 2)))


class NormBeforeConv(nnx.Module):
    def __init__(self, padding="SAME", *, rngs):
        self.norm1 = nnx.BatchNorm(3, rngs=rngs)
        self.conv1 = nnx.Conv(3, 6, (3, 3), 2, padding=padding, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(6, use_scale=False, rngs=rngs)
        self.conv2 = nnx.Conv(6, 4, (2, 3), padding=padding, feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return self.conv2(self.norm2(nnx.tanh(self.conv1(self.norm1(x)))))


class DenseLayer(nnx.Module):
    def __init__(self, inputs, *, rngs):
        self.norm1 = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, 8, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 3, (3, 3), use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        return jnp.concatenate([x, self.conv2(nnx.relu(self.norm2(y)))], -1)


class DenseNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.layers = nnx.Sequential(DenseLayer(6, rngs=rngs), DenseLayer(9, rngs=rngs))
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.layers(self.stem(x)))).mean((1, 2)))


class MBConv(nnx.Module):
    def __init__(self, inputs, features, stride, *, rngs):
        conv = partial(nnx.Conv, rngs=rngs)
        norm = partial(nnx.BatchNorm, epsilon=1e-3, momentum=0.99, rngs=rngs)
        wide = 2 * inputs
        self.expand = conv(inputs, wide, (1, 1), use_bias=False)
        self.norm1 = norm(wide)
        self.depthwise = conv(wide, wide, (3, 3), stride, feature_group_count=wide, use_bias=False)
        self.norm2 = norm(wide)
        self.squeeze = conv(wide, 2, (1, 1))
        self.excite = conv(2, wide, (1, 1))
        self.project = conv(wide, features, (1, 1), use_bias=False)
        self.norm3 = norm(features)
        self.drop_path = nnx.Dropout(0.2, broadcast_dims=(1, 2, 3), rngs=rngs)

    def __call__(self, x):
        y = nnx.swish(self.norm1(self.expand(x)))
        y = nnx.swish(self.norm2(self.depthwise(y)))
        se = nnx.swish(self.squeeze(y.mean((1, 2), keepdims=True)))
        y = self.norm3(self.project(y * nnx.sigmoid(self.excite(se))))
        y = self.drop_path(y)
        return x + y if x.shape == y.shape else y


class EfficientNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), 2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, epsilon=1e-3, rngs=rngs)
        self.blocks = nnx.Dict(a=MBConv(4, 6, 2, rngs=rngs), b=MBConv(6, 6, 1, rngs=rngs))
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.swish(self.norm(self.stem(x)))
        for block in self.blocks.values():
            x = block(x)
        return self.head(x.mean((1, 2)))


class UNet(nnx.Module):
    def __init__(self, *, rngs):
        up = partial(nnx.ConvTranspose, strides=(2, 2), rngs=rngs)
        self.down1 = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.down2 = nnx.Conv(4, 6, (3, 3), 2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(6, rngs=rngs)
        self.up1 = up(6, 5, (2, 2), transpose_kernel=True, use_bias=False)
        self.norm3 = nnx.BatchNorm(5, rngs=rngs)
        self.up2 = up(9, 4, (3, 3), padding="SAME")
        self.norm4 = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Conv(4, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        first = nnx.relu(self.norm1(self.down1(x)))
        x = nnx.relu(self.norm2(self.down2(first)))
        x = jnp.concatenate([nnx.relu(self.norm3(self.up1(x))), first], -1)
        return self.head(nnx.relu(self.norm4(self.up2(x))))


class SharedConv(nnx.Module):
    """One convolution at two places of the graph, each time before another norm."""

    def __init__(self, *, rngs):
        self.first = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.second = self.first
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.first(x)))
        return self.norms[1](self.second(x))


class SharedNorm(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(self.norm(layer(x)))
        return x


class ListsAndDicts(nnx.Module):
    """Layers in a list of dicts, and in a dict of lists."""

    def __init__(self, *, rngs):
        self.blocks = nnx.List(
            [
                nnx.Dict(
                    conv=nnx.Conv(3 + i, 4, (3, 3), rngs=rngs), bn=jnnx.BatchNorm(4, rngs=rngs)
                )
                for i in range(2)
            ]
        )
        self.heads = nnx.Dict(
            a=nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)]),
            b=nnx.List([nnx.Linear(4, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)]),
        )

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.relu(block["bn"](block["conv"](x)))
        x = x.mean((1, 2))
        return {name: norm(head(x)) for name, (head, norm) in self.heads.items()}


class MLP(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.Sequential(
            nnx.Linear(7, 6, use_bias=False, rngs=rngs),
            nnx.BatchNorm(6, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(6, 4, rngs=rngs),
            nnx.Dropout(0.1, rngs=rngs),
            nnx.BatchNorm(4, use_bias=False, rngs=rngs),
            nnx.gelu,
            nnx.BatchNorm(4, rngs=rngs),
            nnx.Linear(4, 3, rngs=rngs),
        )

    def __call__(self, x):
        return self.layers(x)


class GeneralMaps(nnx.Module):
    def __init__(self, *, rngs):
        self.general = nnx.LinearGeneral(7, (3, 4), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.back = nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=rngs)
        self.norm2 = nnx.BatchNorm(5, rngs=rngs)
        self.einsum = nnx.Einsum("...a,ab->...b", (5, 4), rngs=rngs)
        self.norm3 = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.general(x)))
        x = nnx.relu(self.norm2(self.back(x)))
        return self.norm3(self.einsum(x))


class Convolutions(nnx.Module):
    def __init__(self, *, rngs):
        conv = partial(nnx.Conv, rngs=rngs)
        self.convs = nnx.List(
            [
                conv(4, 6, (3, 3), feature_group_count=2),
                conv(6, 12, (3, 3), feature_group_count=6, padding="VALID"),
                conv(12, 4, (3, 2), kernel_dilation=2, padding="CIRCULAR"),
                conv(4, 5, (3, 3), input_dilation=(1, 2), padding=EXACT),
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (6, 12, 4, 5)])
        self.last = conv(5, 3, (3,), 2, padding=((2, 1),))
        self.last_norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.convs, self.norms):
            x = nnx.relu(norm(layer(x)))
        return self.last_norm(self.last(x.reshape(x.shape[0], -1, 5)))


class StandardizedWeights(nnx.Module):
    def __init__(self, *, rngs):
        conv = partial(jnnx.Conv, weight_standardization=True, rngs=rngs)
        self.conv1 = conv(3, 4, (3, 3))
        self.norm1 = nnx.GroupNorm(4, 2, rngs=rngs)
        self.conv2 = conv(4, 6, (3, 3), 2, use_gain=True, use_bias=False)
        self.norm2 = jnnx.BatchNorm(6, rngs=rngs)
        self.head = jnnx.Linear(6, 3, weight_standardization=True, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        return self.head(nnx.relu(self.norm2(self.conv2(x))).mean((1, 2)))


class NormedWeights(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.WeightNorm(nnx.Conv(3, 4, (3, 3), rngs=rngs), rngs=rngs)
        conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.conv2 = jnnx.WeightNorm(conv, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x, train: bool = False):
        x = self.conv2(nnx.relu(self.conv1(x)))
        x = nnx.relu(self.norm(x)).mean((1, 2))
        return self.head(x, update_stats=train)


class TransformerBlock(nnx.Module):
    def __init__(self, norm=nnx.LayerNorm, layer_scale=False, *, rngs):
        linear = partial(nnx.Linear, rngs=rngs)
        self.norm1 = norm(8, rngs=rngs)
        self.q = linear(8, 8)
        self.k = linear(8, 8, use_bias=False)
        self.v = linear(8, 8)
        self.out = linear(8, 8)
        self.norm2 = norm(8, rngs=rngs)
        self.gate, self.up, self.down = linear(8, 12, use_bias=False), linear(8, 12), linear(12, 8)
        self.gamma = nnx.Param(jnp.full(8, 1e-2)) if layer_scale else None
        self.norm3 = norm(8, rngs=rngs)
        self.head = linear(8, 3)

    def __call__(self, x):
        y = self.norm1(x)
        q, k, v = (f(y).reshape(*y.shape[:-1], 2, 4) for f in (self.q, self.k, self.v))
        x = x + self.out(nnx.dot_product_attention(q, k, v).reshape(x.shape))
        y = self.norm2(x)
        y = self.down(nnx.silu(self.gate(y)) * self.up(y))
        x = x + (y if self.gamma is None else y * self.gamma)
        return self.head(self.norm3(x))


class SecondReaders(nnx.Module):
    def __init__(self, *, rngs):
        self.output_twice = nnx.BatchNorm(4, rngs=rngs)
        self.conv1 = nnx.Conv(4, 4, (1, 1), rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.input_twice = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = self.output_twice(x)
        y = self.conv2(nnx.relu(self.conv1(x) + x))
        return nnx.relu(self.input_twice(y)) + y


class NothingToFold(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(7, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(nnx.tanh(self.first(x)))))


class _Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Stacked(nnx.Module):
    """Layers in a scan, and in a rematerialized and a compiled part."""

    def __init__(self, *, rngs):
        self.remat, self.jit = _Layer(rngs=rngs), _Layer(rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return _Layer(rngs=rngs)

        self.scan = make(rngs)

    def __call__(self, x):
        x = nnx.remat(lambda layer, x: layer(x))(self.remat, x)
        x = nnx.jit(lambda layer, x: layer(x))(self.jit, x)
        scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scanned(x, self.scan)


class ByCall(nnx.Module):
    """The norm is told its mode by the argument that the model's call has for it."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(7, 6, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x, train: bool = True):
        return nnx.relu(self.norm(self.linear(x), use_running_average=not train))


def _model(kind, shape, *args, **kwargs):
    return lambda: (lambda rngs: kind(*args, **kwargs, rngs=rngs), shape)


MODELS = {
    "resnet": _model(ResNet, image(size=17)),
    "resnet_bottleneck": _model(ResNet, image(size=17), BottleneckBlock),
    "resnet_preactivation": _model(PreActivationResNet, image()),
    "norm_before_conv_same": _model(NormBeforeConv, image()),
    "norm_before_conv_valid": _model(NormBeforeConv, image(), "VALID"),
    "densenet": _model(DenseNet, image(size=8)),
    "efficientnet": _model(EfficientNet, image(size=13)),
    "unet": _model(UNet, image(size=8, width=12)),
    "shared_conv": _model(SharedConv, image(4)),
    "shared_norm": _model(SharedNorm, image(4)),
    "lists_and_dicts": _model(ListsAndDicts, image()),
    "mlp": _model(MLP, ROWS),
    "general_maps": _model(GeneralMaps, ROWS),
    "convolutions": _model(Convolutions, image(4)),
    "standardized_weights": _model(StandardizedWeights, image()),
    "normed_weights": _model(NormedWeights, image()),
    "transformer": _model(TransformerBlock, TOKENS),
    "transformer_rms": _model(TransformerBlock, TOKENS, nnx.RMSNorm),
    "transformer_rms_offset": _model(
        TransformerBlock, TOKENS, partial(jnnx.RMSNorm, scale_offset=1.0)
    ),
    "transformer_layer_scale": _model(TransformerBlock, TOKENS, layer_scale=True),
    "second_readers": _model(SecondReaders, image(4)),
    "nothing_to_fold": _model(NothingToFold, ROWS),
    "stacked": _model(Stacked, image(4)),
    "by_call": _model(ByCall, ROWS),
}
