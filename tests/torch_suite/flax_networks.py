"""Networks of torchvision and timm, and blocks of language models, defined in Flax and PyTorch."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch
from flax import nnx

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnx


def norm(train, epsilon=1e-5, momentum=0.9):
    return jnn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, unbiased=True
    )


class Bottleneck(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(norm(train)(nn.Conv(self.features, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.features, (3, 3), self.stride, padding=1, use_bias=False)(y)
        y = nn.relu(norm(train)(y))
        y = norm(train)(nn.Conv(4 * self.features, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            conv = nn.Conv(4 * self.features, (1, 1), self.stride, padding=0, use_bias=False)
            x = norm(train)(conv(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    blocks: tuple = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(norm(train)(nn.Conv(64, (7, 7), 2, padding=3, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, count in enumerate(self.blocks):
            for j in range(count):
                x = Bottleneck(64 * 2**i, 2 if i and not j else 1)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class BasicBlock(nnx.Module):
    def __init__(self, before, after, stride, rngs):
        self.conv1 = nnx.Conv(before, after, (3, 3), stride, padding=1, use_bias=False, rngs=rngs)
        self.bn1 = jnx.BatchNorm(after, momentum=0.9, unbiased=True, rngs=rngs)
        self.conv2 = nnx.Conv(after, after, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn2 = jnx.BatchNorm(after, momentum=0.9, unbiased=True, rngs=rngs)
        self.shortcut = nnx.List([])
        if before != after:
            self.shortcut = nnx.List(
                [
                    nnx.Conv(before, after, (1, 1), stride, padding=0, use_bias=False, rngs=rngs),
                    jnx.BatchNorm(after, momentum=0.9, unbiased=True, rngs=rngs),
                ]
            )

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        for layer in self.shortcut:
            x = layer(x)
        return nnx.relu(x + y)


class ResNet18(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 64, (7, 7), 2, padding=3, use_bias=False, rngs=rngs)
        self.norm = jnx.BatchNorm(64, momentum=0.9, unbiased=True, rngs=rngs)
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nnx.List(
            [BasicBlock(a, b, 1 if a == b else 2, rngs) for a, b in itertools.pairwise(widths)]
        )
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    depths: tuple
    widths: tuple

    @nn.compact
    def __call__(self, x, train=False):
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            if i:
                x = nn.Conv(width, (2, 2), 2, padding=0)(nn.LayerNorm(epsilon=1e-6)(x))
            else:
                x = nn.LayerNorm(epsilon=1e-6)(nn.Conv(width, (4, 4), 4, padding=0)(x))
            for j in range(depth):
                y = nn.Conv(width, (7, 7), padding=3, feature_group_count=width)(x)
                y = nn.Dense(4 * width)(nn.LayerNorm(epsilon=1e-6)(y))
                y = nn.Dense(width)(nn.gelu(y, approximate=False))
                x = x + y * self.param(f"gamma_{i}_{j}", nn.initializers.ones, (width,))
        return nn.Dense(5)(nn.LayerNorm(epsilon=1e-6)(x.mean((1, 2))))


class InvertedBottleneck(nn.Module):
    features: int
    expand: int
    window: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        width, y = x.shape[-1] * self.expand, x
        if self.expand > 1:
            y = nn.Conv(width, (1, 1), use_bias=False)(y)
            y = nn.silu(norm(train, 1e-3, 0.99)(y))
        window, pad = (self.window, self.window), (self.window - 1) // 2
        y = nn.Conv(
            width, window, self.stride, padding=pad, feature_group_count=width, use_bias=False
        )(y)
        y = nn.silu(norm(train, 1e-3, 0.99)(y))
        z = nn.silu(nn.Conv(max(1, x.shape[-1] // 4), (1, 1))(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Conv(width, (1, 1))(z))
        y = norm(train, 1e-3, 0.99)(nn.Conv(self.features, (1, 1), use_bias=False)(y))
        return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
    blocks: tuple

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.blocks[0][0], (3, 3), 2, padding=1, use_bias=False)(x)
        x = nn.silu(norm(train, 1e-3, 0.99)(x))
        for _, *block in self.blocks:
            x = InvertedBottleneck(*block)(x, train)
        x = nn.Conv(4 * x.shape[-1], (1, 1), use_bias=False)(x)
        x = nn.silu(norm(train, 1e-3, 0.99)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class ViT(nn.Module):
    width: int = 24

    @nn.compact
    def __call__(self, x, train=False):
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        place = self.param("place", nn.initializers.normal(), (1, 17, self.width))
        x = nn.Conv(self.width, (8, 8), 8, padding=0)(x).reshape(x.shape[0], -1, self.width)
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1) + place
        for _ in range(2):
            y = nn.LayerNorm(epsilon=1e-6)(x)
            x = x + nn.MultiHeadDotProductAttention(3, deterministic=True)(y)
            y = nn.Dense(4 * self.width)(nn.LayerNorm(epsilon=1e-6)(x))
            x = x + nn.Dense(self.width)(nn.gelu(y, approximate=False))
        return nn.Dense(5)(nn.LayerNorm(epsilon=1e-6)(x)[:, 0])


class Conv1D(torch.nn.Module):  # as GPT-2's, (in, out)
    def __init__(self, after, before):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(before, after) / before**0.5)
        self.bias = torch.nn.Parameter(torch.randn(after))

    def forward(self, x):
        return x @ self.weight + self.bias


class TorchGPT2Attention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (
            part.reshape(b, n, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(d, -1)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, n, d))


class TorchGPT2(torch.nn.Module):
    def __init__(self, words=31, length=7, width=12, heads=3):
        super().__init__()
        self.wte = torch.nn.Embedding(words, width)
        self.wpe = torch.nn.Embedding(length, width)
        self.h = torch.nn.ModuleList()
        for _ in range(2):
            block = torch.nn.Module()
            block.ln_1 = torch.nn.LayerNorm(width)
            block.attn = TorchGPT2Attention(width, heads)
            block.ln_2 = torch.nn.LayerNorm(width)
            block.mlp = torch.nn.Module()
            block.mlp.c_fc = Conv1D(4 * width, width)
            block.mlp.c_proj = Conv1D(width, 4 * width)
            self.h.append(block)
        self.ln_f = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, words):
        x = self.wte(words) + self.wpe(torch.arange(words.shape[1]))
        for block in self.h:
            x = x + block.attn(block.ln_1(x))
            y = torch.nn.functional.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
            x = x + block.mlp.c_proj(y)
        return self.lm_head(self.ln_f(x))


class GPT2(nnx.Module):
    def __init__(self, rngs, words=31, length=7, width=12, heads=3):
        self.wte = nnx.Embed(words, width, rngs=rngs)
        self.wpe = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.Dict(
                    ln_1=nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs),
                    attention=nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs),
                    ln_2=nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs),
                    fc=nnx.Linear(width, 4 * width, rngs=rngs),
                    proj=nnx.Linear(4 * width, width, rngs=rngs),
                )
                for _ in range(2)
            ]
        )
        self.ln_f = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, words):
        x = self.wte(words) + self.wpe(jnp.arange(words.shape[1]))
        for block in self.blocks:
            x = x + block.attention(block.ln_1(x), mask=nn.make_causal_mask(words))
            x = x + block.proj(nnx.gelu(block.fc(block.ln_2(x))))
        return self.wte.attend(self.ln_f(x))


class TorchLlamaBlock(torch.nn.Module):  # without rotations, which hold no weights
    def __init__(self, width=12, hidden=20, heads=3):
        super().__init__()
        self.heads = heads
        self.self_attn = torch.nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.self_attn, name, torch.nn.Linear(width, width, bias=False))
        self.mlp = torch.nn.Module()
        self.mlp.gate_proj = torch.nn.Linear(width, hidden, bias=False)
        self.mlp.up_proj = torch.nn.Linear(width, hidden, bias=False)
        self.mlp.down_proj = torch.nn.Linear(hidden, width, bias=False)
        self.input_layernorm = torch.nn.RMSNorm(width, eps=1e-6)
        self.post_attention_layernorm = torch.nn.RMSNorm(width, eps=1e-6)

    def forward(self, x):
        y, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (
            p(y).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + attn.o_proj(y.transpose(1, 2).reshape(x.shape))
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class LlamaBlock(nn.Module):
    hidden: int = 20

    @nn.compact
    def __call__(self, x, train=False):
        y = jnn.RMSNorm(epsilon=1e-6)(x)
        x = x + nn.MultiHeadDotProductAttention(3, use_bias=False, deterministic=True)(y)
        y = jnn.RMSNorm(epsilon=1e-6, scale_offset=1.0)(x)
        y = nn.silu(nn.Dense(self.hidden, use_bias=False)(y)) * nn.Dense(
            self.hidden, use_bias=False
        )(y)
        return x + nn.Dense(x.shape[-1], use_bias=False)(y)


def randomized(module, seed=0):
    """A PyTorch module whose norms have random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith(("_u", "_v")):
                continue
            if value.ndim == 1 or name.endswith((".gamma", "token", "embed")):
                center = 1.0 if name.endswith(("weight", "running_var", "gamma")) else 0.0
                value.copy_(center + 0.2 * torch.rand(value.shape, generator=generator))
    return module


def draw(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)
