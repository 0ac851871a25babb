"""NNX Linear and Conv whose kernel can be standardized before it is used."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import (
    ConvGeneralDilatedT,
    DotGeneralT,
    Dtype,
    Initializer,
    PaddingLike,
    PrecisionLike,
    PromoteDtypeFn,
)
from jax import Array, lax

from jaxnorm.layers import KernelFields, weights
from jaxnorm.nnx.replace import with_arrays
from jaxnorm.nnx.signature import NONE, Metadata, Signed


class _Standardized(Signed):
    """The common part of Linear and Conv: they compute with the standardized kernel."""

    kernel: nnx.Param
    param_dtype: Any
    weight_standardization: bool
    use_gain: bool
    gain_init: Any

    def _create_gain(self, rngs: nnx.Rngs) -> None:
        """Check the new fields, and create the gain where there is one."""
        weights.check_kernel_fields(self)
        if self.use_gain:
            shape = self.kernel.shape[-1:]
            self.gain = nnx.Param(self.gain_init(rngs.params(), shape, self.param_dtype))

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        """As Flax's, with the standardized kernel where asked for."""
        layer = self
        if self.weight_standardization:
            gain = self.gain[...] if self.use_gain else None
            kernel = weights.standardized(self, self.kernel[...], gain)
            layer = with_arrays(self, {("kernel",): kernel})
        return super(_Standardized, layer).__call__(inputs, out_sharding)  # type: ignore[misc]


class Linear(_Standardized, nnx.Linear, KernelFields):
    """`flax.nnx.Linear`, with weight standardization where asked for.

    Args:
        weight_standardization, use_gain, gain_init, weight_epsilon: see
            `jaxnorm.layers.KernelFields`.

    Raises:
        ValueError: a gain without standardization.

    Source: Qiao et al. 2019; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.Linear(8, 2, rngs=nnx.Rngs(0), weight_standardization=True)
        >>> abs(layer(jnp.ones((1, 8)))).max().item() < 1e-5  # each output's weights sum to zero
        True
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True,
        dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None, kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init, dot_general: DotGeneralT = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None, rngs: nnx.Rngs,
        kernel_metadata: Metadata = NONE, bias_metadata: Metadata = NONE,
        weight_standardization: bool = False, use_gain: bool = False,
        gain_init: Initializer = initializers.ones, weight_epsilon: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, use_bias=use_bias, dtype=dtype,
            param_dtype=param_dtype, precision=precision, kernel_init=kernel_init,
            bias_init=bias_init, dot_general=dot_general, promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type, rngs=rngs,
            kernel_metadata=kernel_metadata, bias_metadata=bias_metadata,
        )  # fmt: skip
        KernelFields.__init__(
            self, weight_standardization=weight_standardization, use_gain=use_gain,
            gain_init=gain_init, weight_epsilon=weight_epsilon,
        )  # fmt: skip
        self._create_gain(rngs)


class Conv(_Standardized, nnx.Conv, KernelFields):
    """`flax.nnx.Conv`, with weight standardization where asked for.

    Args:
        weight_standardization, use_gain, gain_init, weight_epsilon: see
            `jaxnorm.layers.KernelFields`.

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

    def __init__(
        self, in_features: int, out_features: int, kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1, *, padding: PaddingLike = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1, feature_group_count: int = 1,
        use_bias: bool = True, mask: Array | None = None, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init, bias_init: Initializer = default_bias_init,
        conv_general_dilated: ConvGeneralDilatedT = lax.conv_general_dilated,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None, rngs: nnx.Rngs,
        kernel_metadata: Metadata = NONE, bias_metadata: Metadata = NONE,
        weight_standardization: bool = False, use_gain: bool = False,
        gain_init: Initializer = initializers.ones, weight_epsilon: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, kernel_size, strides, padding=padding,
            input_dilation=input_dilation, kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count, use_bias=use_bias, mask=mask, dtype=dtype,
            param_dtype=param_dtype, precision=precision, kernel_init=kernel_init,
            bias_init=bias_init, conv_general_dilated=conv_general_dilated,
            promote_dtype=promote_dtype, preferred_element_type=preferred_element_type, rngs=rngs,
            kernel_metadata=kernel_metadata, bias_metadata=bias_metadata,
        )  # fmt: skip
        KernelFields.__init__(
            self, weight_standardization=weight_standardization, use_gain=use_gain,
            gain_init=gain_init, weight_epsilon=weight_epsilon,
        )  # fmt: skip
        self._create_gain(rngs)
