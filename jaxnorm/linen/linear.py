"""Linen Dense and Conv whose kernel can be standardized before it is used."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from jaxnorm import functional
from jaxnorm.core.arguments import kernel_options


class _Standardized:
    """The common part of Dense and Conv: they are handed the standardized kernel."""

    weight_standardization: bool
    param_dtype: Any
    use_gain: bool
    gain_init: Any
    weight_epsilon: float

    def param(self, name: str, *args, **kwargs):
        """The parameter `name`; of `kernel`, the standardized form."""
        value = super().param(name, *args, **kwargs)  # type: ignore[misc]
        if name != "kernel":
            return value
        kernel_options(
            type(self).__name__,
            self.weight_standardization,
            self.use_gain,
            getattr(self, "mask", None),
        )
        if not self.weight_standardization:
            return value
        gain = None
        if self.use_gain:
            gain = super().param(  # type: ignore[misc]
                "gain", self.gain_init, value.shape[-1:], self.param_dtype
            )
        return functional.standardize_weight(value, gain, epsilon=self.weight_epsilon)


class Dense(_Standardized, nn.Dense):
    """`flax.linen.Dense`, with weight standardization where asked for.

    Attributes:
        weight_standardization: standardize each output's weights before use, see
            `jaxnorm.standardize_weight`. Off, the layer is Flax's.
        use_gain: multiply them by a learned `gain`, one for each output (a new parameter).
        gain_init: initializer of the gain. For activations of unit variance without another
            normalization: the constant ``1 / sqrt(fan_in)``.
        weight_epsilon: epsilon of the standardization.

    Raises:
        ValueError: a gain without standardization; standardization of a masked kernel (Conv).

    Source: Qiao et al. 2019; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.Dense(2, weight_standardization=True)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8)))
        >>> abs(y).max().item() < 1e-5  # each output's weights sum to zero
        True
    """

    weight_standardization: bool = dataclasses.field(default=False, kw_only=True)
    use_gain: bool = dataclasses.field(default=False, kw_only=True)
    gain_init: Any = dataclasses.field(default=jax.nn.initializers.ones, kw_only=True)
    weight_epsilon: float = dataclasses.field(default=1e-5, kw_only=True)


class Conv(_Standardized, nn.Conv):
    """`flax.linen.Conv`, with weight standardization where asked for.

    Attributes:
        weight_standardization: standardize each output channel's weights, as in `Dense`.
        use_gain: multiply them by a learned `gain`, one for each output channel.
        gain_init: initializer of the gain, as in `Dense`.
        weight_epsilon: epsilon of the standardization.

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

    weight_standardization: bool = dataclasses.field(default=False, kw_only=True)
    use_gain: bool = dataclasses.field(default=False, kw_only=True)
    gain_init: Any = dataclasses.field(default=jax.nn.initializers.ones, kw_only=True)
    weight_epsilon: float = dataclasses.field(default=1e-5, kw_only=True)
