"""Normalize, and recompute from the output in the backward pass instead of from the input.

The next layer keeps its input, which is the output here; the input of a normalization is otherwise
often needed by nobody. With scale and bias at hand, ``xhat = (y - bias) / scale``: all that the
derivative of standardization is made of, together with rstd.

Source: Rota Bulo, Porzi & Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", 2018, section 3.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from jaxnorm.core.affine import standardized
from jaxnorm.core.blocks import placed_like
from jaxnorm.core.finish import Finish
from jaxnorm.core.moments import promoted, wide_dtype
from jaxnorm.core.slices import Reduction
from jaxnorm.core.standardize import means_of_tangent


def normalize_keeping_output(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None,
    finish: Finish,
) -> Inexact[Array, "*shape"]:
    """As `affine.normalize`, with a `finish` that can be undone: one without an activation."""
    return _compiled(reduction, finish, x, scale, bias, mask)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _compiled(reduction: Reduction, finish: Finish, *arrays):
    return _normalize(reduction, finish, *arrays)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalize(reduction: Reduction, finish: Finish, x, scale, bias, mask):
    """y and, for the derivative, rstd; also the count where a mask decides it."""
    xhat, measured = standardized(reduction, x, mask, None)
    count = None if mask is None else measured.count
    return finish(xhat, scale, bias), measured.local.rstd, count


@_normalize.defjvp
def _normalize_jvp(reduction: Reduction, finish: Finish, primals, tangents):
    _, scale, bias, mask = primals
    y, rstd, count = _normalize(reduction, finish, *primals)
    # Kept between the passes is what goes into a checkpoint: x does not.
    tangent = jax.checkpoint(partial(_tangent, reduction, finish), prevent_cse=False)
    dy, drstd = tangent((y, rstd, count, scale, bias, mask), *tangents[:3])
    return (y, rstd, count), (dy, drstd, jax.tree.map(jnp.zeros_like, count))


def _tangent(reduction: Reduction, finish: Finish, known, dx, dscale, dbias):
    """dy = rstd (a (dx - <dx>) - z <Re(conj(xhat) dx)>) + xhat da + db, with y = z + b, z = a xhat.

    z is known even where the factor a is zero; xhat is lost there, and so what depends on it: NaN,
    in the derivatives with respect to those elements of x and of scale, and in no others.
    """
    y, rstd, count, scale, bias, mask = known
    wide = promoted(wide_dtype(dx.dtype), finish.dtype)
    z, dx = y.astype(wide), dx.astype(wide)
    z = z if bias is None else z - bias.astype(wide)
    xhat, factor = z, None
    if scale is not None:
        factor = finish.factor(scale, wide)
        lost = factor == 0
        xhat = jnp.where(lost, jnp.nan, z / jnp.where(lost, 1, factor))
    dmean, inner = means_of_tangent(reduction, xhat, mask, count, dx)
    # Of rstd's type, also where scale is spread over more devices than x.
    drstd = placed_like((-(inner * rstd) * rstd).astype(rstd.dtype), rstd)
    dmean, inner, rstd = (part.astype(wide) for part in (dmean, inner, rstd))
    centered = dx - dmean
    dy = ((centered if factor is None else centered * factor) - z * inner) * rstd
    dy = dy if scale is None else dy + xhat * dscale.astype(wide)
    dy = dy if bias is None else dy + dbias.astype(wide)
    return dy.astype(finish.dtype), drstd
