"""The public functions, each beside a plain formula that autodiff can differentiate.

The plain formulas are what a reader of the papers would write: two passes, no shift, no mask
beyond a weighted mean. They are right for well-conditioned data, which is all they are used on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

import jaxnorm
from jaxnorm.kernels.dispatch import interpreted


def _plain(x, axes, epsilon, scale=None, bias=None, mask=None, centered=True):
    weight = (
        jnp.ones_like(x, jnp.finfo(x.dtype).dtype)
        if mask is None
        else jnp.broadcast_to(mask, x.shape).astype(jnp.finfo(x.dtype).dtype)
    )
    n = weight.sum(axes, keepdims=True)
    mean = (x * weight).sum(axes, keepdims=True) / n if centered else 0
    d = x - mean
    var = ((d * jnp.conj(d)).real * weight).sum(axes, keepdims=True) / n
    y = d / jnp.sqrt(var + epsilon)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _plain_group(x, scale, bias, mask=None):
    split = (*x.shape[:-1], 2, x.shape[-1] // 2)
    mask = None if mask is None else jnp.broadcast_to(mask, x.shape).reshape(split)
    y = _plain(x.reshape(split), (1, -1), 1e-6, mask=mask)
    return y.reshape(x.shape) * scale + bias


@dataclass(frozen=True)
class Case:
    """A function of (x, scale, bias), its plain twin, and the shape of x."""

    name: str
    function: Callable
    plain: Callable
    has_bias: bool = True
    shape: tuple[int, ...] = (4, 3, 6)

    def arguments(self, seed: int = 0, dtype=jnp.float32):
        """x, scale and bias, well conditioned."""
        rng = np.random.default_rng(seed)
        features = self.shape[-1]
        x = rng.normal(size=self.shape) * 1.5 + 0.5
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.normal(size=self.shape)
        scale, bias = rng.normal(size=(2, features)) * 0.3 + 1
        return tuple(jnp.asarray(a, dtype) for a in (x, scale, bias))


def _batch(x, scale, bias, mask=None, **options):
    stats = jaxnorm.init_batch_stats(
        x.shape[-1], jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    )
    return jaxnorm.batch_norm(x, scale, bias, stats, training=True, mask=mask, **options)[0]


_MEAN, _VAR = np.linspace(-0.5, 1, 6, dtype="f"), np.linspace(0.5, 2, 6, dtype="f")


def _batch_eval(x, scale, bias, **options):
    stats = jaxnorm.BatchStats(jnp.asarray(_MEAN), jnp.asarray(_VAR), jnp.asarray(3))
    return jaxnorm.batch_norm(x, scale, bias, stats, training=False, **options)[0]


BATCH = Case("batch_norm", _batch, lambda x, s, b, mask=None: _plain(x, (0, 1), 1e-5, s, b, mask))
BATCH_EVAL = Case(
    "batch_norm_eval",
    _batch_eval,
    lambda x, s, b: (x - _MEAN.astype(x.dtype)) / np.sqrt(_VAR + 1e-5).astype(x.dtype) * s + b,
)
LAYER = Case(
    "layer_norm",
    jaxnorm.layer_norm,
    lambda x, s, b, mask=None: _plain(x, -1, 1e-6, s, b, mask),
)
RMS = Case(
    "rms_norm",
    lambda x, s, b, **o: jaxnorm.rms_norm(x, s, **o),
    lambda x, s, b, mask=None: _plain(x, -1, 1e-6, s, None, mask, centered=False),
    has_bias=False,
)
GROUP = Case(
    "group_norm",
    lambda x, s, b, **o: jaxnorm.group_norm(x, s, b, num_groups=2, **o),
    _plain_group,
)
INSTANCE = Case(
    "instance_norm",
    jaxnorm.instance_norm,
    lambda x, s, b, mask=None: _plain(x, 1, 1e-6, s, b, mask),
)
WEIGHT = Case(
    "standardize_weight",
    lambda x, s, b: jaxnorm.standardize_weight(x, s),
    lambda x, s, b: _plain(x, (0, 1), 1e-5, s),
    has_bias=False,
)


def _flat(outputs):
    """Both results of a sum and its norm as one array."""
    y, total = outputs
    return y + 0.5 * total.astype(y.dtype)


def _other(x):
    """A residual made from `x`, so that the sum depends on it in more than one way."""
    return jnp.flip(x, 1) * 0.7


def _sampled(parameter, x):
    """A scale or bias for each example: the parameter and something of its own."""
    return parameter[None, None] + x.mean(1, keepdims=True).astype(parameter.dtype) * 0.5


ADD_RMS = Case(
    "add_rms_norm_from_output",
    lambda x, s, b, **o: _flat(
        jaxnorm.add_rms_norm(x, _other(x), s, scale_offset=1.0, save="output", **o)
    ),
    lambda x, s, b: _flat((RMS.plain(x + _other(x), 1 + s, b), x + _other(x))),
    has_bias=False,
)
ACTIVATED = Case(
    "batch_norm_softplus",
    # Not one of JAX's own functions, which are traced once.
    lambda x, s, b, **o: _batch(x, s, b, activation=lambda v: jax.nn.softplus(v * 2), **o),
    lambda x, s, b: jax.nn.softplus(BATCH.plain(x, s, b) * 2),
)
SAMPLED = Case(
    "layer_norm_per_sample",
    lambda x, s, b, **o: jaxnorm.layer_norm(
        x, _sampled(s, x), _sampled(b, x), scale_offset=1.0, **o
    ),
    lambda x, s, b: LAYER.plain(x, 1 + _sampled(s, x), _sampled(b, x)),
)
FROM_OUTPUT = Case(
    "layer_norm_from_output",
    lambda x, s, b, **o: jaxnorm.layer_norm(x, s, b, save="output", **o),
    LAYER.plain,
)


def in_kernels(function: Callable) -> Callable:
    """The same function, computed by kernels, which Pallas interprets."""

    def run(*arguments, **options):
        with interpreted():
            return function(*arguments, implementation="pallas", **options)

    return run


KERNELS = (
    Case(
        "add_layer_norm_kernel",
        in_kernels(
            lambda x, s, b, **o: _flat(
                jaxnorm.add_layer_norm(x, _other(x), _sampled(s, x), b, activation=jax.nn.silu, **o)
            )
        ),
        lambda x, s, b: _flat(
            (jax.nn.silu(LAYER.plain(x + _other(x), _sampled(s, x), b)), x + _other(x))
        ),
    ),
)
FUSED = (ADD_RMS, ACTIVATED, SAMPLED)
CASES = (BATCH, BATCH_EVAL, LAYER, RMS, GROUP, INSTANCE, *FUSED, *KERNELS, WEIGHT)
MASKED = (BATCH, LAYER, RMS, GROUP, INSTANCE)


def equations(jaxpr):
    """Every equation of a traced program, those of its branches, loops and functions too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def cotangent(shape, seed: int = 7, dtype=jnp.float32) -> jax.Array:
    """A random cotangent: with `sum(y)` the true gradient is zero and would prove nothing."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        value = value + 1j * rng.normal(size=shape)
    return jnp.asarray(value, dtype)


def name_of(part):
    """A part of a test's name that is the same in every process: options by name, not by value."""
    return "+".join(sorted(part)) or "defaults" if isinstance(part, dict) else str(part)
