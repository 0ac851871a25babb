"""Layer, RMS, instance and group normalization and weight standardization: no state."""

from jaxtyping import Array, Bool, Inexact

from jaxnorm.core.arguments import Save
from jaxnorm.core.epilogue import Epilogue, along
from jaxnorm.core.measure import Measurement
from jaxnorm.core.normalize import normalize
from jaxnorm.core.output import normalize_keeping_output


def normalize_slices(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None,
    bias: Inexact[Array, "..."] | None,
    *,
    measurement: Measurement,
    feature_axes: tuple[int, ...],
    mask: Bool[Array, "*#shape"] | None,
    epilogue: Epilogue,
    save: Save = "input",
) -> Inexact[Array, "*shape"]:
    """Normalize each slice with its own moments.

    Scale and bias have the shape of the feature axes, or the rank of `x` and broadcast to it.
    """
    scale, bias = along(scale, feature_axes, x.ndim), along(bias, feature_axes, x.ndim)
    options = {"measurement": measurement, "mask": mask, "epilogue": epilogue}
    if save == "output":
        return normalize_keeping_output(x, scale, bias, **options)
    return normalize(x, scale, bias, **options)[0]


def add_and_normalize_slices(
    x: Inexact[Array, "*shape"],
    residual: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None,
    bias: Inexact[Array, "..."] | None,
    **options,
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    """Normalize the sum of two arrays of one dtype; with it comes that sum, rounded once."""
    total = x + residual
    return normalize_slices(total, scale, bias, **options), total
