"""One normalization in several libraries: the same numbers in, the same quantities out.

A `Norm` describes a computation and knows its float64 oracle; a peer computes it. Peers in JAX are
functions of (parameters, x) that return y and, for batch norm, the new statistics. PyTorch is in
`benchmarks.pytorch`.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxnorm
import jaxnorm.linen
from benchmarks.pytorch import TORCH, TORCH_COMPILED, Torch
from jaxnorm.testing import oracle

OUTPUTS = ("y", "dx", "dscale", "dbias")
# Values of `implementation` of the pure functions. Each is a peer of its own where a kernel may be
# chosen.
IMPLEMENTATIONS = ("xla", "pallas")


@dataclass(frozen=True)
class Norm:
    """A normalization of an array with features last."""

    name: str
    layer: str
    """The class in Flax's Linen and in jaxnorm's; "" where there is none."""
    groups: int | None = None
    has_bias: bool = True

    @property
    def epsilon(self) -> float:
        """The epsilon of Flax, which is jaxnorm's too."""
        return 1e-5 if self.name in ("batch", "weight") else 1e-6

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of one slice; a slice of a group has a part of the last axis."""
        if self.name in ("layer", "rms"):
            return (ndim - 1,)
        spatial = tuple(range(1, ndim - 1))
        return {
            "batch": (0, *spatial),
            "group": (*spatial, ndim - 1),
            "instance": spatial,
            "weight": (0, *spatial),
        }[self.name]

    def exact(self, x, scale, bias, dy, mask=None) -> dict[str, Any]:
        """`y`, `dx`, `dscale` and `dbias` of the float64 oracle."""
        arguments = [x, scale, bias] if self.has_bias else [x, scale]
        if self.name == "weight":
            y = oracle.standardize_weight(*arguments)
            return dict(zip(OUTPUTS, (y, *oracle.standardize_weight_vjp(dy, *arguments))))
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


class _Jax:
    """The common part of peers in JAX: `function` builds the function, `run` returns arrays."""

    takes_masks: ClassVar[bool] = False

    def has(self, norm: Norm) -> bool:
        """True if the peer has that normalization."""
        del norm
        return True

    def function(self, norm: Norm, dtype) -> Callable:
        """A function of (parameters, x) that returns y, in `dtype`, and the new statistics."""
        raise NotImplementedError

    @functools.cached_property
    def _compiled(self) -> dict:
        return {}

    def run(self, norm: Norm, x, scale, bias, dy, mask=None) -> dict[str, np.ndarray] | None:
        """`y`, `dx`, `dscale` and `dbias` in NumPy; None if the peer has no such function."""
        if not self.has(norm) or (mask is not None and not self.takes_masks):
            return None
        options = (mask,) if self.takes_masks else ()
        key = (norm, x.dtype)
        if key not in self._compiled:
            function = self.function(norm, x.dtype)

            @jax.jit
            def both(parameters, x, dy, *options):
                y, back, _ = jax.vjp(
                    lambda p, x: function(p, x, *options), parameters, x, has_aux=True
                )
                return y, back(dy)

            self._compiled[key] = both
        parameters = parameters_of(norm, scale, bias)
        y, (dparameters, dx) = self._compiled[key](parameters, x, dy, *options)
        found = (y, dx, dparameters["scale"], dparameters.get("bias"))
        return {k: np.asarray(v) for k, v in zip(OUTPUTS, found) if v is not None}


@dataclass(frozen=True)
class Linen(_Jax):
    """The layers of a module with Flax's Linen interface."""

    name: str
    module: ModuleType
    options: tuple[tuple[str, Any], ...] = ()
    takes_masks = True

    def has(self, norm: Norm) -> bool:
        return hasattr(self.module, norm.layer)

    def layer(self, norm: Norm, dtype) -> nn.Module:
        """The module in training mode, with results in `dtype`."""
        options = {**dict(self.options), "dtype": dtype}
        if norm.name == "batch":
            options["use_running_average"] = False
        if norm.groups:
            options["num_groups"] = norm.groups
        return getattr(self.module, norm.layer)(**options)

    def function(self, norm: Norm, dtype) -> Callable:
        """A function of (parameters, x, mask=None) that returns y and the new statistics."""
        layer: Any = self.layer(norm, dtype)

        def apply(parameters, x, mask=None):
            variables = {"params": parameters}
            if norm.name == "batch":
                stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
                variables["batch_stats"] = stats
            # A training step returns the new statistics beside y, so that they are no dead code.
            return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

        return apply


@dataclass(frozen=True)
class Functional(_Jax):
    """jaxnorm's pure functions, with a given implementation."""

    implementation: str | None
    takes_masks = True

    @property
    def name(self) -> str:
        return f"jaxnorm {self.implementation or 'chosen'}"

    def has(self, norm: Norm) -> bool:
        if self.implementation == "pallas":
            return norm.name in ("layer", "rms", "group", "instance")
        return norm.name != "weight" or self.implementation is None

    def function(self, norm: Norm, dtype) -> Callable:
        """A function of (parameters, x, mask=None) that returns y and the new statistics."""
        given = {"dtype": dtype, "epsilon": norm.epsilon, "implementation": self.implementation}

        def apply(parameters, x, mask=None):
            scale, bias = parameters["scale"], parameters.get("bias")
            options = {**given, "mask": mask}
            if norm.name == "weight":
                y = jaxnorm.standardize_weight(x, scale, epsilon=norm.epsilon)
                return y.astype(dtype), {}
            if norm.name == "rms":
                return jaxnorm.rms_norm(x, scale, **options), {}
            if norm.name == "batch":
                stats = jaxnorm.init_batch_stats(x.shape[-1])
                return jaxnorm.batch_norm(x, scale, bias, stats, training=True, **options)
            groups = {"num_groups": norm.groups} if norm.groups else {}
            function = getattr(jaxnorm, f"{norm.name}_norm")
            return function(x, scale, bias, **groups, **options), {}

        return apply

    def layer(self, norm: Norm, dtype) -> nn.Module:
        """A module around that function, to stand in a network."""
        return _layer_named(norm.layer)(self.function(norm, dtype), norm)


