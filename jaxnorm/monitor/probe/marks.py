"""Marks: places in a program where somebody may want to look.

A mark is an identity that every transformation carries along and that leaves nothing behind in a
compiled program. It stands for two things to be seen: the value there and, once the program has
been differentiated, the gradient of the loss with respect to it, because the transpose of a mark on
a tangent is a mark on a cotangent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from jaxnorm._jax import is_zero, lower_identity, make_primitive

VALUE, TANGENT, GRADIENT = "value", "tangent", "gradient"
FENCE = "fence"  # a norm layer that is not observed: nothing inside it is a place either


@dataclass(frozen=True)
class Place:
    """The place of a mark: a layer or a nonlinearity, and which side of it."""

    layer: str
    """Its path in the model, such as "Block_1/BatchNorm_0" or "Block_1/relu_0"."""
    kind: str
    """Its class or function, such as "BatchNorm" or "relu"."""
    side: str
    """"input" or "output"."""
    order: int = 0
    """Rank among the places of a forward pass, from the first to the last."""
    is_norm: bool = False
    """Whether it is a normalization layer, in which nothing else is a place."""
    scans: tuple[tuple[int, bool], ...] = ()
    """The scans around it, from the outermost: their lengths, and whether they are over layers."""
    facts: tuple[tuple[str, Any], ...] = field(default=(), compare=False)
    """What is known of the layer: its epsilon and the like."""

    @property
    def name(self) -> str:
        """Unique in a model."""
        return f"{self.layer}:{self.side}"


def mark(
    x: Inexact[Array, "*shape"], place: Place, *beside: Array, role: str = VALUE
) -> Inexact[Array, "*shape"]:
    """The array `x` with a mark.

    Args:
        x: any floating array.
        place: what to call it.
        beside: arrays that belong to what is seen there, such as running statistics.
        role: `VALUE` or `FENCE`.

    Returns:
        `x`.
    """
    return mark_p.bind(x, *map(jax.lax.stop_gradient, beside), place=place, role=role)


def _jvp(primals, tangents, *, place, role):
    x = mark_p.bind(*primals, place=place, role=role)
    dx = tangents[0]
    if role == VALUE and not is_zero(dx):
        # Only of the first derivative is anything to be seen.
        dx = mark_p.bind(dx, place=place, role=TANGENT)
    return x, dx


def _transpose(cotangent, *operands, place, role):
    if not is_zero(cotangent) and role == TANGENT:
        cotangent = mark_p.bind(cotangent, place=place, role=GRADIENT)
    return [cotangent, *(None for _ in operands[1:])]


def _batched(operands, axes, *, place, role):
    x, *beside = operands
    if any(axis is not None for axis in axes[1:]):
        beside = []  # each member has statistics of its own, and there is one place for all
    if axes[0] is None:
        return mark_p.bind(x, *beside, place=place, role=role), axes[0]
    x = jnp.moveaxis(x, axes[0], 0)
    facts = dict(place.facts)
    features = facts.get("feature_axes", (x.ndim - 2,))
    if 0 in features:  # of one example each
        facts["feature_axes"] = tuple(axis + 1 for axis in features)
        place = replace(place, facts=tuple(facts.items()))
        return mark_p.bind(x, *beside, place=place, role=role), 0
    # What is mapped over are examples, like those along the first axis.
    together = x.reshape(-1, *x.shape[2:])
    return mark_p.bind(together, *beside, place=place, role=role).reshape(x.shape), 0


mark_p = make_primitive(
    "jaxnorm_mark",
    value=lambda x, *beside, place, role: x,
    result=lambda x, *beside, place, role: x,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batched,
    lowerings={None: lower_identity},
)
