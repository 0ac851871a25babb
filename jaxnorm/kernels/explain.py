"""Tell which implementation runs, and why."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxnorm.kernels.dispatch import Decision, recorded
from jaxnorm.text import aligned


@dataclass(frozen=True)
class Explanation:
    """The implementations that a function's normalizations run, in the order of its calls."""

    platform: str
    decisions: tuple[Decision, ...]

    def __iter__(self):
        """Operation, shape, dtype, implementation and reason of each call."""
        for d in self.decisions:
            yield d.operation, d.shape, d.dtype, *d.on(self.platform)

    def __str__(self):
        rows = [("operation", "shape", "dtype", "runs", f"why, on {self.platform}")]
        rows += [(o, "x".join(map(str, s)) or "()", d, i, why) for o, s, d, i, why in self]
        return aligned(rows)

    __repr__ = __str__


def explain(function: Callable, *arguments, platform: str | None = None, **keywords) -> Explanation:
    """Trace a function and tell for each normalization in it which implementation runs, and why.

    A kernel reads `x` once and writes `y` once; backward it reads `x` and `dy` once and writes `dx`
    once. Where none is asked for, one runs if whole blocks of networks were measured to be faster
    with it. On TPUs a slice that is too large for on-chip memory is read again for every sum over
    it; on GPUs it has no kernel. The GPU kernels await a measurement: they compile for Hopper and
    have never run on a GPU, so they are never chosen. No kernel is written for batch normalization.

    Under `jit` a kernel runs on each device's part of an array on a mesh with Explicit axes, and
    inside `jax.shard_map`. XLA for TPUs cannot partition a kernel on Auto axes
    (https://github.com/jax-ml/jax/issues/38196): there XLA's form runs, and to ask for the kernel
    is an error.

    Args:
        function: one of jaxnorm's, or any function that calls them, such as a model's `apply`.
            Nothing is computed.
        *arguments: its arguments; arrays may be `jax.ShapeDtypeStruct`.
        platform: "cpu", "cuda", "rocm" or "tpu"; None: the default device's.
        **keywords: its keyword arguments.

    Returns:
        An `Explanation`: it prints as a table, and iterates over operation, shape, dtype,
        implementation ("xla", "pallas", "two_pass", or "error" where a kernel is asked for that
        this platform does not have) and reason. Under `vmap`, shape and reason are those of one
        example. On a mesh whose axes are Auto a kernel runs only inside `jax.shard_map`.

    Raises:
        ValueError: no such norm was traced, or the platform is none of these.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> print(jaxnorm.explain(jaxnorm.layer_norm, jnp.ones((4, 8)), platform="cpu"))
        operation   shape  dtype    runs  why, on cpu
        layer_norm  4x8    float32  xla   no kernel: none is written for cpu
    """
    platform = jax.default_backend() if platform is None else platform
    platform = {"gpu": "cuda"}.get(platform, platform)
    if platform not in ("cpu", "cuda", "rocm", "tpu"):
        raise ValueError(
            f"explain: platform must be one of 'cpu', 'cuda', 'rocm' and 'tpu'; got {platform!r}. "
            "Leave it at None for the default device's."
        )
    # A function that was compiled for these shapes before would not be traced a second time.
    unjitted = (
        getattr(function, "__wrapped__", function) if hasattr(function, "lower") else function
    )
    leaves, tree = jax.tree.flatten((arguments, keywords))
    arrays_at = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def run(arrays):
        filled = list(leaves)
        for i, array in zip(arrays_at, arrays):
            filled[i] = array
        given, named = tree.unflatten(filled)
        return unjitted(*given, **named)

    with recorded() as decisions:
        jax.eval_shape(run, [leaves[i] for i in arrays_at])
    if not decisions:
        raise ValueError(
            f"explain: no normalization was traced; got {unjitted!r}. Give a function that calls "
            "batch_norm, layer_norm, rms_norm, group_norm or instance_norm; where it calls "
            "functions that were compiled for these shapes before, call jax.clear_caches() first."
        )
    return Explanation(platform, tuple(decisions))