class _Layer(nn.Module):
    """A layer with parameters around a peer's function; it stores statistics as batch norm does."""

    function: Callable
    norm: Norm

    @nn.compact
    def __call__(self, x):
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        parameters = {"scale": self.param("scale", ones, x.shape[-1:])}
        if self.norm.has_bias:
            parameters["bias"] = self.param("bias", zeros, x.shape[-1:])
        y, state = self.function(parameters, x)
        if state:
            self.variable("batch_stats", "new", lambda: state).value = state
        return y


@functools.cache
def _layer_named(name: str) -> type[_Layer]:
    """A layer class of a given name: the names of parameters follow it, equal in every library."""
    return type(name, (_Layer,), {})


@dataclass(frozen=True)
class Plain(_Jax):
    """The textbook's formula in `jax.numpy`, in float32, as a user writes it."""

    name: str = "jnp"

    def function(self, norm: Norm, dtype) -> Callable:
        def apply(parameters, x):
            scale, bias = parameters["scale"], parameters.get("bias", 0.0)
            wide = x.astype(jnp.float32)
            axes = norm.axes(x.ndim)
            if norm.groups:
                wide = wide.reshape(*x.shape[:-1], norm.groups, -1)
                axes = (*axes[:-1], x.ndim)
            if norm.name == "rms":
                y = wide * lax.rsqrt(jnp.mean(wide**2, axes, keepdims=True) + norm.epsilon)
                return (y * scale).astype(dtype), {}
            mean = jnp.mean(wide, axes, keepdims=True)
            var = jnp.var(wide, axes, keepdims=True)
            y = ((wide - mean) * lax.rsqrt(var + norm.epsilon)).reshape(x.shape) * scale + bias
            if norm.name != "batch":
                return y.astype(dtype), {}
            new = {"mean": 0.01 * mean.reshape(-1), "var": 0.99 + 0.01 * var.reshape(-1)}
            return y.astype(dtype), lax.stop_gradient(new)

        return apply


@dataclass(frozen=True)
class Tokamax(_Jax):
    """Tokamax's layer norm, which is RMS norm without the mean; it has no others."""

    name: str = "tokamax"

    def has(self, norm: Norm) -> bool:
        return norm.name in ("layer", "rms")

    def function(self, norm: Norm, dtype) -> Callable:
        tokamax: Any = importlib.import_module("tokamax")
        flags: Any = importlib.import_module("absl.flags")
        if not flags.FLAGS.is_parsed():  # else it would parse this program's command line
            flags.FLAGS(["benchmarks"])

        def apply(parameters, x):
            y = tokamax.layer_norm(
                x, parameters["scale"], parameters.get("bias"), epsilon=norm.epsilon,
                subtract_mean=norm.name == "layer",
            )  # fmt: skip
            return y.astype(dtype), {}

        return apply


@dataclass(frozen=True)
class Jaxnorm(Linen):
    """jaxnorm's Linen layers; weight standardization, which is no layer, by its function."""

    def has(self, norm: Norm) -> bool:
        return True

    def function(self, norm: Norm, dtype) -> Callable:
        of = Functional(None) if norm.name == "weight" else super()
        return of.function(norm, dtype)


def parameters_of(norm: Norm, scale, bias) -> dict:
    """The parameter dictionary of a Linen layer."""
    return {"scale": scale, "bias": bias} if norm.has_bias else {"scale": scale}


def installed(name: str) -> bool:
    """True if an optional peer is installed."""
    return importlib.util.find_spec(name) is not None


Peer = Linen | Functional | Plain | Tokamax | Torch
JAXNORM = Jaxnorm("jaxnorm", jaxnorm.linen)
FLAX = Linen("flax", nn)
FLAX_TWO_PASS = Linen("flax two-pass", nn, (("use_fast_variance", False),))
PLAIN = Plain()
TOKAMAX = Tokamax()
FORMS = tuple(Functional(name) for name in IMPLEMENTATIONS)
PEERS = (JAXNORM, *FORMS, FLAX, FLAX_TWO_PASS, PLAIN, TOKAMAX, TORCH, TORCH_COMPILED)


def named(names: tuple[str, ...]) -> tuple[Peer, ...]:
    """The peers of these names that are installed, in the order of the tables."""
    needs = {"tokamax": "tokamax", "torch": "torch", "torch.compile": "torch"}
    return tuple(p for p in PEERS if p.name in names and installed(needs.get(p.name, "jax")))


def norms(groups: int) -> tuple[Norm, ...]:
    """The five norms of activations, with that number of groups."""
    return (
        Norm("batch", "BatchNorm"),
        Norm("layer", "LayerNorm"),
        Norm("rms", "RMSNorm", has_bias=False),
        Norm("group", "GroupNorm", groups),
        Norm("instance", "InstanceNorm"),
    )


WEIGHT = Norm("weight", "", has_bias=False)
