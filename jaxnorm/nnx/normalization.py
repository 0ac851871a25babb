"""NNX's normalizations of activations: variables around `jaxnorm.layers.norms`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn import dtypes
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn

from jaxnorm.core.arguments import Save
from jaxnorm.core.moments import promoted
from jaxnorm.core.running import BatchStats, init_batch_stats
from jaxnorm.layers import AffineNormFields, BatchNormFields, SavingNormFields, norms
from jaxnorm.nnx.signature import NONE, Metadata, Signed


class BatchNorm(Signed, nnx.BatchNorm, BatchNormFields):
    """`flax.nnx.BatchNorm` around `jaxnorm.batch_norm`, same constructor and variables.

    Constructor, variables and behaviour are Flax's, with these differences: statistics are taken
    of shifted data; running statistics keep their dtype, are never rounded to that of `x`, and
    carry no gradient. `use_fast_variance=False` asks for the numbers of Flax's two-pass formula,
    see `implementation="two_pass"` of `jaxnorm.batch_norm`; the default is faster and more exact.
    For complex data give a complex `param_dtype`: then `mean` is complex too.

    Args:
        momentum: share of the old statistics that is kept; None: cumulative average.
        unbiased, debias, virtual_batch_size: see `jaxnorm.layers.BatchNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        ValueError: as `jaxnorm.batch_norm`; also if `use_running_average` is None both here and
            in the call.

    Source: Ioffe & Szegedy 2015; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0], [3.0]])).round(3).tolist(), layer.mean[...].round(3).tolist()
        ([[-1.0], [1.0]], [0.20000000298023224])
    """

    def __init__(
        self, num_features: int, *, use_running_average: bool | None = False, axis: int = -1,
        momentum: float | None = 0.99, epsilon: float = 1e-5, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer = initializers.ones,
        axis_name: str | None = None, axis_index_groups: Any = None,
        use_fast_variance: bool = True, promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs, bias_metadata: Metadata = NONE, scale_metadata: Metadata = NONE,
        activation: Callable | None = None, implementation: str | None = None,
        unbiased: bool = False, debias: bool = False, virtual_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, use_running_average=use_running_average, axis=axis,
            momentum=momentum,  # type: ignore[arg-type]
            epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, use_bias=use_bias,
            use_scale=use_scale, bias_init=bias_init, scale_init=scale_init, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype, rngs=rngs, bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        BatchNormFields.__init__(
            self, activation=activation, implementation=implementation, unbiased=unbiased,
            debias=debias, virtual_batch_size=virtual_batch_size,
        )  # fmt: skip
        if jnp.issubdtype(param_dtype, jnp.complexfloating):
            # Of complex data the mean is complex, from the start.
            self.mean = nnx.BatchStat(self.mean[...].astype(jnp.complex64))
        if momentum is None or debias:
            self.count = nnx.BatchStat(init_batch_stats(()).count)

    def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
        """Normalize `x` and, in training, update the running statistics.

        Args:
            x: floating or complex array with `num_features` at `axis`.
            use_running_average: overrides the constructor's and `train()`, `eval()`.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        use_running_average = norms.uses_running_average(
            self.use_running_average if use_running_average is None else use_running_average
        )
        mean, var = self.mean[...], self.var[...]
        x, *rest, scale, bias = _promoted(self, x, mean, var, *_parameters(self))
        dtype = self.dtype
        if dtype is None and self.promote_dtype is dtypes.promote_dtype:
            # By Flax's rule the statistics' dtypes count.
            dtype = promoted(x, *rest, *(a for a in (scale, bias) if a is not None))
        counted = hasattr(self, "count")
        count = self.count[...] if counted else init_batch_stats(()).count
        y, new = norms.batch_norm(
            self, x, scale, bias, BatchStats(mean, var, count), mask=mask, dtype=dtype,
            training=not use_running_average,
        )  # fmt: skip
        if not use_running_average:
            self.mean[...], self.var[...] = new.mean, new.var
            if counted:
                self.count[...] = new.count
        return y


class LayerNorm(Signed, nnx.LayerNorm, SavingNormFields):
    """`flax.nnx.LayerNorm` around `jaxnorm.layer_norm`, same constructor and variables.

    Args:
        scale_offset, save: see `jaxnorm.layers.SavingNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.layer_norm`; also if `scale` or `bias` is given to a
            layer that has its own.

    Source: Ba, Kiros & Hinton 2016; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> print(jnn.LayerNorm(3, rngs=nnx.Rngs(0))(jnp.array([1.0, 2.0, 3.0])).round(3))
        [-1.225  0.     1.225]
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1, feature_axes: Axes = -1,
        axis_name: str | None = None, axis_index_groups: Any = None,
        use_fast_variance: bool = True, promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs, bias_metadata: Metadata = NONE, scale_metadata: Metadata = NONE,
        activation: Callable | None = None, implementation: str | None = None,
        scale_offset: float = 0.0, save: Save = "input",
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            use_bias=use_bias, use_scale=use_scale, bias_init=bias_init, scale_init=scale_init,
            reduction_axes=reduction_axes, feature_axes=feature_axes, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype, rngs=rngs, bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        SavingNormFields.__init__(
            self, activation=activation, implementation=implementation, scale_offset=scale_offset,
            save=save,
        )  # fmt: skip

    def __call__(self, x, *, mask=None, residual=None, scale=None, bias=None) -> Any:
        """Normalize `x`, with the arguments of `jaxnorm.layers.norms.layer_norm`."""
        x, scale, bias = _promoted(self, x, *_parameters(self, scale, bias))
        return norms.layer_norm(self, x, scale, bias, mask=mask, residual=residual)


class RMSNorm(Signed, nnx.RMSNorm, SavingNormFields):
    """`flax.nnx.RMSNorm` around `jaxnorm.rms_norm`, same constructor and variables.

    Args:
        scale_offset, save: see `jaxnorm.layers.SavingNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.rms_norm`; also if `scale` is given to a layer that has
            its own.

    Source: Zhang & Sennrich 2019; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> y = jnn.RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([3.0, 4.0]))
        >>> [round(v, 3) for v in y.tolist()]
        [0.849, 1.131]
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_scale: bool = True,
        scale_init: Initializer = initializers.ones,
        reduction_axes: Axes = -1, feature_axes: Axes = -1,
        axis_name: str | None = None, axis_index_groups: Any = None,
        use_fast_variance: bool = True, promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs, scale_metadata: Metadata = NONE,
        activation: Callable | None = None, implementation: str | None = None,
        scale_offset: float = 0.0, save: Save = "input",
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            use_scale=use_scale, scale_init=scale_init, reduction_axes=reduction_axes,
            feature_axes=feature_axes, axis_name=axis_name, axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance, promote_dtype=promote_dtype, rngs=rngs,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        SavingNormFields.__init__(
            self, activation=activation, implementation=implementation, scale_offset=scale_offset,
            save=save,
        )  # fmt: skip

    def __call__(self, x, mask=None, *, residual=None, scale=None) -> Any:
        """Normalize `x`, with the arguments of `jaxnorm.layers.norms.rms_norm`."""
        x, scale = _promoted(self, x, _parameter(self, "scale", scale))
        return norms.rms_norm(self, x, scale, mask=mask, residual=residual)


class GroupNorm(Signed, nnx.GroupNorm, AffineNormFields):
    """`flax.nnx.GroupNorm` around `jaxnorm.group_norm`, same constructor and variables.

    Args:
        scale_offset: see `jaxnorm.layers.AffineNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.group_norm`; also unless exactly one of `num_groups`
            and `group_size` is given, or if `scale` or `bias` is given to a layer that has its
            own.

    Source: Wu & He 2018; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self, num_features: int, num_groups: int | None = 32, group_size: int | None = None, *,
        epsilon: float = 1e-6, dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32,
        use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer = initializers.ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None, axis_index_groups: Any = None,
        use_fast_variance: bool = True, promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs, bias_metadata: Metadata = NONE, scale_metadata: Metadata = NONE,
        activation: Callable | None = None, implementation: str | None = None,
        scale_offset: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, num_groups, group_size, epsilon=epsilon, dtype=dtype,
            param_dtype=param_dtype, use_bias=use_bias, use_scale=use_scale, bias_init=bias_init,
            scale_init=scale_init, reduction_axes=reduction_axes, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype, rngs=rngs, bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        AffineNormFields.__init__(
            self, activation=activation, implementation=implementation, scale_offset=scale_offset
        )

    def __call__(self, x, *, mask=None, scale=None, bias=None):
        """Normalize each group of `x`, with the arguments of `jaxnorm.layers.norms.group_norm`."""
        x, scale, bias = _promoted(self, x, *_parameters(self, scale, bias))
        return norms.group_norm(self, x, scale, bias, num_groups=self.num_groups, mask=mask)


class InstanceNorm(Signed, nnx.InstanceNorm, AffineNormFields):
    """`flax.nnx.InstanceNorm` around `jaxnorm.instance_norm`, same constructor and variables.

    Args:
        scale_offset: see `jaxnorm.layers.AffineNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.instance_norm`; also if `scale` or `bias` is given to
            a layer that has its own.

    Source: Ulyanov, Vedaldi & Lempitsky 2016; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> x = jnp.array([[[1.0, 5.0], [3.0, 9.0]]])
        >>> jnn.InstanceNorm(2, rngs=nnx.Rngs(0))(x).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    def __init__(
        self, num_features: int, *, epsilon: float = 1e-6, dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32, use_bias: bool = True, use_scale: bool = True,
        bias_init: Initializer = initializers.zeros, scale_init: Initializer = initializers.ones,
        feature_axes: Axes = -1, axis_name: str | None = None, axis_index_groups: Any = None,
        use_fast_variance: bool = True, promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs, bias_metadata: Metadata = NONE, scale_metadata: Metadata = NONE,
        activation: Callable | None = None, implementation: str | None = None,
        scale_offset: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            use_bias=use_bias, use_scale=use_scale, bias_init=bias_init, scale_init=scale_init,
            feature_axes=feature_axes, axis_name=axis_name, axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance, promote_dtype=promote_dtype, rngs=rngs,
            bias_metadata=bias_metadata, scale_metadata=scale_metadata,
        )  # fmt: skip
        AffineNormFields.__init__(
            self, activation=activation, implementation=implementation, scale_offset=scale_offset
        )

    def __call__(self, x, *, mask=None, scale=None, bias=None):
        """Normalize each feature of `x`, with the arguments of `layers.norms.instance_norm`."""
        x, scale, bias = _promoted(self, x, *_parameters(self, scale, bias))
        return norms.instance_norm(self, x, scale, bias, mask=mask)


def _parameters(module, scale=None, bias=None):
    """Scale and bias, each the module's own or that given in the call."""
    return _parameter(module, "scale", scale), _parameter(module, "bias", bias)


def _parameter(module, name: str, given=None):
    """The parameter `name`, where the module has it, or what the call gives."""
    own = getattr(module, name)
    return norms.own_or_given(module, name, None if own is None else own[...], given)


def _promoted(module, x, *others):
    """`x` and the other arrays, by the module's `promote_dtype`.

    Flax's default casts all of them to the result's dtype. Here only the result is: rounding `x`
    before its statistics are taken would cost digits, and widening it bytes kept for the backward
    pass. A `promote_dtype` of the user's own is called as Flax calls it, with the same arrays.
    """
    x = norms.checked_input(module, x)
    if module.promote_dtype is dtypes.promote_dtype:
        return x, *others
    return module.promote_dtype((x, *others), dtype=module.dtype)
