"""NNX variables around the pure functions; no arithmetic lives here."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxnorm import functional
from jaxnorm.core import arguments as check
from jaxnorm.core.arguments import Save
from jaxnorm.core.moments import promoted
from jaxnorm.core.running import BatchStats, init_batch_stats
from jaxnorm.nnx.constructor import extends


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` around `jaxnorm.batch_norm`, same constructor and variables.

    Constructor, variables and behaviour are Flax's, with these differences: statistics are taken
    of shifted data; running statistics keep their dtype, are never rounded to that of `x`, and
    carry no gradient. `use_fast_variance=False` asks for the numbers of Flax's two-pass formula,
    see `implementation="two_pass"` of `jaxnorm.batch_norm`; the default is faster and more exact.

    Args:
        momentum: share of the old statistics that is kept; None: cumulative average.
        unbiased: keep the variance over n - 1 as running variance, as PyTorch does.
        debias: bias-corrected running statistics, see `jaxnorm.batch_norm`.
        virtual_batch_size: normalize over this many examples, whatever the number of devices; see
            `jaxnorm.batch_norm`.
        activation: an elementwise function of the result, see `jaxnorm.batch_norm`.
        implementation: "xla", or None to let jaxnorm choose; see `jaxnorm.batch_norm`.

    With `momentum=None` or `debias=True` there is one more variable, `count`, an
    `nnx.BatchStat`. For complex data give a complex `param_dtype`: then `mean` is complex too.

    Raises:
        ValueError: as `jaxnorm.batch_norm`; also if `use_running_average` is None both here and
            in the call.

    Source: Ioffe & Szegedy 2015; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0], [3.0]])).round(3).tolist(), layer.mean[...].round(3).tolist()
        ([[-1.0], [1.0]], [0.20000000298023224])
    """

    @extends(nnx.BatchNorm)
    def __init__(
        self,
        *args,
        unbiased: bool = False,
        debias: bool = False,
        virtual_batch_size: int | None = None,
        activation: Callable | None = None,
        implementation: str | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.unbiased = unbiased
        self.debias = debias
        self.virtual_batch_size = virtual_batch_size
        self.activation = activation
        self.implementation = implementation
        if jnp.issubdtype(self.param_dtype, jnp.complexfloating):
            # Of complex data the mean is complex, from the start.
            self.mean = nnx.BatchStat(self.mean[...].astype(jnp.complex64))
        if self.momentum is None or debias:
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
        """Normalize `x` and, in training, update the running statistics.

        Args:
            x: floating or complex array with `num_features` at `axis`.
            use_running_average: overrides the constructor's and `train()`, `eval()`.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "BatchNorm: whether to use the running statistics must be said; got "
                "use_running_average=None here and in the constructor. Pass True (evaluation) or "
                "False (training), or call model.train() or model.eval() first."
            )
        check.flag("BatchNorm", "use_running_average", use_running_average)
        mean, var = self.mean[...], self.var[...]
        x, *rest = _promoted(self, x, mean, var, *_parameters(self))
        scale, bias = rest[2:]
        dtype = self.dtype
        if dtype is None and self.promote_dtype is dtypes.promote_dtype:
            # By Flax's rule the statistics' dtypes count.
            dtype = promoted(x, *(a for a in rest if a is not None))
        counted = hasattr(self, "count")
        count = self.count[...] if counted else init_batch_stats(()).count
        y, new = functional.batch_norm(
            x,
            scale,
            bias,
            BatchStats(mean, var, count),
            training=not use_running_average,
            feature_axis=self.axis,
            decay=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            unbiased=self.unbiased,
            debias=self.debias,
            activation=self.activation,
            implementation=check.from_flax(self.use_fast_variance, self.implementation),
            dtype=dtype,
        )
        if not use_running_average:
            self.mean[...], self.var[...] = new.mean, new.var
            if counted:
                self.count[...] = new.count
        return y


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm` around `jaxnorm.layer_norm`, same constructor and variables.

    Args:
        activation: an elementwise function of the result, see `jaxnorm.layer_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.
        save: which array the backward pass keeps, "input" or "output", see `jaxnorm.layer_norm`.

    Raises:
        TypeError, ValueError: as `jaxnorm.layer_norm`; also if `scale` or `bias` is given to a
            layer that has its own.

    Source: Ba, Kiros & Hinton 2016; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> print(jnn.LayerNorm(3, rngs=nnx.Rngs(0))(jnp.array([1.0, 2.0, 3.0])).round(3))
        [-1.225  0.     1.225]
    """

    @extends(nnx.LayerNorm)
    def __init__(
        self,
        *args,
        activation: Callable | None = None,
        implementation: str | None = None,
        scale_offset: float = 0.0,
        save: Save = "input",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.implementation = implementation
        self.scale_offset = scale_offset
        self.save: Save = save

    def __call__(self, x, *, residual=None, scale=None, bias=None, mask=None) -> Any:
        """Normalize `x` over `reduction_axes`.

        Args:
            x: floating or complex array.
            residual: added to `x` before; then the result is a pair, the second the sum.
            scale, bias: of each sample, see `jaxnorm.layer_norm`; for a layer that has none.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        x, scale, bias = _promoted(self, x, *_parameters(self, scale, bias))
        options = {**_axes(self), **_options(self), "mask": mask}
        if residual is None:
            return functional.layer_norm(x, scale, bias, **options)
        return functional.add_layer_norm(x, residual, scale, bias, **options)


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm` around `jaxnorm.rms_norm`, same constructor and variables.

    Args:
        activation: an elementwise function of the result, see `jaxnorm.rms_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.
        save: which array the backward pass keeps, "input" or "output", see `jaxnorm.rms_norm`.

    Raises:
        TypeError, ValueError: as `jaxnorm.rms_norm`; also if `scale` is given to a layer that has
            its own.

    Source: Zhang & Sennrich 2019; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> y = jnn.RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([3.0, 4.0]))
        >>> [round(v, 3) for v in y.tolist()]
        [0.849, 1.131]
    """

    @extends(nnx.RMSNorm)
    def __init__(
        self,
        *args,
        activation: Callable | None = None,
        implementation: str | None = None,
        scale_offset: float = 0.0,
        save: Save = "input",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.implementation = implementation
        self.scale_offset = scale_offset
        self.save: Save = save

    def __call__(self, x, mask=None, *, residual=None, scale=None) -> Any:
        """Normalize `x` over `reduction_axes`.

        Args:
            x: floating or complex array.
            residual: added to `x` before; then the result is a pair, the second the sum.
            scale: of each sample, see `jaxnorm.layer_norm`; for a layer that has none of its own.
            mask: broadcasts to `x`; nonzero elements enter the mean square.
        """
        x, scale = _promoted(self, x, _parameter(self, "scale", scale))
        options = {**_axes(self), **_options(self), "mask": mask}
        if residual is None:
            return functional.rms_norm(x, scale, **options)
        return functional.add_rms_norm(x, residual, scale, **options)


class GroupNorm(nnx.GroupNorm):
    """`flax.nnx.GroupNorm` around `jaxnorm.group_norm`, same constructor and variables.

    Args:
        activation: an elementwise function of the result, see `jaxnorm.group_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.

    Raises:
        TypeError, ValueError: as `jaxnorm.group_norm`; also unless exactly one of `num_groups`
            and `group_size` is given, or if `scale` or `bias` is given to a layer that has its
            own.

    Source: Wu & He 2018; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> layer = jnn.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    @extends(nnx.GroupNorm)
    def __init__(
        self,
        *args,
        activation: Callable | None = None,
        implementation: str | None = None,
        scale_offset: float = 0.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.implementation = implementation
        self.scale_offset = scale_offset

    def __call__(self, x, *, scale=None, bias=None, mask=None):
        """Normalize each group of `x`.

        Args:
            x: floating or complex array.
            scale, bias: of each sample, see `jaxnorm.layer_norm`; for a layer that has none.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        x, scale, bias = _promoted(self, x, *_parameters(self, scale, bias))
        return functional.group_norm(
            x, scale, bias, num_groups=self.num_groups,
            axis=check.reduced_from(self.reduction_axes, x), mask=mask,
            **_options(self),
        )  # fmt: skip


class InstanceNorm(nnx.InstanceNorm):
    """`flax.nnx.InstanceNorm` around `jaxnorm.instance_norm`, same constructor and variables.

    Args:
        activation: an elementwise function of the result, see `jaxnorm.instance_norm`.
        implementation: "xla" or "pallas" to insist on one; None lets jaxnorm choose.
        scale_offset: added to `scale` in float32, for checkpoints that store gamma - 1.

    Raises:
        TypeError, ValueError: as `jaxnorm.instance_norm`; also if `scale` or `bias` is given to
            a layer that has its own.

    Source: Ulyanov, Vedaldi & Lempitsky 2016; arguments as in Flax.

    Example:
        >>> import jax.numpy as jnp, jaxnorm.nnx as jnn
        >>> from flax import nnx
        >>> x = jnp.array([[[1.0, 5.0], [3.0, 9.0]]])
        >>> jnn.InstanceNorm(2, rngs=nnx.Rngs(0))(x).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    @extends(nnx.InstanceNorm)
    def __init__(
        self,
        *args,
        activation: Callable | None = None,
        implementation: str | None = None,
        scale_offset: float = 0.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.implementation = implementation
        self.scale_offset = scale_offset

    def __call__(self, x, *, scale=None, bias=None, mask=None):
        """Normalize each feature of each example.

        Args:
            x: floating or complex array.
            scale, bias: of each sample, see `jaxnorm.layer_norm`; for a layer that has none.
            mask: broadcasts to `x`; nonzero elements enter the statistics.
        """
        x, scale, bias = _promoted(self, x, *_parameters(self, scale, bias))
        return functional.instance_norm(
            x, scale, bias, feature_axis=self.feature_axes, mask=mask, **_options(self)
        )  # fmt: skip


def _parameters(module, scale=None, bias=None):
    return _parameter(module, "scale", scale), _parameter(module, "bias", bias)


def _parameter(module, name: str, given=None):
    """The module's own, where it has one, or that given in the call."""
    own = getattr(module, name, None)
    check.one_of(type(module).__name__, name, own is not None, given)
    return given if own is None else own[...]


def _promoted(module, x, *others):
    """`x` and the other arrays, by the module's `promote_dtype`.

    Flax's default casts all of them to the result's dtype. Here only the result is: rounding `x`
    before its statistics are taken would cost digits, and widening it bytes kept for the backward
    pass. A `promote_dtype` of the user's own is called as Flax calls it, with the same arrays.
    """
    x = check.inexact(type(module).__name__, "x", x)
    if module.promote_dtype is dtypes.promote_dtype:
        return x, *others
    return module.promote_dtype((x, *others), dtype=module.dtype)


def _axes(module) -> dict:
    """Options that only layer and RMS normalization have."""
    return {
        "axis": module.reduction_axes,
        "feature_axis": module.feature_axes,
        "save": module.save,
    }


def _options(module) -> dict:
    return {
        "epsilon": module.epsilon,
        "scale_offset": module.scale_offset,
        "activation": module.activation,
        "dtype": module.dtype,
        "implementation": check.from_flax(module.use_fast_variance, module.implementation),
        "axis_name": module.axis_name,
        "axis_index_groups": module.axis_index_groups,
    }
