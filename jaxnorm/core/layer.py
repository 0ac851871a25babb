"""Layer, RMS, instance and group normalization: moments over axes of one example, no state."""

from jaxtyping import Array, Bool, Inexact

from jaxnorm.core.affine import along, normalize
from jaxnorm.core.arguments import Save
from jaxnorm.core.finish import Finish
from jaxnorm.core.output import normalize_keeping_output
from jaxnorm.core.slices import Reduction


def per_slice(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None,
    bias: Inexact[Array, "..."] | None,
    *,
    reduction: Reduction,
    feature_axes: tuple[int, ...],
    mask: Bool[Array, "*#shape"] | None,
    finish: Finish,
    save: Save = "input",
) -> Inexact[Array, "*shape"]:
    """Normalize each slice with its own moments.

    Scale and bias have the shape of the feature axes, or the rank of `x` and broadcast to it.
    """
    scale, bias = along(scale, feature_axes, x.ndim), along(bias, feature_axes, x.ndim)
    options = {"reduction": reduction, "mask": mask, "finish": finish}
    if save == "output":
        return normalize_keeping_output(x, scale, bias, **options)
    return normalize(x, scale, bias, **options)[0]


def add_per_slice(
    x: Inexact[Array, "*shape"],
    residual: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None,
    bias: Inexact[Array, "..."] | None,
    **options,
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    """`per_slice` of the sum of two arrays of one dtype, and that sum, rounded once."""
    total = x + residual
    return per_slice(total, scale, bias, **options), total
