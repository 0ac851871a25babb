"""Linen variables around the pure functions; no arithmetic lives here."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnorm import functional
from jaxnorm.core import arguments as check
from jaxnorm.core.arguments import Save
from jaxnorm.core.moments import promoted
from jaxnorm.core.running import BatchStats, init_batch_stats
from jaxnorm.distributed.axes import is_bound


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` around `jaxnorm.batch_norm`, same fields and variables.

    Fields, variables and behaviour are Flax's, with these differences: statistics are taken of
    shifted data and accumulated in float32 at least, whatever `force_float32_reductions` says;
    running statistics keep their dtype (under x64 too) and carry no gradient.
    `use_fast_variance=False` asks for the numbers of Flax's two-pass formula, see
    `implementation="two_pass"` of `jaxnorm.batch_norm`; the default is faster and more exact.

    Attributes:
        momentum: share of the old statistics that is kept; None: cumulative average.
        unbiased: keep the variance over n - 1 as running variance, as PyTorch does.
        debias: bias-corrected running statistics, see `jaxnorm.batch_norm`.
        virtual_batch_size: normalize over this many examples, whatever the number of devices; see
            `jaxnorm.batch_norm`. Like `axis_name` not asked for while initializing.
        activation: an elementwise function of the result, see `jaxnorm.batch_norm`.
        implementation: "xla", or None to let jaxnorm choose; see `jaxnorm.batch_norm`.

    With `momentum=None` or `debias=True` there is one more variable, `batch_stats/count`.

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

    unbiased: bool = dataclasses.field(default=False, kw_only=True)
    debias: bool = dataclasses.field(default=False, kw_only=True)
    virtual_batch_size: int | None = dataclasses.field(default=None, kw_only=True)
    activation: Callable | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
        """Normalize `x` and, in training, update `batch_stats`.

        Args:
            x: floating or complex array with the feature axes of `axis`.
            use_running_average: as the field; one of the two must be given.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        check.flag("BatchNorm", "use_running_average", use_running_average)
        x = check.inexact("BatchNorm", "x", x)
        shape = _feature_shape(self, "axis", self.axis, x)
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
        # As in Flax, one example without a batch axis is enough to initialize.
        one_example = initializing and x.ndim == len(shape)
        # A named axis need not exist while initializing; inside `shard_map` it may.
        bound = not initializing or is_bound(self.axis_name)
        training = not use_running_average
        y, new = functional.batch_norm(
            x,
            *_parameters(self, shape),
            stats,
            training=training and not one_example,
            feature_axis=self.axis,
            decay=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name if bound else None,
            axis_index_groups=self.axis_index_groups if bound else None,
            virtual_batch_size=None if initializing else self.virtual_batch_size,
            unbiased=self.unbiased,
            debias=self.debias,
            activation=self.activation,
            implementation=check.from_flax(self.use_fast_variance, self.implementation),
            dtype=self.dtype,
        )
        if training and not initializing:
            mean.value, var.value = new.mean, new.var
            if count is not None:
                count.value = new.count
        return y


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm` around `jaxnorm.layer_norm`, same fields and variables.

    Attributes:
        activation: an elementwise function of the result, see `jaxnorm.layer_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.
        save: which array the backward pass keeps, "input" or "output", see `jaxnorm.layer_norm`.

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

    activation: Callable | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)
    scale_offset: float = dataclasses.field(default=0.0, kw_only=True)
    save: Save = dataclasses.field(default="input", kw_only=True)

    @nn.compact
    def __call__(self, x, *, residual=None, scale=None, bias=None, mask=None) -> Any:
        """Normalize `x` over `reduction_axes`.

        Args:
            x: floating or complex array.
            residual: added to `x` before; then the result is a pair, the second the sum.
            scale, bias: of each sample, see `jaxnorm.layer_norm`; for a layer that has none.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        x = check.inexact("LayerNorm", "x", x)
        shape = _feature_shape(self, "feature_axes", self.feature_axes, x)
        parameters = _parameters(self, shape, scale, bias)
        options = {**_axes(self), **_options(self), "mask": mask}
        if residual is None:
            return functional.layer_norm(x, *parameters, **options)
        return functional.add_layer_norm(x, residual, *parameters, **options)


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm` around `jaxnorm.rms_norm`, same fields and variables.

    Attributes:
        activation: an elementwise function of the result, see `jaxnorm.rms_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.
        save: which array the backward pass keeps, "input" or "output", see `jaxnorm.rms_norm`.

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

    activation: Callable | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)
    scale_offset: float = dataclasses.field(default=0.0, kw_only=True)
    save: Save = dataclasses.field(default="input", kw_only=True)

    @nn.compact
    def __call__(self, x, *, residual=None, scale=None, mask=None) -> Any:
        """Normalize `x` over `reduction_axes`.

        Args:
            x: floating or complex array.
            residual: added to `x` before; then the result is a pair, the second the sum.
            scale: of each sample, see `jaxnorm.layer_norm`; for a layer that has none of its own.
            mask: broadcasts to `x`; nonzero elements enter the mean square.
        """
        x = check.inexact("RMSNorm", "x", x)
        shape = _feature_shape(self, "feature_axes", self.feature_axes, x)
        scale = _parameter(self, "scale", shape, scale)
        options = {**_axes(self), **_options(self), "mask": mask}
        if residual is None:
            return functional.rms_norm(x, scale, **options)
        return functional.add_rms_norm(x, residual, scale, **options)


class GroupNorm(nn.GroupNorm):
    """`flax.linen.GroupNorm` around `jaxnorm.group_norm`, same fields and variables.

    Attributes:
        activation: an elementwise function of the result, see `jaxnorm.group_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.

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

    activation: Callable | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)
    scale_offset: float = dataclasses.field(default=0.0, kw_only=True)

    @nn.compact
    def __call__(self, x, *, scale=None, bias=None, mask=None):
        """Normalize each group of `x`.

        Args:
            x: floating or complex array.
            scale, bias: of each sample, see `jaxnorm.layer_norm`; for a layer that has none.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        x = check.inexact("GroupNorm", "x", x)
        return functional.group_norm(
            x,
            *_parameters(self, _feature_shape(self, "axis", -1, x), scale, bias),
            num_groups=check.groups_from("GroupNorm", self.num_groups, self.group_size, x),
            axis=check.reduced_from(self.reduction_axes, x),
            mask=mask,
            **_options(self),
        )


class InstanceNorm(nn.InstanceNorm):
    """`flax.linen.InstanceNorm` around `jaxnorm.instance_norm`, same fields and variables.

    Attributes:
        activation: an elementwise function of the result, see `jaxnorm.instance_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.

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

    activation: Callable | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)
    scale_offset: float = dataclasses.field(default=0.0, kw_only=True)

    @nn.compact
    def __call__(self, x, *, scale=None, bias=None, mask=None):
        """Normalize each feature of each example.

        Args:
            x: floating or complex array.
            scale, bias: of each sample, see `jaxnorm.layer_norm`; for a layer that has none.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        x = check.inexact("InstanceNorm", "x", x)
        shape = _feature_shape(self, "feature_axes", self.feature_axes, x)
        return functional.instance_norm(
            x, *_parameters(self, shape, scale, bias), feature_axis=self.feature_axes, mask=mask,
            **_options(self),
        )  # fmt: skip


def _feature_shape(module: nn.Module, name: str, axes, x) -> tuple[int, ...]:
    return tuple(x.shape[a] for a in check.axes(type(module).__name__, name, axes, x))


def _parameters(module, shape: tuple[int, ...], scale=None, bias=None):
    return _parameter(module, "scale", shape, scale), _parameter(module, "bias", shape, bias)


def _parameter(module, name: str, shape: tuple[int, ...], given=None):
    """The module's own, where it has one, or that given in the call."""
    used = getattr(module, f"use_{name}")
    check.one_of(type(module).__name__, name, used, given)
    if not used:
        return given
    return module.param(name, getattr(module, f"{name}_init"), shape, module.param_dtype)


def _axes(module) -> dict:
    """Options that only layer and RMS normalization have."""
    return {
        "axis": module.reduction_axes,
        "feature_axis": module.feature_axes,
        "save": module.save,
    }


def _options(module) -> dict:
    """Options of all stateless layers. A named axis need not exist while initializing."""
    bound = not module.is_initializing()
    return {
        "epsilon": module.epsilon,
        "scale_offset": module.scale_offset,
        "activation": module.activation,
        "implementation": check.from_flax(module.use_fast_variance, module.implementation),
        "dtype": module.dtype,
        "axis_name": module.axis_name if bound else None,
        "axis_index_groups": module.axis_index_groups if bound else None,
    }
