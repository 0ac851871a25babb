"""NNX Linear and Conv whose kernel can be standardized before it is used."""

from typing import Any

import jax
from flax import nnx

from jaxnorm import functional
from jaxnorm.core.arguments import kernel_options
from jaxnorm.nnx.constructor import extends


class _Standardized:
    """The common part of Linear and Conv: they run on a copy with the standardized kernel."""

    kernel: nnx.Param
    param_dtype: Any

    def _standardize(self, weight_standardization, use_gain, gain_init, weight_epsilon, kwargs):
        self.weight_standardization = weight_standardization
        self.use_gain = use_gain
        self.weight_epsilon = weight_epsilon
        kernel_options(
            type(self).__name__, weight_standardization, use_gain, getattr(self, "mask", None)
        )
        if use_gain:
            key = kwargs["rngs"].params()
            self.gain = nnx.Param(gain_init(key, self.kernel.shape[-1:], self.param_dtype))

    def __call__(self, inputs, *args, **kwargs):
        """As Flax's, with the standardized kernel where asked for."""
        layer = self
        if self.weight_standardization:
            gain = self.gain[...] if self.use_gain else None
            kernel = functional.standardize_weight(
                self.kernel[...], gain, epsilon=self.weight_epsilon
            )
            # A copy made here and now, so that it may be changed inside of any transformation.
            layer = nnx.merge(*nnx.split(self))
            layer.kernel = nnx.Param(kernel)
        return super(_Standardized, layer).__call__(inputs, *args, **kwargs)  # type: ignore[misc]


class Linear(_Standardized, nnx.Linear):
    """`flax.nnx.Linear`, with weight standardization where asked for.

    Args:
        weight_standardization: standardize each output's weights before use, see
            `jaxnorm.standardize_weight`. Off, the layer is Flax's.
        use_gain: multiply them by a learned `gain`, one for each output (a new parameter).
        gain_init: initializer of the gain. For activations of unit variance without another
            normalization: the constant ``1 / sqrt(fan_in)``.
        weight_epsilon: epsilon of the standardization.

    Raises:
        ValueError: a gain without standardization; standardization of a masked kernel (Conv).

    Source: Qiao et al. 2019; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.Linear(8, 2, rngs=nnx.Rngs(0), weight_standardization=True)
        >>> abs(layer(jnp.ones((1, 8)))).max().item() < 1e-5  # each output's weights sum to zero
        True
    """

    @extends(nnx.Linear)
    def __init__(
        self,
        *args,
        weight_standardization: bool = False,
        use_gain: bool = False,
        gain_init=jax.nn.initializers.ones,
        weight_epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._standardize(weight_standardization, use_gain, gain_init, weight_epsilon, kwargs)


class Conv(_Standardized, nnx.Conv):
    """`flax.nnx.Conv`, with weight standardization where asked for.

    Args:
        weight_standardization: standardize each output channel's weights, as in `Linear`.
        use_gain: multiply them by a learned `gain`, one for each output channel.
        gain_init: initializer of the gain, as in `Linear`.
        weight_epsilon: epsilon of the standardization.

    Raises:
        ValueError: a gain without standardization; standardization of a masked kernel.

    Source: Qiao et al. 2019; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), weight_standardization=True)
        >>> layer(jnp.ones((1, 8, 8, 3))).shape
        (1, 8, 8, 4)
    """

    @extends(nnx.Conv)
    def __init__(
        self,
        *args,
        weight_standardization: bool = False,
        use_gain: bool = False,
        gain_init=jax.nn.initializers.ones,
        weight_epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._standardize(weight_standardization, use_gain, gain_init, weight_epsilon, kwargs)
