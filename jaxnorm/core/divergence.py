"""The divergence of normal distributions, which the monitor and surgery both report."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxnorm.core.moments import Moments, abs_squared


def normal_divergence(now: Moments, before: Moments) -> Float[Array, "*slices"]:
    r"""Kullback-Leibler divergence of a normal distribution from another, in nats.

    .. math::
        D = \frac12 \left( \ln \frac{\sigma_b^2}{\sigma_n^2}
            + \frac{\sigma_n^2 + (\mu_n - \mu_b)^2}{\sigma_b^2} - 1 \right)

    Infinite where only one has a variance.
    """
    known = (now.var > 0) & (before.var > 0)
    of = jnp.where(known, before.var, 1)
    # Not the product of two small numbers: the variances may be subnormal.
    distance = abs_squared((now.mean - before.mean) / lax.sqrt(of).astype(now.mean.dtype))
    ratio = jnp.where(known, now.var / of, 1)
    same = (now.var == before.var) & (now.mean == before.mean)
    between = 0.5 * (ratio - 1 - jnp.log(ratio) + distance)
    return jnp.where(known, jnp.maximum(between, 0), jnp.where(same, 0.0, jnp.inf))
