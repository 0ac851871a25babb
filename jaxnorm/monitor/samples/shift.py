"""Measures of how far a distribution has moved, as pure functions.

They take the numbers of a distribution, its `Moments` (or a `Summary`, which holds them), or counts
in shared bins. With leading axes (layers, channels, steps) each entry is compared by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxnorm.core.divergence import normal_divergence
from jaxnorm.core.moments import Moments
from jaxnorm.functional import moments
from jaxnorm.monitor.probe.summary import Summary

Distribution = ArrayLike | Moments | Summary


def mean_drift(now: Distribution, before: Distribution) -> Float[Array, ...]:
    r"""Distance of the present mean from the earlier mean.

    .. math:: |\mu_t - \mu_{t-1}|

    Args:
        now, before: numbers of any shape, each an array that is one distribution; or `Moments` or
            `Summary` of any shape.

    Returns:
        The distance in the units of the data; shape of the moments, () for arrays.

    Raises:
        TypeError: an array is not of floating numbers.
        ValueError: an array has no element.

    Source: the drift of activations in Ioffe & Szegedy 2015, section 4.1 and Figure 1.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_drift(jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0])).item()
        1.5
    """
    a, b = _moments("mean_drift", now, before)
    return jnp.abs(a.mean - b.mean)


def variance_ratio(now: Distribution, before: Distribution) -> Float[Array, ...]:
    r"""Ratio of the present variance to the earlier variance.

    .. math:: \sigma_t^2 / \sigma_{t-1}^2

    Args:
        now, before: as in `mean_drift`.

    Returns:
        The ratio; shape of the moments, () for arrays. 1 where neither has any variance, infinite
        where only the earlier has none.

    Raises:
        TypeError, ValueError: as `mean_drift`.

    Source: the spread of activations in Ioffe & Szegedy 2015, section 4.1 and Figure 1.

    Example:
        >>> import jax.numpy as jnp
        >>> variance_ratio(jnp.array([0.0, 4.0]), jnp.array([0.0, 2.0])).item()
        4.0
    """
    a, b = _moments("variance_ratio", now, before)
    none = b.var == 0
    return jnp.where(none, jnp.where(a.var == 0, 1.0, jnp.inf), a.var / jnp.where(none, 1, b.var))


def kl_divergence(
    now: Distribution,
    before: Distribution,
    *,
    histograms: bool = False,
    smoothing: float = 0.5,
) -> Float[Array, ...]:
    r"""Kullback-Leibler divergence of the present from the earlier distribution, in nats.

    Between normal distributions of these means and variances,

    .. math::
        D = \frac12 \left( \ln \frac{\sigma_{t-1}^2}{\sigma_t^2}
            + \frac{\sigma_t^2 + (\mu_t - \mu_{t-1})^2}{\sigma_{t-1}^2} - 1 \right)

    and between counts in the same bins, with p and q their shares,

    .. math:: D = \sum_i p_i \ln \frac{p_i}{q_i}

    Args:
        now, before: as in `mean_drift`; with `histograms`, counts, shape (..., bins).
        histograms: True if these are counts.
        smoothing: added to each count, so that no bin is empty (1/2: Krichevsky & Trofimov 1981).

    Returns:
        The divergence; shape of the moments, or of the counts without the axis of bins. Infinite
        between normal distributions of which only one has no variance.

    Raises:
        TypeError, ValueError: as `mean_drift`; `smoothing` is negative; histograms have different
            numbers of bins.

    Source: Kullback & Leibler 1951.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([-1.0, 1.0])
        >>> kl_divergence(x + 1, x).item()
        0.5
        >>> f"{kl_divergence(jnp.array([8, 0]), jnp.array([4, 4]), histograms=True):.3f}"
        '0.479'
    """
    op = "kl_divergence"
    if histograms:
        p, q = _shares(op, now, before, smoothing)
        return (p * (_log(p) - _log(q))).sum(-1)
    a, b = _moments(op, now, before)
    return normal_divergence(a, b)


def population_stability_index(
    now: ArrayLike, before: ArrayLike, *, smoothing: float = 0.5
) -> Float[Array, ...]:
    r"""Population stability index between counts in the same bins, in nats.

    .. math:: \sum_i (p_i - q_i) \ln \frac{p_i}{q_i}

    The symmetric form of `kl_divergence`. Below 0.1 is usually called stable, above 0.25 shifted.

    Args:
        now, before: counts, shape (..., bins).
        smoothing: as in `kl_divergence`.

    Returns:
        Shape (...).

    Raises:
        ValueError: as `kl_divergence`.

    Source: Jeffreys 1946, for the measure; Siddiqi, Credit Risk Scorecards, 2006, for its name and
        thresholds.

    Example:
        >>> import jax.numpy as jnp
        >>> f"{population_stability_index(jnp.array([9, 1]), jnp.array([5, 5])):.3f}"
        '0.671'
    """
    p, q = _shares("population_stability_index", now, before, smoothing)
    return ((p - q) * (_log(p) - _log(q))).sum(-1)


def skewness(x: ArrayLike, *, edges: ArrayLike | None = None) -> Float[Array, ...]:
    r"""Third standardized moment; 0 for a normal distribution.

    .. math:: m_3 / m_2^{3/2}, \quad m_k = \frac1n \sum_i (x_i - \bar x)^k

    Args:
        x: numbers of any shape; with `edges`, counts, shape (..., bins).
        edges: between the bins, one fewer than these, such as `jaxnorm.monitor.EDGES`. A bin counts
            as its middle, one without an end as its edge.

    Returns:
        Shape (), or (...). 0 where there is no variance.

    Raises:
        TypeError, ValueError: as `mean_drift`; the edges do not fit the bins.

    Source: Fisher's g1; see Joanes & Gill 1998.

    Example:
        >>> import jax.numpy as jnp
        >>> f"{skewness(jnp.array([0.0, 0.0, 3.0])):.3f}"
        '0.707'
    """
    return _standardized("skewness", x, edges, 3)


def excess_kurtosis(x: ArrayLike, *, edges: ArrayLike | None = None) -> Float[Array, ...]:
    r"""Fourth standardized moment less 3; 0 for a normal distribution, above it for heavy tails.

    .. math:: m_4 / m_2^2 - 3, \quad m_k = \frac1n \sum_i (x_i - \bar x)^k

    Args:
        x, edges: as in `skewness`.

    Returns:
        Shape (), or (...). 0 where there is no variance.

    Raises:
        TypeError, ValueError: as `skewness`.

    Source: Fisher's g2; see Joanes & Gill 1998.

    Example:
        >>> import jax.numpy as jnp
        >>> excess_kurtosis(jnp.array([-1.0, 1.0])).item()
        -2.0
    """
    return _standardized("excess_kurtosis", x, edges, 4)


def track_covariate_shift(
    history: Iterable[Distribution] | Mapping[int, Distribution],
) -> list[dict[str, float]]:
    r"""Shift of one layer's activations from each step to the next.

    .. math:: |\mu_t - \mu_{t-1}|, \quad \sigma_t^2 / \sigma_{t-1}^2

    Args:
        history: one distribution for each step, in order; or by the number of the step.

    Returns:
        A row for each step but the first: "step", "mean_shift" and "variance_ratio".

    Raises:
        TypeError, ValueError: as `mean_drift`; there are fewer than two steps, or the moments are
            those of several distributions.

    Source: the drift and spread of activations in Ioffe & Szegedy 2015, section 4.1 and Figure 1.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([-1.0, 1.0])
        >>> for row in track_covariate_shift([x, x + 0.5, 2 * x]):
        ...     print(row)
        {'step': 1, 'mean_shift': 0.5, 'variance_ratio': 1.0}
        {'step': 2, 'mean_shift': 0.5, 'variance_ratio': 4.0}
    """
    op = "track_covariate_shift"
    pairs: list[tuple[Any, Any]] = list(
        history.items() if isinstance(history, Mapping) else enumerate(history)
    )
    if len(pairs) < 2:
        raise ValueError(
            f"{op}: a shift is from one step to another; got {len(pairs)} of them. Give the "
            "activations of two steps at least."
        )
    steps = [(step, _one(op, each)) for step, each in pairs]
    if any(m.mean.ndim for _, m in steps):
        shapes = sorted({str(m.mean.shape) for _, m in steps})
        raise ValueError(
            f"{op}: each step must be one distribution; got moments of shape {', '.join(shapes)}. "
            "Call it for each layer or channel, or use mean_drift and variance_ratio."
        )
    return [
        {
            "step": int(step),
            "mean_shift": mean_drift(now, before).item(),
            "variance_ratio": variance_ratio(now, before).item(),
        }
        for (_, before), (step, now) in itertools.pairwise(steps)
    ]


def _moments(op: str, *given: Distribution) -> tuple[Moments, Moments]:
    a, b = (_one(op, each) for each in given)
    return a, b


def _one(op: str, given: Distribution) -> Moments:
    if isinstance(given, Summary):
        return given.moments
    if isinstance(given, Moments):
        return given
    x = jnp.asarray(given)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{op}: a distribution must be floating numbers, Moments or a Summary; got an array of "
            f"{x.dtype}. Cast it: x.astype(jnp.float32)."
        )
    if x.size == 0:
        raise ValueError(
            f"{op}: a distribution must have an element; got shape {x.shape}. Leave this one out."
        )
    return moments(x.reshape(-1), 0)


def _shares(op: str, now: Any, before: Any, smoothing: float) -> tuple[Array, Array]:
    """The shares of the bins in two histograms."""
    p, q = (jnp.asarray(h).astype(jnp.float32) for h in (now, before))
    if not p.ndim or not q.ndim or p.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{op}: histograms must share their bins, on the last axis; got shapes {p.shape} and "
            f"{q.shape}. Count both between the same edges."
        )
    if smoothing < 0:
        raise ValueError(
            f"{op}: smoothing is added to counts and must not be negative; got {smoothing}. "
            "Use 0.5, or 0 where no bin is empty."
        )
    return _share(p + smoothing), _share(q + smoothing)


def _share(counts: Array) -> Array:
    return counts / jnp.maximum(counts.sum(-1, keepdims=True), jnp.finfo(counts.dtype).tiny)


def _log(share: Array) -> Array:
    return jnp.log(jnp.maximum(share, jnp.finfo(share.dtype).tiny))


def _standardized(op: str, x: Any, edges: Any, order: int) -> Array:
    if edges is None:
        m = _one(op, x)
        deviations, weights = jnp.asarray(x).reshape(-1).astype(m.mean.dtype) - m.mean, None
    else:
        counts, ends = jnp.asarray(x).astype(jnp.float32), np.asarray(edges, np.float32)
        if not counts.ndim or counts.shape[-1] != len(ends) + 1:
            raise ValueError(
                f"{op}: there must be one bin more than edges; got counts of shape {counts.shape} "
                f"and {len(ends)} edges. Pass the edges that the numbers were counted between."
            )
        middles = np.concatenate([ends[:1], (ends[1:] + ends[:-1]) / 2, ends[-1:]])
        weights = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
        deviations = middles - (weights * middles).sum(-1, keepdims=True)

    def mean(power):
        raised = deviations**power
        return raised.mean() if weights is None else (weights * raised).sum(-1)

    m2 = mean(2)
    standardized = mean(order) / jnp.where(m2 > 0, m2, 1) ** (order / 2)
    return jnp.where(m2 > 0, standardized - (3 if order == 4 else 0), 0)
