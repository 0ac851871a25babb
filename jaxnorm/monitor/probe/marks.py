"""Marks of the places in a program that may be observed.

A mark is an identity that every transformation carries along and that leaves nothing behind in a
compiled program. It stands for two arrays: the value there and, once the program has
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
    """The place of a mark: a layer or a nonlinearity, and which side of it.

    Attributes:
        layer: path in the model, such as "Block_1/BatchNorm_0" or "Block_1/relu_0".
        kind: class or function, such as "BatchNorm" or "relu".
        side: "input" or "output".
        order: rank among the places of a forward pass, from the first to the last.
        is_norm: True for a normalization layer, in which nothing else is a place.
        scans: length of each scan around it, from the outermost, and True if it is over layers.
        facts: pairs of a name and a value that are known of the layer, such as its epsilon.
    """

    layer: str
    kind: str
    side: str
    order: int = 0
    is_norm: bool = False
    scans: tuple[tuple[int, bool], ...] = ()
    facts: tuple[tuple[str, Any], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """The name of the place, which is unique in a model."""
        return f"{self.layer}:{self.side}"


def mark(
    x: Inexact[Array, "*shape"], place: Place, *beside: Array, role: str = VALUE
) -> Inexact[Array, "*shape"]:
    """Put a mark on an array.

    Args:
        x: any floating array.
        place: the place of the mark.
        beside: arrays to observe together with `x`, such as running statistics.
        role: `VALUE` or `FENCE`.

    Returns:
        `x`.
    """
    return mark_p.bind(x, *map(jax.lax.stop_gradient, beside), place=place, role=role)


def _jvp(primals, tangents, *, place, role):
    x = mark_p.bind(*primals, place=place, role=role)
    dx = tangents[0]
    if role == VALUE and not is_zero(dx):
        # Only the first derivative is observed.
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
    if 0 in features:  # each member is one example
        facts["feature_axes"] = tuple(axis + 1 for axis in features)
        place = replace(place, facts=tuple(facts.items()))
        return mark_p.bind(x, *beside, place=place, role=role), 0
    # The members are examples, like those along the first axis.
    examples = x.reshape(-1, *x.shape[2:])
    return mark_p.bind(examples, *beside, place=place, role=role).reshape(x.shape), 0


mark_p = make_primitive(
    "jaxnorm_mark",
    value=lambda x, *beside, place, role: x,
    result=lambda x, *beside, place, role: x,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batched,
    lowerings={None: lower_identity},
)
