"""One normalization, several libraries: the same numbers in, the same quantities out.

A `Norm` says what is to be computed and knows its float64 oracle; a peer computes it. Flax and
jaxnorm are reached through the same Linen constructor call, so that only the module differs.
"""

import functools
import importlib.util
from dataclasses import dataclass, field
from types import ModuleType

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm.linen
from jaxnorm.testing import oracle

OUTPUTS = ("y", "dx", "dscale", "dbias")


@dataclass(frozen=True)
class Norm:
    """A normalization with features last."""

    name: str
    layer: str
    """The class in Flax's Linen and in jaxnorm's."""
    groups: int | None = None
    has_bias: bool = True

    @property
    def epsilon(self) -> float:
        """Flax's default."""
        return 1e-5 if self.name == "batch" else 1e-6

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of one slice; a group's slice has a part of the last one."""
        if self.name in ("layer", "rms"):
            return (ndim - 1,)
        spatial = tuple(range(1, ndim - 1))
        return {"batch": (0, *spatial), "group": (*spatial, ndim - 1), "instance": spatial}[
            self.name
        ]

    def exact(self, x, scale, bias, dy, mask=None) -> dict[str, np.ndarray]:
        """The float64 oracle's `y`, `dx`, `dscale` and `dbias`."""
        arguments = [x, scale, bias] if self.has_bias else [x, scale]
        options = {"mask": mask}
        if self.groups:
            options["num_groups"] = self.groups
        if self.name == "batch":
            features = x.shape[-1]
            arguments += [np.zeros(features), np.ones(features)]
            options["training"] = True
        function = getattr(oracle, f"{self.name}_norm")
        backward = getattr(oracle, f"{self.name}_norm_vjp")
        y = function(*arguments, **options)
        y = y[0] if self.name == "batch" else y
        return dict(zip(OUTPUTS, (y, *backward(dy, *arguments, **options))))


@dataclass(frozen=True)
class Linen:
    """Layers of a module with Flax's Linen interface."""

    name: str
    module: ModuleType
    options: dict = field(default_factory=dict)
    takes_masks = True

    def layer(self, norm: Norm, dtype):
        """The module, training, with results in `dtype`."""
        options = {**self.options, "dtype": dtype}
        if norm.name == "batch":
            options["use_running_average"] = False
        if norm.groups:
            options["num_groups"] = norm.groups
        return getattr(self.module, norm.layer)(**options)

    def function(self, norm: Norm, dtype):
        """A function of (parameters, x, mask=None) that returns y."""
        layer = self.layer(norm, dtype)

        def apply(parameters, x, mask=None):
            variables = {"params": parameters}
            if norm.name == "batch":
                stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
                variables["batch_stats"] = stats
            # What a training step returns beside y: the new statistics must not be dead code.
            y, state = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return y, state

        return apply

    @functools.cached_property
    def _compiled(self) -> dict:
        return {}

    def run(self, norm: Norm, x, scale, bias, dy, mask=None) -> dict[str, np.ndarray]:
        """`y`, `dx`, `dscale` and `dbias`, in NumPy."""
        key = (norm, x.dtype)
        if key not in self._compiled:
            function = self.function(norm, x.dtype)

            @jax.jit
            def both(parameters, x, dy, mask):
                y, back, _ = jax.vjp(lambda p, x: function(p, x, mask), parameters, x, has_aux=True)
                return y, back(dy)

            self._compiled[key] = both
        parameters = parameters_of(norm, scale, bias)
        y, (dparameters, dx) = self._compiled[key](parameters, x, dy, mask)
        found = (y, dx, dparameters["scale"], dparameters.get("bias"))
        return {k: np.asarray(v) for k, v in zip(OUTPUTS, found) if v is not None}


@dataclass(frozen=True)
class Torch:
    """PyTorch's functional normalizations, on the same memory, features last.

    PyTorch wants features second: batch, group and instance norm see a transposed view, which for
    images is its channels-last format.
    """

    name: str = "torch"
    takes_masks = False

    def function(self, norm: Norm):
        """A function of tensors (x, scale, bias) that returns y."""
        import torch.nn.functional as F  # noqa: N812

        eps = norm.epsilon

        def apply(x, scale, bias):
            if norm.name == "layer":
                return F.layer_norm(x, x.shape[-1:], scale, bias, eps)
            if norm.name == "rms":
                # Of its own dtype: it warns of any other.
                return F.rms_norm(x, x.shape[-1:], scale.to(x.dtype), eps)
            x = x.movedim(-1, 1)
            if norm.name == "batch":
                y = F.batch_norm(x, None, None, scale, bias, training=True, eps=eps)
            elif norm.name == "group":
                y = F.group_norm(x, norm.groups, scale, bias, eps)
            else:
                y = F.instance_norm(x, weight=scale, bias=bias, eps=eps)
            return y.movedim(1, -1)

        return apply

    def run(self, norm: Norm, x, scale, bias, dy, mask=None) -> dict[str, np.ndarray] | None:
        """`y`, `dx`, `dscale` and `dbias`, in NumPy; None where PyTorch has no such function."""
        import torch

        if mask is not None:
            return None
        dtype = getattr(torch, x.dtype.name)
        x, dy = to_torch(x, dtype), to_torch(dy, dtype)
        # In float32, as under autocast: with narrow parameters it stores narrow moments.
        scale, bias = to_torch(scale, torch.float32), to_torch(bias, torch.float32)
        inputs = [x, scale, bias] if norm.has_bias else [x, scale]
        for a in inputs:
            a.requires_grad_()
        y = self.function(norm)(x, scale, bias)
        found = (y, *torch.autograd.grad(y, inputs, dy))
        return {k: v.detach().float().numpy() for k, v in zip(OUTPUTS, found)}


def to_torch(a: np.ndarray, dtype):
    """A tensor with the numbers of `a`; NumPy's bfloat16 and PyTorch's meet in float32."""
    import torch

    return torch.tensor(a.astype(np.float32)).to(dtype)


def parameters_of(norm: Norm, scale, bias) -> dict:
    """Linen's parameter dictionary."""
    return {"scale": scale, "bias": bias} if norm.has_bias else {"scale": scale}


def has_torch() -> bool:
    """Whether the optional peer is installed."""
    return importlib.util.find_spec("torch") is not None


JAXNORM = Linen("jaxnorm", jaxnorm.linen)
FLAX = Linen("flax", flax.linen)
FLAX_TWO_PASS = Linen("flax two-pass", flax.linen, {"use_fast_variance": False})
TORCH = Torch()
PEERS = (JAXNORM, FLAX, FLAX_TWO_PASS, TORCH)


def named(names: tuple[str, ...]) -> tuple[Linen | Torch, ...]:
    """The peers of these names, in the order of the tables."""
    return tuple(p for p in PEERS if p.name in names)


def norms(groups: int) -> tuple[Norm, ...]:
    """All five, with that number of groups."""
    return (
        Norm("batch", "BatchNorm"),
        Norm("layer", "LayerNorm"),
        Norm("rms", "RMSNorm", has_bias=False),
        Norm("group", "GroupNorm", groups),
        Norm("instance", "InstanceNorm"),
    )
