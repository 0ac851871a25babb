"""Mixed precision: a model computes in a narrow dtype, and everything that is stored stays wide."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def compute_dtype_of(operation: str, dtype: Any) -> Any:
    """The dtype as None, bfloat16 or float32; a three-part error for any other."""
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name in ("bfloat16", "float32"):
        return jnp.dtype(dtype)
    why = ""
    if name == "float16":
        why = " In float16 gradients below 6e-8 vanish unless the loss is scaled, which is not done"
        why += " here; bfloat16 has the range of float32 and needs no scaling."
    raise ValueError(
        f"{operation}: compute_dtype must be bfloat16 or float32, or None to leave dtypes to the "
        f"model; got {name}.{why} Pass compute_dtype=jnp.bfloat16."
    )


def narrowed(tree: Tree, dtype: Any) -> Tree:
    """The tree with its floating arrays in `dtype`; with None the tree as it is."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if _floating(x) else x, tree)


def widened(tree: Tree) -> Tree:
    """The tree with its floating arrays in float32 at least."""

    def widen(x: Any) -> Any:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _floating(x) else x

    return jax.tree.map(widen, tree)


def _floating(x: Any) -> bool:
    return hasattr(x, "astype") and jnp.issubdtype(x.dtype, jnp.floating)
