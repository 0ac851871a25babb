"""Linen's normalizations of activations: variables around `jaxnorm.layers.norms`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnorm.core.moments import promoted
from jaxnorm.core.running import BatchStats, init_batch_stats
from jaxnorm.layers import AffineNormFields, BatchNormFields, SavingNormFields, norms


class BatchNorm(BatchNormFields, nn.BatchNorm):
    """`flax.linen.BatchNorm` around `jaxnorm.batch_norm`, same fields and variables.

    Fields, variables and behaviour are Flax's, with these differences: statistics are taken of
    shifted data and accumulated in float32 at least, whatever `force_float32_reductions` says;
    running statistics keep their dtype (under x64 too) and carry no gradient.
    `use_fast_variance=False` asks for the numbers of Flax's two-pass formula, see
    `implementation="two_pass"` of `jaxnorm.batch_norm`; the default is faster and more exact.

    Attributes:
        momentum: share of the old statistics that is kept; None: cumulative average.
        unbiased, debias, virtual_batch_size: see `jaxnorm.layers.BatchNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        ValueError: as `jaxnorm.batch_norm`; also if `use_running_average` is given neither or
            both here and in the call.

    Source: Ioffe & Szegedy 2015; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.BatchNorm(use_running_average=False, momentum=0.9)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, new = layer.apply(variables, x, mutable=["batch_stats"])
        >>> y.round(3).tolist(), new["batch_stats"]["mean"].round(3).tolist()
        ([[-1.0], [1.0]], [0.20000000298023224])
    """

    momentum: float | None = 0.99  # pyright: ignore[reportIncompatibleVariableOverride]

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
        """Normalize `x` and, in training, update `batch_stats`.

        Args:
            x: floating or complex array with the feature axes of `axis`.
            use_running_average: as the field; one of the two must be given.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        use_running_average = norms.uses_running_average(
            nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        )
        x = norms.checked_input(self, x)
        shape = norms.feature_shape(self, "axis", self.axis, x)
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        if jnp.iscomplexobj(x):
            dtype = promoted(dtype, jnp.complex64)
        start = init_batch_stats(shape, dtype)
        mean = self.variable("batch_stats", "mean", lambda: start.mean)
        var = self.variable("batch_stats", "var", lambda: start.var)
        counted = self.momentum is None or self.debias
        count = self.variable("batch_stats", "count", lambda: start.count) if counted else None
        stats = BatchStats(
            mean.value.astype(dtype) if jnp.iscomplexobj(x) else mean.value,
            var.value,
            start.count if count is None else count.value,
        )
        initializing = self.is_initializing()
        y, new = norms.batch_norm(
            self, x, *_parameters(self, shape), stats, mask=mask, dtype=self.dtype,
            training=not use_running_average, initializing=initializing,
        )  # fmt: skip
        if not use_running_average and not initializing:
            mean.value, var.value = new.mean, new.var
            if count is not None:
                count.value = new.count
        return y


class LayerNorm(SavingNormFields, nn.LayerNorm):
    """`flax.linen.LayerNorm` around `jaxnorm.layer_norm`, same fields and variables.

    Attributes:
        scale_offset, save: see `jaxnorm.layers.SavingNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.layer_norm`; also if `scale` or `bias` is given to a
            layer that has its own.

    Source: Ba, Kiros & Hinton 2016; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> y, _ = jnn.LayerNorm().init_with_output(jax.random.key(0), jnp.array([1.0, 2.0, 3.0]))
        >>> print(y.round(3))
        [-1.225  0.     1.225]
    """

    @nn.compact
    def __call__(self, x, *, mask=None, residual=None, scale=None, bias=None) -> Any:
        """Normalize `x`, with the arguments of `jaxnorm.layers.norms.layer_norm`."""
        x = norms.checked_input(self, x)
        shape = norms.feature_shape(self, "feature_axes", self.feature_axes, x)
        return norms.layer_norm(
            self, x, *_parameters(self, shape, scale, bias), mask=mask, residual=residual,
            initializing=self.is_initializing(),
        )  # fmt: skip


class RMSNorm(SavingNormFields, nn.RMSNorm):
    """`flax.linen.RMSNorm` around `jaxnorm.rms_norm`, same fields and variables.

    Attributes:
        scale_offset, save: see `jaxnorm.layers.SavingNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.rms_norm`; also if `scale` is given to a layer that has
            its own.

    Source: Zhang & Sennrich 2019; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> y, _ = jnn.RMSNorm().init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
        >>> [round(v, 3) for v in y.tolist()]
        [0.849, 1.131]
    """

    @nn.compact
    def __call__(self, x, *, mask=None, residual=None, scale=None) -> Any:
        """Normalize `x`, with the arguments of `jaxnorm.layers.norms.rms_norm`."""
        x = norms.checked_input(self, x)
        shape = norms.feature_shape(self, "feature_axes", self.feature_axes, x)
        return norms.rms_norm(
            self, x, _parameter(self, "scale", shape, scale), mask=mask, residual=residual,
            initializing=self.is_initializing(),
        )  # fmt: skip


class GroupNorm(AffineNormFields, nn.GroupNorm):
    """`flax.linen.GroupNorm` around `jaxnorm.group_norm`, same fields and variables.

    Attributes:
        scale_offset: see `jaxnorm.layers.AffineNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.group_norm`; also unless exactly one of `num_groups`
            and `group_size` is given, or if `scale` or `bias` is given to a layer that has its
            own.

    Source: Wu & He 2018; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.GroupNorm(num_groups=2)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0, 3.0, 10.0, 30.0]]))
        >>> y.round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    @nn.compact
    def __call__(self, x, *, mask=None, scale=None, bias=None):
        """Normalize each group of `x`, with the arguments of `jaxnorm.layers.norms.group_norm`."""
        x = norms.checked_input(self, x)
        shape = norms.feature_shape(self, "axis", -1, x)
        return norms.group_norm(
            self, x, *_parameters(self, shape, scale, bias), mask=mask,
            num_groups=norms.groups_of(self, x), initializing=self.is_initializing(),
        )  # fmt: skip


class InstanceNorm(AffineNormFields, nn.InstanceNorm):
    """`flax.linen.InstanceNorm` around `jaxnorm.instance_norm`, same fields and variables.

    Attributes:
        scale_offset: see `jaxnorm.layers.AffineNormFields`.
        activation, implementation: see `jaxnorm.layers.NormFields`.

    Raises:
        TypeError, ValueError: as `jaxnorm.instance_norm`; also if `scale` or `bias` is given to
            a layer that has its own.

    Source: Ulyanov, Vedaldi & Lempitsky 2016; fields as in Flax.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> x = jnp.array([[[1.0, 5.0], [3.0, 9.0]]])
        >>> y, _ = jnn.InstanceNorm().init_with_output(jax.random.key(0), x)
        >>> y.round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    @nn.compact
    def __call__(self, x, *, mask=None, scale=None, bias=None):
        """Normalize each feature of `x`, with the arguments of `layers.norms.instance_norm`."""
        x = norms.checked_input(self, x)
        shape = norms.feature_shape(self, "feature_axes", self.feature_axes, x)
        return norms.instance_norm(
            self, x, *_parameters(self, shape, scale, bias), mask=mask,
            initializing=self.is_initializing(),
        )  # fmt: skip


def _parameters(module, shape: tuple[int, ...], scale=None, bias=None):
    """Scale and bias, each the module's own or that given in the call."""
    return _parameter(module, "scale", shape, scale), _parameter(module, "bias", shape, bias)


def _parameter(module, name: str, shape: tuple[int, ...], given=None):
    """The parameter `name`, which is created where the module has its own."""
    own = None
    if getattr(module, f"use_{name}"):
        own = module.param(name, getattr(module, f"{name}_init"), shape, module.param_dtype)
    return norms.own_or_given(module, name, own, given)
