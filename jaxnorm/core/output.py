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

from jaxnorm.core.blocks import reshard_like
from jaxnorm.core.epilogue import Epilogue
from jaxnorm.core.measure import Measurement
from jaxnorm.core.moments import promoted, wide_dtype
from jaxnorm.core.normalize import means_of_tangent, standardize


def normalize_keeping_output(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    measurement: Measurement,
    mask: Bool[Array, "*#shape"] | None,
    epilogue: Epilogue,
) -> Inexact[Array, "*shape"]:
    """As `normalize.normalize`, with an epilogue that can be undone: without an activation."""
    return _compiled(measurement, epilogue, x, scale, bias, mask)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _compiled(measurement: Measurement, epilogue: Epilogue, *arrays):
    return _normalize(measurement, epilogue, *arrays)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalize(measurement: Measurement, epilogue: Epilogue, x, scale, bias, mask):
    """y and, for the derivative, rstd; also the count where a mask decides it."""
    xhat, measured = standardize(measurement, x, mask)
    count = None if mask is None else measured.count
    return epilogue(xhat, scale, bias), measured.local.rstd, count


@_normalize.defjvp
def _normalize_jvp(measurement: Measurement, epilogue: Epilogue, primals, tangents):
    _, scale, bias, mask = primals
    y, rstd, count = _normalize(measurement, epilogue, *primals)
    # Kept between the passes is what goes into a checkpoint: x does not.
    tangent = jax.checkpoint(partial(_tangent, measurement, epilogue), prevent_cse=False)
    dy, drstd = tangent((y, rstd, count, scale, bias, mask), *tangents[:3])
    return (y, rstd, count), (dy, drstd, jax.tree.map(jnp.zeros_like, count))


def _tangent(measurement: Measurement, epilogue: Epilogue, known, dx, dscale, dbias):
    """dy = rstd (a (dx - <dx>) - z <Re(conj(xhat) dx)>) + xhat da + db, with y = z + b, z = a xhat.

    z is known even where the factor a is zero; xhat is lost there, and so what depends on it: NaN,
    in the derivatives with respect to those elements of x and of scale, and in no others.
    """
    y, rstd, count, scale, bias, mask = known
    wide = promoted(wide_dtype(dx.dtype), epilogue.dtype)
    z, dx = y.astype(wide), dx.astype(wide)
    z = z if bias is None else z - bias.astype(wide)
    xhat, factor = z, None
    if scale is not None:
        factor = epilogue.factor(scale, wide)
        lost = factor == 0
        xhat = jnp.where(lost, jnp.nan, z / jnp.where(lost, 1, factor))
    dmean, inner = means_of_tangent(measurement, xhat, mask, count, dx)
    # Of rstd's type, also where scale lies on more devices than x.
    drstd = reshard_like((-(inner * rstd) * rstd).astype(rstd.dtype), rstd)
    dmean, inner, rstd = (part.astype(wide) for part in (dmean, inner, rstd))
    centered = dx - dmean
    dy = ((centered if factor is None else centered * factor) - z * inner) * rstd
    dy = dy if scale is None else dy + xhat * dscale.astype(wide)
    dy = dy if bias is None else dy + dbias.astype(wide)
    return dy.astype(epilogue.dtype), drstd
