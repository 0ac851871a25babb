"""The two networks of the studies, which differ in nothing but their normalization.

`NORMALIZATIONS` defines the construction that belongs to each name.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

import jaxnorm.linen as jnn

Initializer: TypeAlias = nn.initializers.Initializer

# Standard deviation of the nonlinearity of a standard normal variable (Brock et al. 2021, eq. 3).
# After a division by it, the output of a standardized kernel has the variance of its input.
SIGMOID_DEVIATION = 0.2083
RELU_DEVIATION = math.sqrt((1 - 1 / math.pi) / 2)


class Normalization(NamedTuple):
    """The construction of one normalization of the tables."""

    layer: Callable[[bool, int], nn.Module] | None  # (training, features) -> layer; None: no layer
    shifts: bool = True  # the layer has a bias, so that a bias of the kernel would do nothing
    standardized: bool = False  # the kernel is standardized instead of the activations
    spatial: bool = False  # averages over pixels, and an MLP has none


NORMALIZATIONS = {
    "none": Normalization(None, shifts=False),
    "batch": Normalization(
        # The runs are short, so running statistics average over about ten steps.
        lambda training, _: jnn.BatchNorm(use_running_average=not training, momentum=0.9),
    ),
    "layer": Normalization(lambda training, _: jnn.LayerNorm()),
    "group": Normalization(lambda training, features: jnn.GroupNorm(math.gcd(4, features))),
    "instance": Normalization(lambda training, _: jnn.InstanceNorm(), spatial=True),
    "rms": Normalization(lambda training, _: jnn.RMSNorm(), shifts=False),
    "weight": Normalization(None, shifts=False, standardized=True),
}


class DeepMLP(nn.Module):
    """A network of dense sigmoid layers, a deeper form of Ioffe & Szegedy (2015, section 4.1).

    Their first experiment has three hidden layers of 100 units. With four layers a network without
    normalization still learns, but slowly. With five it does not learn in the time of a demo.
    """

    normalization: str
    classes: int
    features: int = 100
    depth: int = 4
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, images: jax.Array, training: bool) -> jax.Array:
        """Logits (count, classes) of images (count, rows, columns, channels)."""
        choice = NORMALIZATIONS[self.normalization]
        x = images.reshape(len(images), -1)
        for index in range(self.depth):
            x = jnn.Dense(
                self.features,
                use_bias=not choice.shifts,
                kernel_init=self.kernel_init,
                weight_standardization=choice.standardized,
                use_gain=choice.standardized,
            )(x) * _unit_scale(choice, x.shape[-1], SIGMOID_DEVIATION if index else 1.0)
            x = _normalize(choice, x, training)
            x = nn.sigmoid(x)
        return nn.Dense(self.classes, kernel_init=self.kernel_init)(x)


class SmallConvNet(nn.Module):
    """A network of 3x3 convolutions with ReLU, an average over all pixels, and one dense layer.

    The first convolution has a stride of two if images are larger than 16 pixels.
    """

    normalization: str
    classes: int
    features: int = 16
    depth: int = 4
    kernel_init: Initializer = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, images: jax.Array, training: bool) -> jax.Array:
        """Logits (count, classes) of images (count, rows, columns, channels)."""
        choice = NORMALIZATIONS[self.normalization]
        large = max(images.shape[1:3]) > 16
        x = images
        for index in range(self.depth):
            stride = 2 if index == 1 or (index == 0 and large) else 1
            x = jnn.Conv(
                self.features,
                (3, 3),
                (stride, stride),
                use_bias=not choice.shifts,
                kernel_init=self.kernel_init,
                conv_general_dilated=convolve_patches,
                weight_standardization=choice.standardized,
                use_gain=choice.standardized,
            )(x) * _unit_scale(choice, 9 * x.shape[-1], RELU_DEVIATION if index else 1.0)
            x = _normalize(choice, x, training)
            x = nn.relu(x)
        return nn.Dense(self.classes, kernel_init=self.kernel_init)(x.mean((1, 2)))


NETWORKS: dict[str, type[DeepMLP] | type[SmallConvNet]] = {"mlp": DeepMLP, "conv": SmallConvNet}


def is_applicable(network: str, normalization: str) -> bool:
    """True if a network has the axes that a normalization averages over.

    Example:
        >>> is_applicable("mlp", "instance"), is_applicable("conv", "instance")
        (False, True)
    """
    return network != "mlp" or not NORMALIZATIONS[normalization].spatial


def build_network(network: str, normalization: str, classes: int) -> DeepMLP | SmallConvNet:
    """Build the network of one name with the normalization of another.

    Args:
        network: a key of `NETWORKS`.
        normalization: a key of `NORMALIZATIONS`.
        classes: the number of logits per image.

    Returns:
        A Linen module, called as `(images, training)`.

    Raises:
        ValueError: a name is unknown, or the network lacks the axes of the normalization.
    """
    for name, known, what in (
        (network, NETWORKS, "network"),
        (normalization, NORMALIZATIONS, "normalization"),
    ):
        if name not in known:
            raise ValueError(
                f"build_network: {what} must be one of {', '.join(known)}; got {name!r}. "
                "Use one of these names."
            )
    if not is_applicable(network, normalization):
        raise ValueError(
            f"build_network: {normalization!r} averages over pixels; got network={network!r}, "
            "which has none. Use the convolutional net."
        )
    return NETWORKS[network](normalization, classes)


def draw_kernels(params: Any, seeds: Sequence[int]) -> Any:
    """Fill the kernels of a sweep's parameters with normal numbers of variance 1 or 2 / fan-in.

    The same seed gives the same kernels under every normalization and learning rate, so that
    comparisons are paired. The kernels are drawn on the host. A vmapped draw would take XLA half a
    second of compilation for each kernel of each network, which is 40 s of a demo of 60 s.

    Args:
        params: the parameters of `create_sweep_state`, with a leading axis of members on every
            leaf.
        seeds: one seed for each member.

    Returns:
        The same tree with new values in every leaf called "kernel". The variance is 2 / fan-in, for
        ReLU, in a convolution, and 1 / fan-in elsewhere. Other leaves are unchanged.

    Example:
        >>> drawn = draw_kernels({"Dense_0": {"kernel": jnp.zeros((2, 4, 3))}}, [7, 7])
        >>> bool((drawn["Dense_0"]["kernel"][0] == drawn["Dense_0"]["kernel"][1]).all())
        True
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    filled = []
    kernels = 0
    for path, leaf in leaves:
        if jax.tree_util.keystr(path[-1:], simple=True) == "kernel":
            shape = leaf.shape[1:]
            deviation = math.sqrt((2 if len(shape) == 4 else 1) / math.prod(shape[:-1]))
            draws = {
                seed: np.random.default_rng([seed, kernels]).normal(0.0, deviation, shape)
                for seed in set(seeds)
            }
            leaf = jnp.asarray(np.stack([draws[seed] for seed in seeds]), leaf.dtype)
            kernels += 1
        filled.append(leaf)
    return jax.tree_util.tree_unflatten(structure, filled)


