"""Random graphs of convolutions, norms, sums and concatenations: each fold is exact or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tools.networks import filled

import jaxnorm.linen as jnn
from jaxnorm import tools


class Drawn(nn.Module):
    """A graph that a seed draws: every step reads values that were made before."""

    seed: int

    @nn.compact
    def __call__(self, x):
        random = np.random.default_rng(self.seed)
        values = [x]
        convs = [nn.Conv(4, (3, 3), use_bias=bool(random.integers(2)), name=f"shared_{self.seed}")]
        for _ in range(9):
            # The last value most often, so that there are chains.
            here = values[-1] if random.random() < 0.7 else values[random.integers(len(values))]
            values.append(self.step(random, here, values, convs[0]))
        return jnp.concatenate([values[-1], values[-2]], -1).mean((1, 2)), values[-3]

    def step(self, random, x, values, shared):
        kind = random.choice(
            ["conv", "conv", "norm", "norm", "norm", "transposed", "relu", "add", "concat",
             "shared", "grouped", "scaled", "flat"]
        )  # fmt: skip
        # What is drawn must not depend on the size of the image.
        padding = random.choice(["SAME", "VALID" if len(values) < 5 else "SAME", "CIRCULAR"])
        if kind == "conv":
            size = tuple(int(n) for n in random.integers(1, 4, 2))
            return nn.Conv(int(random.integers(2, 6)), size, padding=str(padding))(x)
        if kind == "grouped":
            return nn.Conv(x.shape[-1] * 2, (3, 3), feature_group_count=x.shape[-1])(x)
        if kind == "transposed":
            strides = (2, 2) if x.shape[1] < 12 else (1, 1)
            return nn.ConvTranspose(3, (3, 2), strides, transpose_kernel=bool(random.integers(2)))(
                x
            )
        if kind == "norm":
            norm = nn.BatchNorm if random.integers(2) else jnn.BatchNorm
            used = {k: bool(random.integers(4)) for k in ("use_scale", "use_bias")}
            return norm(use_running_average=True, **used)(x)
        if kind == "relu":
            return nn.relu(x)
        if kind == "scaled":
            init = nn.initializers.normal(1.0)
            return x * self.param(f"gamma_{len(values)}", init, (x.shape[-1],))
        if kind == "shared":
            return shared(x[..., :1])
        if kind == "flat":
            return nn.Dense(x.shape[-1])(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)
        others = [v for v in values if v.shape[:3] == x.shape[:3]]
        other = others[random.integers(len(others))]
        if kind == "add" and other.shape == x.shape:
            return x + other
        return jnp.concatenate([x, other], -1) if x.shape[-1] < 12 else x[..., ::2]


@pytest.mark.parametrize("seed", range(12))
def test_folded_or_kept(seed):
    model, x = Drawn(seed), jax.random.normal(jax.random.key(seed), (2, 13, 12, 3))
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x), seed)
    try:
        folded = tools.fold(model, variables, x)
    except ValueError as error:
        assert "must have a norm" in str(error)
        return
    other = jax.random.normal(jax.random.key(seed + 100), (1, 15, 14, 3))
    wanted = jax.jit(model.apply)(variables, other)
    got = jax.jit(folded.model.apply)(folded.variables, other)
    for a, b in zip(got, wanted, strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * folded.report.allowed * scale)
