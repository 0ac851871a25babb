"""The five normalizations as layers: their new fields, their checks, and the calls.

In the functions, `layer` is a Linen or NNX layer, of which only fields are read.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

from jaxnorm import functional
from jaxnorm.core import arguments as check
from jaxnorm.core.arguments import Axes, Save
from jaxnorm.core.running import BatchStats
from jaxnorm.distributed.axes import is_bound

Class = TypeVar("Class")


@dataclass_transform(kw_only_default=True, eq_default=False)
def fields(cls: type[Class]) -> type[Class]:
    """Make the annotated names of a class fields of the layers that inherit from it.

    Linen's layers are dataclasses and take them over; an NNX constructor calls the `__init__` that
    is written here. Equality and representation stay those of the Flax layer.
    """
    return dataclasses.dataclass(kw_only=True, eq=False, repr=False, match_args=False)(cls)


@fields
class NormFields:
    """Fields that every normalization layer of jaxnorm adds to Flax's.

    Attributes:
        activation: an elementwise function of the result, applied before the one rounding to
            `dtype`, see `jaxnorm.layer_norm`. None: the result itself.
        implementation: None lets jaxnorm choose, see `jaxnorm.explain`. "xla" or "pallas" asks for
            one of the two and fails where it cannot run; "two_pass" gives the numbers of Flax's
            ``use_fast_variance=False``, which asks for it too.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.InstanceNorm(activation=jax.nn.relu)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[[1.0], [3.0]]]))
        >>> y.round(3).tolist()
        [[[0.0], [1.0]]]
    """

    activation: Callable | None = None
    implementation: str | None = None


@fields
class BatchNormFields(NormFields):
    """Fields that jaxnorm's batch normalization adds to Flax's.

    With ``momentum=None`` or ``debias=True`` the layer has one more variable among its batch
    statistics, `count`: the number of updates so far, int32 of shape ().

    Attributes:
        unbiased: keep the variance over n - 1 as running variance, as PyTorch does.
        debias: bias-corrected running statistics, see `jaxnorm.batch_norm`.
        virtual_batch_size: normalize over this many examples, whatever the number of devices, see
            `jaxnorm.batch_norm`. Ignored while a Linen layer is initialized.
        activation, implementation: see `NormFields`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.BatchNorm(1, momentum=None, unbiased=True, rngs=nnx.Rngs(0))
        >>> _ = layer(jnp.array([[1.0], [3.0]]))
        >>> layer.mean[...].tolist(), layer.var[...].tolist(), layer.count[...].tolist()
        ([2.0], [2.0], 1)
    """

    unbiased: bool = False
    debias: bool = False
    virtual_batch_size: int | None = None


@fields
class AffineNormFields(NormFields):
    """Fields that jaxnorm's group and instance normalization add to Flax's.

    Attributes:
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.
        activation, implementation: see `NormFields`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.GroupNorm(num_groups=1, scale_offset=1.0)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([[1.0, 3.0]]))
        >>> y.round(3).tolist()  # scale starts at 1
        [[-2.0, 2.0]]
    """

    scale_offset: float = 0.0


@fields
class SavingNormFields(AffineNormFields):
    """Fields that jaxnorm's layer and RMS normalization add to Flax's.

    Attributes:
        save: which array the backward pass keeps, "input" or "output", see `jaxnorm.layer_norm`.
        scale_offset: see `AffineNormFields`.
        activation, implementation: see `NormFields`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.RMSNorm(save="output")
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
        >>> [round(v, 3) for v in y.tolist()]
        [0.849, 1.131]
    """

    save: Save = "input"


def batch_norm(
    layer, x, scale, bias, stats: BatchStats, *, training: bool, mask=None, dtype=None,
    initializing: bool = False,
) -> tuple[Any, BatchStats]:  # fmt: skip
    """Normalize `x` over its batch, as a `BatchNorm` layer says.

    Args:
        layer: has the fields of Flax's and of `BatchNormFields`.
        x: floating or complex, with the layer's feature axes.
        scale: of the feature axes' shape, or None.
        bias: likewise.
        stats: running statistics of the feature axes' shape.
        training: normalize with the batch's statistics and update the running ones.
        mask: broadcasts to `x`; nonzero elements enter the statistics.
        dtype: dtype of the result; None: what `x`, scale and bias promote to.
        initializing: True in Linen's `init`, where as in Flax one example without a batch axis
            will do, and neither a named axis nor a whole virtual batch need be there.
    """
    axis, one_example = layer.axis, initializing and x.ndim == len(stats.mean.shape)
    if one_example:  # a batch of one, whose axis stands in front of all others
        axes = axis if isinstance(axis, Iterable) else (axis,)
        axis = tuple(a if a < 0 else a - x.ndim for a in axes)
        x, mask = x[None], None if mask is None else mask[None]
    y, stats = functional.batch_norm(
        x,
        scale,
        bias,
        stats,
        training=training,
        feature_axis=axis,
        decay=layer.momentum,
        epsilon=layer.epsilon,
        mask=mask,
        virtual_batch_size=None if initializing else layer.virtual_batch_size,
        unbiased=layer.unbiased,
        debias=layer.debias,
        activation=layer.activation,
        implementation=_implementation(layer),
        dtype=dtype,
        **_named_axis(layer, initializing),
    )
    return (y[0] if one_example else y), stats


def layer_norm(layer, x, scale, bias, *, residual=None, mask=None, initializing=False) -> Any:
    """Normalize `x`, or its sum with `residual`, as a `LayerNorm` layer says.

    Args:
        layer: has the fields of Flax's and of `SavingNormFields`.
        x: floating or complex array.
        scale: the layer's own; or, for a layer that has none, one given in the call, which may be
            of each sample, see `jaxnorm.layer_norm`.
        bias: likewise.
        residual: added to `x` before; then the result is a pair, the second the sum.
        mask: broadcasts to `x`; nonzero elements enter the statistics.
        initializing: True in Linen's `init`, where a named axis need not be bound.
    """
    options = {**_trailing(layer), **_options(layer, initializing), "mask": mask}
    if residual is None:
        return functional.layer_norm(x, scale, bias, **options)
    return functional.add_layer_norm(x, residual, scale, bias, **options)


def rms_norm(layer, x, scale, *, residual=None, mask=None, initializing=False) -> Any:
    """Normalize `x`, or its sum with `residual`, as an `RMSNorm` layer says.

    Args:
        layer: has the fields of Flax's and of `SavingNormFields`.
        x: floating or complex array.
        scale: as in `layer_norm`.
        residual: as in `layer_norm`.
        mask: broadcasts to `x`; nonzero elements enter the mean square.
        initializing: as in `layer_norm`.
    """
    options = {**_trailing(layer), **_options(layer, initializing), "mask": mask}
    if residual is None:
        return functional.rms_norm(x, scale, **options)
    return functional.add_rms_norm(x, residual, scale, **options)


def group_norm(layer, x, scale, bias, *, num_groups: int, mask=None, initializing=False):
    """Normalize each group of `x`, as a `GroupNorm` layer says.

    Args:
        layer: has the fields of Flax's and of `AffineNormFields`.
        x: floating or complex array. Of rank 1 it is one example without a batch axis.
        scale: as in `layer_norm`.
        bias: as in `layer_norm`.
        num_groups: see `groups_of`.
        mask: broadcasts to `x`; nonzero elements enter the statistics.
        initializing: as in `layer_norm`.
    """
    unbatched = layer.reduction_axes is None and x.ndim == 1
    return functional.group_norm(
        x,
        scale,
        bias,
        num_groups=num_groups,
        axis=-1 if unbatched else layer.reduction_axes,
        mask=mask,
        **_options(layer, initializing),
    )


def instance_norm(layer, x, scale, bias, *, mask=None, initializing=False):
    """Normalize each feature of each example, as an `InstanceNorm` layer says.

    Args:
        layer: has the fields of Flax's and of `AffineNormFields`.
        x: floating or complex array.
        scale: as in `layer_norm`.
        bias: as in `layer_norm`.
        mask: broadcasts to `x`; nonzero elements enter the statistics.
        initializing: as in `layer_norm`.
    """
    return functional.instance_norm(
        x, scale, bias, feature_axis=layer.feature_axes, mask=mask, **_options(layer, initializing)
    )


def checked_input(layer, x):
    """`x` as an array of floating or complex numbers; an error names the layer."""
    return check.inexact(type(layer).__name__, "x", x)


def feature_shape(layer, field: str, axes: Axes, x) -> tuple[int, ...]:
    """The shape of the parameters, taken from `x` at the axes that the layer's `field` names."""
    return tuple(x.shape[a] for a in check.axes(type(layer).__name__, field, axes, x))


