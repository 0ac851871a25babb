"""NNX layers around a layer whose parameters they normalize before it uses them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn import dtypes
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn

from jaxnorm.layers import weights
from jaxnorm.nnx.replace import with_arrays
from jaxnorm.nnx.signature import Signed

KERNELS = nnx.PathContains("kernel")


class SpectralNorm(Signed, nnx.SpectralNorm):
    r"""`flax.nnx.SpectralNorm` that leaves the wrapped layer's parameters as they are.

    .. math::
        \bar W = W / \sigma, \quad \sigma = v W u^T, \quad
        v \leftarrow u W^T / |u W^T|, \quad u \leftarrow v W / |v W|

    for each parameter W of the wrapped layer with at least two axes, as a matrix from all its axes
    but the last to the last. Of a convolution that is not the norm of the operator on images.
    :math:`\sigma` approaches the largest singular value from below, by `n_steps` each call, and
    each continues from the stored u while `update_stats` is on, as in `train()`; `eval()` turns it
    off. Gradients take u and v as constants.

    Constructor and variables are Flax's, with these differences: Flax writes the normalized
    parameters over the parameters, so an optimizer never sees W, and `dtype` rounds it for good.
    Here W is kept, as in `flax.linen` and in the paper. A kernel whose norm is below 1e-6 or above
    1e19 is normalized too; u and sigma keep their dtype; `epsilon` counts relative to the largest
    weight. As in Flax, a parameter that is zero at the first update of u is left as it is from then
    on.

    The variables in `batch_stats` are (*path, "u"), of shape (1, out), and (*path, "sigma"), of
    shape (), in `param_dtype`, in float32 at least.

    Raises:
        TypeError: a complex parameter, with a `param_dtype` that is not.
        ValueError: `error_on_non_matrix` and a parameter of more than two axes, a negative
            `epsilon`, a parameter that the wrapped layer did not have at first.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018,
    equation (8) and algorithm 1; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = jnn.SpectralNorm(jnn.Linear(2, 2, rngs=rngs), n_steps=20, rngs=rngs)
        >>> layer.layer_instance.kernel[...] = jnp.array([[2.0, 0.0], [0.0, 4.0]])
        >>> print(layer(jnp.eye(2)).round(3), layer.layer_instance.kernel[...].max())
        [[0.5 0. ] [0. 1. ]] 4.0
    """

    def __init__(
        self, layer_instance: nnx.Module, *, n_steps: int = 1, epsilon: float = 1e-12,
        dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32,
        error_on_non_matrix: bool = False, update_stats: bool = True, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        super().__init__(
            layer_instance, n_steps=n_steps, epsilon=epsilon, dtype=dtype,
            param_dtype=weights.stored_dtype(param_dtype), update_stats=update_stats, rngs=rngs,
        )  # fmt: skip
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        for param in jax.tree.leaves(nnx.state(layer_instance, nnx.Param)):
            weights.is_spectral(self, param)  # an error, where one is asked for

    def __call__(self, x, update_stats: bool | None = None) -> Any:
        """Result of the wrapped layer with normalized parameters.

        Args:
            x: the argument of the wrapped layer.
            update_stats: store u and sigma; None: as `train()` and `eval()` say.
        """
        if update_stats is None:
            update_stats = not self.use_running_average
        normal = {}
        for path, param in nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param)):
            kernel = param[...]
            if not weights.is_spectral(self, kernel):
                continue
            u = weights.of_parameter(self, self.batch_stats, (*path, "u"))
            normal[path], new_u, sigma = weights.spectral_norm(self, kernel, u[...])
            if update_stats:
                u[...], self.batch_stats[(*path, "sigma")][...] = new_u, sigma
        return with_arrays(self.layer_instance, normal)(x)  # type: ignore[operator]


class WeightNorm(Signed, nnx.WeightNorm):
    r"""`flax.nnx.WeightNorm` that leaves the wrapped layer's parameters as they are.

    .. math::
        \bar w = g \frac{v}{\sqrt{|v|^2 + \epsilon}}

    for each parameter v of the wrapped layer that `variable_filter` selects, with one length for
    each index of its `feature_axes`. g is in `scales`, of the shape of these axes, one `nnx.Param`
    for the path of each parameter.

    Constructor and variables are Flax's, with these differences: Flax writes the normalized
    parameters over the parameters, so an optimizer never sees v. Here v is kept, as in
    `flax.linen` and in the paper. g is a parameter, which Flax has since 0.12.12 (before, nothing
    trained it); it is created in `param_dtype`, and `scale_init` may be random. Lengths are
    computed of scaled numbers and in float32 at least.

    Raises:
        ValueError: `feature_axes` that a parameter does not have, a negative `epsilon`, a
            parameter that the wrapped layer did not have at first.

    Source: Salimans & Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
    Training of Deep Neural Networks", 2016, equation (2); arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = jnn.WeightNorm(jnn.Linear(2, 1, rngs=rngs), rngs=rngs)
        >>> layer.layer_instance.kernel[...] = jnp.array([[3.0], [4.0]])
        >>> print(layer(jnp.eye(2)).round(3), layer.layer_instance.kernel[...].max())
        [[0.6] [0.8]] 4.0
    """

    def __init__(
        self, layer_instance: nnx.Module, *, feature_axes: Axes | None = -1,
        use_scale: bool = True, scale_init: Initializer = initializers.ones,
        epsilon: float = 1e-12, dtype: Dtype | None = None, param_dtype: Dtype = jnp.float32,
        variable_filter: nnx.filterlib.Filter = KERNELS,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        super().__init__(
            layer_instance, feature_axes=feature_axes, use_scale=False, scale_init=scale_init,
            epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            variable_filter=variable_filter, promote_dtype=promote_dtype, rngs=rngs,
        )  # fmt: skip
        self.use_scale = use_scale
        if use_scale:
            scales = {}
            for path, v in self._selected():
                shape = weights.scale_shape(self, v)
                scales[path] = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
            self.scales = nnx.data(scales)

    def __call__(self, x, *args, **kwargs) -> Any:
        """Result of the wrapped layer with normalized parameters; arguments are those it takes."""
        normal = {}
        for path, v in self._selected():
            scale = weights.of_parameter(self, self.scales, path)[...] if self.use_scale else None
            normal[path] = weights.weight_norm(self, v, scale)
        return with_arrays(self.layer_instance, normal)(x, *args, **kwargs)  # type: ignore[operator]

    def _selected(self):
        """Paths and arrays of the parameters that are normalized."""
        for path, param in nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param)):
            if self.variable_filter(path, param):
                yield path, param[...]
