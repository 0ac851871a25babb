"""The oracle: every public normalization in NumPy, more exact than the code that it judges.

Nothing here imports JAX or any other part of jaxnorm, so that the two cannot share an error. Each
function has the name, arguments and defaults of the public one, and `f_vjp(dy, ...)` is its
backward pass, derived by hand. All of them share these rules:

Precision
    Inputs of at most float32 (float16 and bfloat16 too) are computed in float64, float64 inputs
    in `numpy.longdouble`. Results are float64 or complex128 (longdouble for longdouble inputs).
    Means are taken in two steps, so that data at offset 1e6 with deviation 1e-6 stay exact.
Masks
    A mask has any dtype, broadcasts to `x`, and nonzero means included. It selects the elements
    that enter the moments. Every position, masked out or not, is normalized with these moments.
Empty and constant slices
    If a slice has no element, or var + epsilon = 0, its standardized value is 0. So `y` is `bias`,
    and the derivatives with respect to `x` are zero.
Complex numbers
    The mean is complex. The variance, the mean of |x - mean|^2, is real. Cotangents follow
    `jax.vjp`, whose pairing is Re sum(cotangent * tangent), without a conjugate. The cotangent
    of a real input is real.
Parameters
    `scale` and `bias` have the sizes of the feature axes in ascending axis order, or the rank of
    `x` and broadcast to it. `None` leaves the step out, and its cotangent is `None`.
Errors
    `ValueError` for shapes, axes, masks and options that do not fit, `TypeError` for arrays that
    do not hold numbers.

There is no forward mode: a tangent map J is judged by its adjoint. For a random tangent t and
cotangent u, Re sum(u * J t) must equal the sum of Re sum(f_vjp(u) * t) over the inputs.

Example:
    >>> from jaxnorm.testing import oracle
    >>> oracle.layer_norm([[1.0, 3.0]], [2.0, 2.0], [1.0, 1.0]).round(3).tolist()
    [[-1.0, 3.0]]
    >>> dy, x = [[1.0, 0.0]], [[1.0, 3.0]]
    >>> dx, dscale, dbias = oracle.layer_norm_vjp(dy, x, [2.0, 2.0], [1.0, 1.0])
    >>> dscale.round(3).tolist(), dbias.tolist()
    ([-1.0, 0.0], [1.0, 0.0])
"""

from jaxnorm.testing.oracle.backward import (
    batch_norm_vjp,
    group_norm_vjp,
    instance_norm_vjp,
    layer_norm_vjp,
    rms_norm_vjp,
    standardize_weight_vjp,
)
from jaxnorm.testing.oracle.forward import (
    RunningStats,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    standardize_weight,
)
from jaxnorm.testing.oracle.moments import Moments, merge, moments, moments_vjp

__all__ = [
    "Moments",
    "RunningStats",
    "batch_norm",
    "batch_norm_vjp",
    "group_norm",
    "group_norm_vjp",
    "instance_norm",
    "instance_norm_vjp",
    "layer_norm",
    "layer_norm_vjp",
    "merge",
    "moments",
    "moments_vjp",
    "rms_norm",
    "rms_norm_vjp",
    "standardize_weight",
    "standardize_weight_vjp",
]