def own_or_given(layer, name: str, own, given):
    """The parameter `name`: the layer's own, or in its place that of the call."""
    if own is not None and given is not None:
        shape = getattr(given, "shape", None)
        raise ValueError(
            f"{type(layer).__name__}: a {name} given in the call stands in place of the layer's "
            f"own; got {name}.shape={shape} with use_{name}=True. Construct the layer with "
            f"use_{name}=False, or leave {name} out of the call."
        )
    return given if own is None else own


def uses_running_average(value: bool | None) -> bool:
    """Flax's flag of a `BatchNorm`, as the call or else the constructor gives it."""
    if value is None:
        raise ValueError(
            "BatchNorm: whether to use the running statistics must be said; got "
            "use_running_average=None here and in the constructor. Pass True (evaluation) or "
            "False (training), or in NNX call model.train() or model.eval() first."
        )
    return check.flag("BatchNorm", "use_running_average", value)


def groups_of(layer, x) -> int:
    """The number of groups of a `GroupNorm` that was given that or the size of one."""
    num_groups, group_size = layer.num_groups, layer.group_size
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "GroupNorm: exactly one of num_groups and group_size must be given; got "
            f"num_groups={num_groups}, group_size={group_size}. To give group_size, pass "
            "num_groups=None."
        )
    if group_size is None:
        return num_groups
    features = x.shape[-1]
    if group_size <= 0 or features % group_size:
        raise ValueError(
            f"GroupNorm: group_size must divide the number of features, {features}, the last of "
            f"x.shape={x.shape}; got group_size={group_size}. Choose a divisor."
        )
    return features // group_size


def _implementation(layer) -> str | None:
    """The implementation that is asked for, be it by Flax's flag.

    The flag's fast form is served by the exact one.
    """
    asked = layer.implementation
    return asked if layer.use_fast_variance or asked else "two_pass"


def _named_axis(layer, initializing: bool) -> dict:
    """The named axis to synchronize over; in Linen's `init` it need not be bound."""
    bound = not initializing or is_bound(layer.axis_name)
    return {
        "axis_name": layer.axis_name if bound else None,
        "axis_index_groups": layer.axis_index_groups if bound else None,
    }


def _trailing(layer) -> dict:
    """Options that only layer and RMS normalization have."""
    return {"axis": layer.reduction_axes, "feature_axis": layer.feature_axes, "save": layer.save}


def _options(layer, initializing: bool) -> dict:
    """Options of all normalizations without a state."""
    return {
        "epsilon": layer.epsilon,
        "scale_offset": layer.scale_offset,
        "activation": layer.activation,
        "dtype": layer.dtype,
        "implementation": _implementation(layer),
        **_named_axis(layer, initializing),
    }
