"""Linen layers around a layer whose parameters they normalize before it uses them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, keystr, tree_map_with_path

from jaxnorm.layers import weights


class SpectralNorm(nn.SpectralNorm):
    r"""`flax.linen.SpectralNorm`, for kernels of any scale and with all variables mutable.

    .. math::
        \bar W = W / \sigma, \quad \sigma = v W u^T, \quad
        v \leftarrow u W^T / |u W^T|, \quad u \leftarrow v W / |v W|

    for each parameter W of the wrapped layer with at least two axes, as a matrix from all its axes
    but the last to the last. Of a convolution that is not the norm of the operator on images.
    :math:`\sigma` approaches the largest singular value from below, by `n_steps` each call, and
    each continues from the stored u when `update_stats` is on. Gradients take u and v as constants.

    Fields, variables and results are Flax's, with these differences: a kernel whose norm is below
    1e-6 or above 1e19 is normalized too (Flax's result explodes, or is the kernel itself); only
    parameters are normalized; ``mutable=True`` does not store the normalized ones in their place;
    `dtype` does not round them; u and sigma keep their dtype; `epsilon` counts relative to the
    largest weight. As in Flax, `init` gives normalized parameters, and a parameter that is zero at
    the first update of u, as biases of attention are, is left as it is from then on.

    The variables of `collection_name` are `<layer>/<parameter>/u`, (1, out), and
    `<layer>/<parameter>/sigma`, (), in `param_dtype`, in float32 at least.

    Raises:
        TypeError: a complex parameter, with a `param_dtype` that is not.
        ValueError: `error_on_non_matrix` and a parameter of more than two axes, a negative
            `epsilon`.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018,
    equation (8) and algorithm 1; fields as in Flax.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.SpectralNorm(nn.Dense(2, use_bias=False), n_steps=20)
        >>> x = jnp.eye(2)
        >>> variables = layer.init(jax.random.key(0), x, update_stats=False)
        >>> kernel = jnp.array([[2.0, 0.0], [0.0, 4.0]])
        >>> variables["params"] = {"layer_instance": {"kernel": kernel}}
        >>> print(layer.apply(variables, x, update_stats=False).round(3))
        [[0.5 0. ] [0. 1. ]]
    """

    @nn.compact
    def __call__(self, *args, update_stats: bool, **kwargs):
        """Result of the wrapped layer with normalized parameters.

        Args:
            *args: arguments of the wrapped layer.
            update_stats: store u and sigma, as in training.
            **kwargs: arguments of the wrapped layer.
        """

        def normalized(path, kernel):
            if not weights.is_spectral(self, kernel):
                return kernel
            keys = (key.key for key in path[1:] if isinstance(key, DictKey))
            name = "/".join((str(self.layer_instance.name), *keys))
            collection, dtype = self.collection_name, weights.stored_dtype(self.param_dtype)
            shape = (1, kernel.shape[-1])
            u = self.variable(collection, f"{name}/u", self._random, shape, dtype)
            sigma = self.variable(collection, f"{name}/sigma", jnp.ones, (), dtype)
            normal, new_u, new_sigma = weights.spectral_norm(self, kernel, u.value)
            if update_stats:
                u.value, sigma.value = new_u, new_sigma
            return normal

        return _with_params(self, normalized, args, kwargs)

    def _random(self, shape: tuple[int, ...], dtype):
        """A vector from which power iteration starts."""
        return jax.random.normal(self.make_rng("params"), shape, dtype)


class WeightNorm(nn.WeightNorm):
    r"""`flax.linen.WeightNorm`, for kernels of any scale and dtype.

    .. math::
        \bar w = g \frac{v}{\sqrt{|v|^2 + \epsilon}}

    for each parameter v of the wrapped layer that `variable_filter` names, with one length for
    each index of its `feature_axes`. g is the parameter `<layer>/<parameter>/scale`, of the shape
    of these axes.

    Fields, variables and results are Flax's, with these differences: lengths are computed of
    scaled numbers and in float32 at least, so a kernel of 1e20 is normalized (Flax gives zeros),
    one of zeros in float16 gives zeros (Flax gives NaN), and the length of one in bfloat16 has more
    than two digits; `dtype` does not round the parameters; only parameters are normalized, and a
    wrapped layer can update its statistics (Flax normalizes running statistics too, with
    ``variable_filter=None``). As in Flax, `init` gives normalized parameters.

    Raises:
        ValueError: `feature_axes` that a parameter does not have, a negative `epsilon`.

    Source: Salimans & Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
    Training of Deep Neural Networks", 2016, equation (2); fields as in Flax.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.WeightNorm(nn.Dense(1, use_bias=False))
        >>> x = jnp.eye(2)
        >>> variables = layer.init(jax.random.key(0), x)
        >>> variables["params"]["layer_instance"] = {"kernel": jnp.array([[3.0], [4.0]])}
        >>> print(layer.apply(variables, x).round(3))
        [[0.6] [0.8]]
    """

    @nn.compact
    def __call__(self, *args, **kwargs):
        """Result of the wrapped layer with normalized parameters; arguments are those it takes."""

        def normalized(path, kernel):
            name = f"{self.layer_instance.name}/{keystr(path[1:], simple=True, separator='/')}"
            if self.variable_filter and not any(part in name for part in self.variable_filter):
                return kernel
            scale = None
            if self.use_scale:
                shape = weights.scale_shape(self, kernel)
                scale = self.param(f"{name}/scale", self.scale_init, shape, self.param_dtype)
            return weights.weight_norm(self, kernel, scale)

        return _with_params(self, normalized, args, kwargs)


def _with_params(module: nn.SpectralNorm | nn.WeightNorm, change, args, kwargs):
    """Result of the wrapped layer with its parameters changed for this call."""
    initializing = module.is_initializing()

    def changed(path, param):
        new = change(path, jnp.asarray(param))
        # As in Flax, these are the initial parameters then, but in the dtype that was asked for.
        return new.astype(param.dtype) if initializing else new

    # Of the other collections, which Flax maps too, nothing is a parameter.
    return nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        "params",
        trans_in_fn=lambda params: tree_map_with_path(changed, params),
        init=initializing,
    )(module.layer_instance)
