"""Linen Dense and Conv whose kernel can be standardized before it is used."""

import flax.linen as nn

from jaxnorm.layers import KernelFields, weights


class _Standardized(KernelFields):
    """The common part of Dense and Conv: they are handed the standardized kernel."""

    def param(self, name: str, *args, **kwargs):
        """The parameter `name`; of `kernel`, the standardized form."""
        value = super().param(name, *args, **kwargs)  # type: ignore[misc]
        if name != "kernel":
            return value
        weights.check_kernel_fields(self)
        if not self.weight_standardization:
            return value
        gain = None
        if self.use_gain:
            shape = value.shape[-1:]
            gain = super().param("gain", self.gain_init, shape, self.param_dtype)  # type: ignore[misc]
        return weights.standardized(self, value, gain)


class Dense(_Standardized, nn.Dense):
    """`flax.linen.Dense`, with weight standardization where asked for.

    Attributes:
        weight_standardization, use_gain, gain_init, weight_epsilon: see
            `jaxnorm.layers.KernelFields`.

    Raises:
        ValueError: a gain without standardization.

    Source: Qiao et al. 2019; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.Dense(2, weight_standardization=True)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8)))
        >>> abs(y).max().item() < 1e-5  # each output's weights sum to zero
        True
    """


class Conv(_Standardized, nn.Conv):
    """`flax.linen.Conv`, with weight standardization where asked for.

    Attributes:
        weight_standardization, use_gain, gain_init, weight_epsilon: see
            `jaxnorm.layers.KernelFields`.

    Raises:
        ValueError: a gain without standardization; standardization of a masked kernel.

    Source: Qiao et al. 2019; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.Conv(4, (3, 3), weight_standardization=True, use_gain=True)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
        >>> {name: p.shape for name, p in variables["params"].items()}
        {'kernel': (3, 3, 3, 4), 'gain': (4,), 'bias': (4,)}
    """