def _unit_scale(choice: Normalization, fan_in: int, deviation: float) -> float:
    """A factor that brings a standardized kernel's output to unit variance (Brock et al. 2021)."""
    return 1 / (deviation * math.sqrt(fan_in)) if choice.standardized else 1.0


def _normalize(choice: Normalization, x: jax.Array, training: bool) -> jax.Array:
    return x if choice.layer is None else choice.layer(training, x.shape[-1])(x)


def convolve_patches(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    **unused: object,
) -> jax.Array:
    """Convolve images with a kernel, as a product of patches with a matrix.

    Under `vmap` over kernels a convolution becomes a grouped one. XLA has no fast code for it on
    the CPU: it is 14 times slower than this function, measured on 18 of these networks at once.

    Args:
        inputs: (count, rows, columns, channels).
        kernel: (kernel rows, kernel columns, channels, features).
        strides: the strides of the rows and the columns.
        padding: the padding, in the form that `lax.conv_general_dilated` takes.
        unused: other arguments that Flax's layer passes, at their defaults.

    Returns:
        (count, new rows, new columns, features).
    """
    rows, columns, channels, features = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:3], (rows, columns), strides, padding)
    x = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    height = (x.shape[1] - rows) // strides[0] * strides[0] + 1
    width = (x.shape[2] - columns) // strides[1] * strides[1] + 1
    # One axis after the other: six slices instead of nine, and a quarter less time to compile.
    x = jnp.concatenate([x[:, i : i + height : strides[0]] for i in range(rows)], -1)
    x = jnp.concatenate([x[:, :, i : i + width : strides[1]] for i in range(columns)], -1)
    return x @ kernel.transpose(1, 0, 2, 3).reshape(rows * columns * channels, features)
