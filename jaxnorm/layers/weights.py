"""Layers that normalize weights: their new fields, their checks, and the calls.

In the functions, `layer` is a Linen or NNX layer, of which only fields are read.
"""

from typing import Any

import jax
from jaxtyping import Array

from jaxnorm import functional
from jaxnorm.core import arguments as check
from jaxnorm.core import reparameterize
from jaxnorm.core.moments import wide_dtype
from jaxnorm.layers.norms import fields


@fields
class KernelFields:
    """Fields that jaxnorm's linear and convolutional layers add to Flax's.

    Attributes:
        weight_standardization: standardize each output's weights before use, see
            `jaxnorm.standardize_weight`. Off, the layer is Flax's.
        use_gain: multiply them by a learned `gain`, one for each output (a new parameter).
        gain_init: initializer of the gain. For activations of unit variance without another
            normalization: the constant ``1 / sqrt(fan_in)``.
        weight_epsilon: epsilon of the standardization.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm.linen as jnn
        >>> layer = jnn.Dense(2, weight_standardization=True, use_gain=True)
        >>> layer.init(jax.random.key(0), jnp.ones((1, 8)))["params"]["gain"].shape
        (2,)
    """

    weight_standardization: bool = False
    use_gain: bool = False
    gain_init: Any = jax.nn.initializers.ones
    weight_epsilon: float = 1e-5


def check_kernel_fields(layer) -> None:
    """Raise a ValueError where fields of `KernelFields` exclude each other."""
    name, mask = type(layer).__name__, getattr(layer, "mask", None)
    if layer.use_gain and not layer.weight_standardization:
        raise ValueError(
            f"{name}: a gain belongs to a standardized kernel; got use_gain=True with "
            "weight_standardization=False. Set weight_standardization=True, or leave out the gain."
        )
    if layer.weight_standardization and mask is not None:
        raise ValueError(
            f"{name}: a masked kernel cannot be standardized, since its zeros would enter the "
            "statistics; got mask with weight_standardization=True. Leave out one of the two."
        )


def standardized(layer, kernel, gain) -> Array:
    """Kernel that a layer with `KernelFields` computes with."""
    return functional.standardize_weight(kernel, gain, epsilon=layer.weight_epsilon)


def is_spectral(layer, kernel) -> bool:
    """True for a parameter that a `SpectralNorm` normalizes: not for vectors and scalars."""
    if kernel.ndim > 2 and layer.error_on_non_matrix:
        raise ValueError(
            f"SpectralNorm: parameters must have at most two axes; got shape {kernel.shape}. Input "
            f"is {kernel.ndim}D but error_on_non_matrix is True: set it to False to normalize the "
            f"matrix of shape (-1, {kernel.shape[-1]})."
        )
    return kernel.ndim > 1 and layer.n_steps > 0


def stored_dtype(param_dtype):
    """The dtype of what a `SpectralNorm` stores between steps: float32 at least."""
    return wide_dtype(param_dtype)


def spectral_norm(layer, kernel, u) -> tuple[Array, Array, Array]:
    """Normalize `kernel` by its spectral norm, as a `SpectralNorm` layer says.

    Args:
        layer: has the fields of Flax's.
        kernel: a parameter of the wrapped layer, for which `is_spectral` is true.
        u: (1, kernel.shape[-1]), where power iteration starts.

    Returns:
        The normalized kernel, in the layer's `dtype` or what `kernel` and `u` promote to; and the
        next `u` and `sigma`, in the dtypes in which they are stored.
    """
    if kernel.dtype.kind == "c" and u.dtype.kind != "c":
        raise TypeError(
            f"SpectralNorm: the singular vectors of a complex kernel are complex; got "
            f"kernel.dtype={kernel.dtype} with u.dtype={u.dtype}. Construct the layer with "
            "param_dtype=jnp.complex64."
        )
    epsilon = check.number("SpectralNorm", "epsilon", layer.epsilon, 0.0, float("inf"), "1e-12")
    normalized, new, sigma = reparameterize.spectral_norm(
        kernel, u, steps=layer.n_steps, epsilon=epsilon
    )
    dtype = check.result_dtype("SpectralNorm", kernel, u, dtype=layer.dtype)
    return (
        normalized.astype(dtype),
        new.astype(u.dtype),
        sigma.astype(stored_dtype(layer.param_dtype)),
    )


def scale_shape(layer, kernel) -> tuple[int, ...]:
    """The shape of a `WeightNorm` layer's scale for one parameter of the wrapped layer."""
    return tuple(kernel.shape[a] for a in _features(layer, kernel))


def weight_norm(layer, kernel, scale) -> Array:
    """Normalize `kernel` by its lengths, as a `WeightNorm` layer says.

    Args:
        layer: has the fields of Flax's.
        kernel: a parameter of the wrapped layer.
        scale: of the shape `scale_shape`, or None.

    Returns:
        The normalized kernel, in the layer's `dtype` or what `kernel` and `scale` promote to.
    """
    epsilon = check.number("WeightNorm", "epsilon", layer.epsilon, 0.0, float("inf"), "1e-12")
    features = _features(layer, kernel)
    normalized = reparameterize.weight_norm(kernel, scale, features=features, epsilon=epsilon)
    return normalized.astype(check.result_dtype("WeightNorm", kernel, scale, dtype=layer.dtype))


def of_parameter(layer, variables, path: tuple):
    """The variable that an NNX layer keeps for a parameter of the wrapped layer."""
    if path not in variables:
        raise ValueError(
            f"{type(layer).__name__}: the wrapped layer must keep the parameters it was wrapped "
            f"with; got another one, which has no variable {path} beside {sorted(variables)}. Wrap "
            "the layer when it has all its parameters."
        )
    return variables[path]


def _features(layer, kernel) -> tuple[int, ...]:
    """The axes of `kernel` for each index of which there is one length."""
    axes = layer.feature_axes
    # Flax's NNX layer keeps () for None.
    if axes is None or axes == ():
        return ()
    return check.axes("WeightNorm", "feature_axes", axes, kernel)
