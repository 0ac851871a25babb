"""Whole networks around a normalization, in Linen: a ResNet, a transformer, a U-Net, and blocks.

Activations are bfloat16 unless another dtype is given, and parameters are float32. `norm` makes a
layer, so that one network can have any library's layer, or no layer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

DTYPE = jnp.bfloat16


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, each normalized, beside a shortcut (He et al. 2015)."""

    norm: Callable[[], nn.Module]
    width: int
    stride: int
    dtype: Any = DTYPE
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        strides = (self.stride, self.stride)
        y = self.activation(self.norm()(conv(self.width, (1, 1))(x)))
        y = self.activation(self.norm()(conv(self.width, (3, 3), strides)(y)))
        y = self.norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.width, (1, 1), strides)(x))
        return self.activation(x + y)


class ResNet(nn.Module):
    """The network of He et al., "Deep Residual Learning for Image Recognition", 2015.

    It has 50 layers by default.
    """

    norm: Callable[[], nn.Module]
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False, dtype=DTYPE)(x)
        x = nn.max_pool(nn.relu(self.norm()(x)), (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = Bottleneck(self.norm, self.width * 2**i, stride)(x)
        return nn.Dense(self.classes, dtype=jnp.float32)(x.mean((1, 2)))


class Transformer(nn.Module):
    """A decoder of pre-norm blocks (Xiong et al. 2020) over embedded tokens."""

    norm: Callable[[], nn.Module]
    layers: int = 4
    width: int = 512
    heads: int = 8
    classes: int = 8192

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.classes, self.width, dtype=DTYPE)
        x = embed(tokens)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            y = self.norm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=DTYPE)(y, mask=mask)
            y = nn.gelu(nn.Dense(4 * self.width, dtype=DTYPE)(self.norm()(x)))
            x = x + nn.Dense(self.width, dtype=DTYPE)(y)
        return embed.attend(self.norm()(x)).astype(jnp.float32)


class MLPBlocks(nn.Module):
    """The half of a pre-norm transformer without attention: norm, dense, gelu, dense, add."""

    norm: Callable[[], nn.Module]
    blocks: int = 4
    dtype: Any = DTYPE

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        for _ in range(self.blocks):
            y = nn.gelu(nn.Dense(4 * features, dtype=self.dtype)(self.norm()(x)))
            x = x + nn.Dense(features, dtype=self.dtype)(y)
        return x


class Bottlenecks(nn.Module):
    """Bottlenecks in a row that keep their input's shape."""

    norm: Callable[[], nn.Module]
    blocks: int = 4
    dtype: Any = DTYPE
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x):
        for _ in range(self.blocks):
            x = Bottleneck(self.norm, x.shape[-1] // 4, 1, self.dtype, self.activation)(x)
        return x


class TransformerBlocks(nn.Module):
    """Pre-norm blocks (Xiong et al. 2020): attention, then two dense layers."""

    norm: Callable[[], nn.Module]
    blocks: int = 2
    heads: int = 8
    dtype: Any = DTYPE

    @nn.compact
    def __call__(self, x):
        for _ in range(self.blocks):
            attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)
            x = x + attention(self.norm()(x))
            x = MLPBlocks(self.norm, 1, self.dtype)(x)
        return x


class UNet(nn.Module):
    """A U-Net with norm, swish and convolution in residual blocks.

    Ronneberger et al. 2015; residual blocks of Ho et al. 2020. It halves the image once a stage.
    """

    norm: Callable[[], nn.Module]
    width: int = 64
    stages: int = 2
    dtype: Any = DTYPE

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype)
        channels, y, skips = x.shape[-1], conv(self.width)(x), []
        for i in range(self.stages):
            y = self._residual(y, self.width * 2**i)
            skips.append(y)
            y = conv(self.width * 2 ** (i + 1), strides=(2, 2))(y)
        y = self._residual(y, y.shape[-1])
        for i, skip in reversed(list(enumerate(skips))):
            y = nn.ConvTranspose(self.width * 2**i, (2, 2), (2, 2), dtype=self.dtype)(y)
            y = self._residual(jnp.concatenate([y, skip], -1), self.width * 2**i)
        return conv(channels)(nn.swish(self.norm()(y)))

    def _residual(self, x, features: int):
        conv = partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype)
        y = conv(features)(nn.swish(self.norm()(x)))
        y = conv(features)(nn.swish(self.norm()(y)))
        x = x if x.shape == y.shape else nn.Conv(features, (1, 1), dtype=self.dtype)(x)
        return x + y


class NoNorm(nn.Module):
    """A layer in the place of a normalization that does nothing."""

    @nn.compact
    def __call__(self, x):
        return x


def mean_squared_error(y: jax.Array, target: jax.Array) -> jax.Array:
    """The mean squared error, computed in float32."""
    return jnp.mean(jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32)))


def normed(make: Callable[[Any], nn.Module], x: jax.ShapeDtypeStruct) -> list[int]:
    """Bytes of the input of every norm layer in the network that `make` builds around a norm."""
    seen = []

    class Spy(nn.Module):
        """A layer in the place of a norm that records its input."""

        @nn.compact
        def __call__(self, x):
            seen.append(math.prod(x.shape) * x.dtype.itemsize)
            return x

    jax.eval_shape(make(Spy).init, jax.random.key(0), x)
    return seen


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy over all predictions."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -picked.mean()
