"""Whole networks around a normalization: a ResNet and a pre-norm transformer, in Linen.

Activations are bfloat16 and parameters float32. `norm` makes a layer from its features' dtype, so
that one network stands with any library's layer, or with none.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

DTYPE = jnp.bfloat16


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each normalized, beside a shortcut (He et al. 2015)."""

    norm: Callable[[], nn.Module]
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False, dtype=DTYPE)
        strides = (self.stride, self.stride)
        y = nn.relu(self.norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.width, (3, 3), strides)(y)))
        y = self.norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.width, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", 2015; 50 layers by default."""

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


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all predictions."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -picked.mean()
