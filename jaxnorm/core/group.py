"""Group normalization: instance normalization of an array whose feature axis is split in two."""

from dataclasses import replace

from jaxtyping import Array, Bool, Inexact

from jaxnorm.core.layer import per_slice
from jaxnorm.core.measure import Reduction


def grouped(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, " features"] | None,
    bias: Inexact[Array, " features"] | None,
    *,
    num_groups: int,
    feature_axis: int,
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None,
    dtype,
) -> Inexact[Array, "*shape"]:
    """Moments over the reduced axes, the feature axis standing for the channels of one group."""

    def split(array):
        size = array.shape[feature_axis]
        groups = num_groups if size > 1 else 1
        parts = (groups, size // groups)
        return array.reshape(array.shape[:feature_axis] + parts + array.shape[feature_axis + 1 :])

    if mask is not None:
        mask = split(mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape))
    shape = (num_groups, x.shape[feature_axis] // num_groups)
    # The axis of the groups stands before the channels': axes from the feature axis on move up.
    axes = tuple(a + 1 if a >= feature_axis else a for a in reduction.axes)
    y = per_slice(
        split(x),
        None if scale is None else scale.reshape(shape),
        None if bias is None else bias.reshape(shape),
        reduction=replace(reduction, axes=axes),
        feature_axes=(feature_axis, feature_axis + 1),
        mask=mask,
        dtype=dtype,
    )
    return y.reshape(x.shape)
