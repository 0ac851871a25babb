"""The options of all stateless normalizations, checked, and the call they share."""

from collections.abc import Callable
from typing import Any, TypedDict

import jax
from jax.typing import ArrayLike

from jaxnorm.core import arguments as check
from jaxnorm.core import layer
from jaxnorm.core.arguments import Axes, Save
from jaxnorm.core.epilogue import Epilogue
from jaxnorm.core.measure import Measurement
from jaxnorm.core.slices import Slices
from jaxnorm.distributed.axes import AxisName, named_axis
from jaxnorm.kernels.dispatch import kernel_for

DType = jax.typing.DTypeLike


class LayerOptions(TypedDict, total=False):
    """The options of `layer_norm` and `rms_norm`, for functions that pass them on."""

    axis: Axes
    feature_axis: Axes | None
    epsilon: float
    scale_offset: float
    activation: Callable | None
    save: Save
    mask: ArrayLike | None
    axis_name: AxisName | None
    axis_index_groups: object
    dtype: DType | None
    implementation: str | None


def trailing_norm(
    op, x, scale, bias, *, axis: Axes = -1, feature_axis: Axes | None = None, centered=True,
    residual=None, **options,
) -> Any:  # fmt: skip
    """Normalize slices over `axis`, of `x` or of its sum with a residual, which is returned too.

    Both summands are checked already: they have one shape and dtype.
    """
    x = check.inexact(op, "x", x)
    reduced = check.axes(op, "axis", axis, x)
    features = reduced if feature_axis is None else check.axes(op, "feature_axis", feature_axis, x)
    return stateless_norm(
        op, x, scale, bias, reduced, features, centered=centered, residual=residual, **options
    )


def stateless_norm(
    op, x, scale, bias, reduced, features, *, epsilon=1e-6, scale_offset=0.0, activation=None,
    save="input", mask=None, axis_name=None, axis_index_groups=None, dtype=None,
    implementation=None, centered=True, blocks=None, residual=None,
) -> Any:  # fmt: skip
    """Normalize slices over the axes `reduced`; all arguments but `x` are checked here."""
    scale = check.modulation(op, "scale", scale, x, features)
    bias = check.modulation(op, "bias", bias, x, features)
    two_pass = check.implementation_of(op, implementation)
    check.not_empty(op, x, reduced if blocks is None else (*reduced, blocks[0]))
    epsilon = check.number(op, "epsilon", epsilon, 0.0, float("inf"), "1e-6")
    mask = check.mask_of(op, mask, x)
    replicas = named_axis(op, axis_name, axis_index_groups)
    save = check.save_of(op, save, activation=activation, axis_name=axis_name)
    epilogue = Epilogue(
        check.result_dtype(op, x, scale, bias, dtype=dtype),
        check.offset_of(op, scale_offset, scale),
        check.activation_of(op, activation),
    )
    options = {
        "measurement": Measurement(Slices(reduced, blocks, replicas), epsilon, centered, two_pass),
        "feature_axes": features,
        "mask": mask,
        "epilogue": epilogue,
        "save": save,
    }
    kernel = kernel_for(op, implementation, x, scale, bias, **options)
    if kernel is not None:
        results = kernel(x, residual)
        return results if residual is not None else results[0]
    if residual is not None:
        return layer.add_and_normalize_slices(x, residual, scale, bias, **options)
    return layer.normalize_slices(x, scale, bias, **options)
