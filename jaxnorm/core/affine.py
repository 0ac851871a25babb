"""The second half of every normalization: standardize with given moments, scale, shift."""

import jax
from jaxtyping import Array, Inexact

from jaxnorm.core.measure import LocalMoments
from jaxnorm.core.moments import promoted


def normalize(
    x: Inexact[Array, "*shape"],
    local: LocalMoments,
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    dtype: jax.typing.DTypeLike,
) -> Inexact[Array, "*shape"]:
    """``(x - mean) * rstd * scale + bias``, computed in float32 at least, rounded once to `dtype`.

    The backward pass recomputes xhat: between the passes only `x`, in its own dtype, the moments
    and `scale` are kept. Together with the derivative of the moments this gives the classic
    ``dx = rstd (g - <g> - xhat <g xhat>)`` with ``g = dy * scale``.
    """

    def affine(x, local: LocalMoments, scale, bias):
        y = local.standardize(x)
        wide = promoted(y.dtype, dtype)
        y = y.astype(wide)
        if scale is not None:
            y = y * scale.astype(wide)
        if bias is not None:
            y = y + bias.astype(wide)
        return y.astype(dtype)

    return jax.checkpoint(affine, prevent_cse=False)(x, local, scale, bias)


def along(
    parameter: Inexact[Array, "..."] | None, feature_axes: tuple[int, ...], ndim: int
) -> Inexact[Array, "..."] | None:
    """A parameter of the feature axes' shape, with size 1 on all other axes of a rank `ndim`."""
    if parameter is None:
        return None
    sizes = dict(zip(feature_axes, parameter.shape, strict=True))
    return parameter.reshape([sizes.get(a, 1) for a in range(ndim)])
