"""Internal covariate shift of gradients, and the loss along them (Santurkar et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax
from jaxtyping import Array, Float

from jaxnorm._jax import Var, inner_programs

Loss = Callable[[Any], Any]
"""A function from parameters to a scalar, on one batch."""


class GradientShift(struct.PyTreeNode):
    """Internal covariate shift, layer by layer, from `internal_covariate_shift`.

    Attributes:
        layers: paths of the layers, in the order in which the loss uses them.
        l2: distance between a layer's gradients before and after the step of the layers before
            it, shape (layers,).
        cosine: cosine of the angle between the two, shape (layers,); 1 where the gradient keeps
            its direction.
    """

    layers: tuple[str, ...] = struct.field(pytree_node=False)
    l2: Float[Array, " layers"]  # float32
    cosine: Float[Array, " layers"]  # float32


class Landscape(NamedTuple):
    """The loss along a direction, from `loss_landscape`.

    Attributes:
        step_sizes: eta, shape (steps,).
        losses: the loss at ``params - step_size * direction``, shape (steps,).
        gradient_change: Euclidean distance of the gradient there from that at `params`, shape
            (steps,).
        smoothness: that distance over the length of the step, shape (steps,).
    """

    step_sizes: Float[Array, " steps"]  # float32
    losses: Float[Array, " steps"]  # dtype of the loss
    gradient_change: Float[Array, " steps"]  # float32
    smoothness: Float[Array, " steps"]  # float32

    @property
    def loss_variation(self) -> Float[Array, ""]:
        """The largest loss less the smallest."""
        return self.losses.max() - self.losses.min()

    @property
    def gradient_predictiveness(self) -> Float[Array, ""]:
        """The largest change of the gradient; what is small here is predictable."""
        return self.gradient_change.max()

    @property
    def effective_smoothness(self) -> Float[Array, ""]:
        """The largest change of the gradient for the length of a step ("effective beta")."""
        return self.smoothness.max()


def internal_covariate_shift(
    loss: Loss, params: Any, new_params: Any, *, batch_size: int | None = None
) -> GradientShift:
    r"""Change of each layer's gradient that comes from the step of the layers before it.

    .. math::
        \|G_i - G_i'\|_2, \quad \cos(G_i, G_i'), \quad
        G_i = \nabla_{W_i} L(W_1, \ldots, W_k), \quad
        G_i' = \nabla_{W_i} L(W_1', \ldots, W_{i-1}', W_i, \ldots, W_k)

    where W' are the parameters after a step, on the same batch. A layer is what holds arrays of
    parameters itself, and layers come in the order in which the loss first uses their parameters.
    The first has nothing before it, and a shift of 0.

    Args:
        loss: a function of the parameters, on one batch, in training mode.
        params: the parameters before the step; a pytree of floating arrays.
        new_params: the parameters after it.
        batch_size: how many layers' gradients to evaluate at once; None for all.

    Returns:
        A `GradientShift`. The cosine is 1 where both gradients are zero, and 0 where one is.

    Raises:
        ValueError: the two sets of parameters have different structures or shapes.

    Source: Santurkar, Tsipras, Ilyas & Madry 2018, Definition 2.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = {"first": {"w": jnp.float32(2.0)}, "second": {"w": jnp.float32(3.0)}}
        >>> loss = lambda p: p["first"]["w"] * p["second"]["w"] * 5.0
        >>> new = {"first": {"w": jnp.float32(1.0)}, "second": {"w": jnp.float32(1.0)}}
        >>> internal_covariate_shift(loss, w, new).l2.tolist()
        [0.0, 5.0]
    """
    _check_alike("internal_covariate_shift", params, new_params)
    return shift_of(jax.grad(loss), params, new_params, batch_size=batch_size)


def shift_of(
    gradient: Callable[[Any], Any],
    params: Any,
    new_params: Any,
    here: Any = None,
    *,
    batch_size: int | None = None,
) -> GradientShift:
    """Measure `internal_covariate_shift` with a function that returns the gradient.

    Args:
        gradient: from parameters to the gradient of a loss, on one batch.
        params: the parameters before a step.
        new_params: the parameters after it.
        here: the gradient at `params`; None to compute it.
        batch_size: as in `internal_covariate_shift`.

    Returns:
        As `internal_covariate_shift`.
    """
    order, layers = _layers(gradient, params)
    old, structure = jax.tree.flatten(params)
    new = jax.tree.leaves(new_params)
    before = jax.tree.leaves(gradient(params) if here is None else here)

    def of_layer(i):
        mixed = [jnp.where(layer < i, b, a) for layer, a, b in zip(order, old, new)]
        there = jax.tree.leaves(gradient(jax.tree.unflatten(structure, mixed)))
        own = [(layer == i, a, b) for layer, a, b in zip(order, before, there)]
        sums = [
            jnp.where(mine, jnp.stack([_dot(a, a), _dot(b, b), _dot(a, b), _dot(a - b, a - b)]), 0)
            for mine, a, b in own
        ]
        return jnp.stack(sums).sum(0)

    if len(layers) < 2:
        nothing = jnp.zeros(len(layers), jnp.float32)
        return GradientShift(tuple(layers), nothing, nothing + 1)
    # Before the first layer there is nothing that could move its gradient.
    index = jnp.arange(1, len(layers))
    together = batch_size or len(index)
    # One by one without a vmap of size one, which would make convolutions grouped ones.
    found = lax.map(of_layer, index, batch_size=None if together == 1 else together)
    aa, bb, ab, squared_distance = found.T
    length = jnp.sqrt(aa) * jnp.sqrt(bb)
    none = (aa == 0) & (bb == 0)
    cosine = jnp.where(none, 1.0, ab / jnp.where(length > 0, length, 1))
    return GradientShift(
        tuple(layers),
        jnp.pad(jnp.sqrt(squared_distance), (1, 0)),
        jnp.pad(jnp.clip(cosine, -1, 1), (1, 0), constant_values=1),
    )


def loss_landscape(
    loss: Loss,
    params: Any,
    step_sizes: Sequence[float] | Array,
    direction: Any = None,
    *,
    batch_size: int | None = None,
) -> Landscape:
    r"""The loss and its gradient along the gradient, which normalization is found to smooth.

    .. math::
        L(W - \eta g), \quad \|\nabla L(W) - \nabla L(W - \eta g)\|_2, \quad
        \frac{\|\nabla L(W) - \nabla L(W - \eta g)\|_2}{\|\eta g\|_2}

    Args:
        loss: a function of the parameters, on one batch, in training mode.
        params: a pytree of floating arrays.
        step_sizes: the values of eta, shape (steps,); none of them 0.
        direction: g, of the structure of the parameters; None for the gradient itself.
        batch_size: how many step sizes to evaluate at once; None for all, in one vmapped program.

    Returns:
        A `Landscape`.

    Raises:
        ValueError: the direction is not of the parameters' structure, or `step_sizes` no list of
            numbers.

    Source: Santurkar, Tsipras, Ilyas & Madry 2018, section 3.1 and Figure 4.

    Example:
        >>> import jax.numpy as jnp
        >>> found = loss_landscape(lambda w: 2 * (w**2).sum(), jnp.array([1.0]), [0.1, 0.5])
        >>> [f"{loss:.2f}" for loss in found.losses], f"{found.effective_smoothness:.2f}"
        (['0.72', '2.00'], '4.00')
    """
    op = "loss_landscape"
    etas = jnp.asarray(step_sizes, jnp.float32)
    if etas.ndim != 1 or not etas.size:
        raise ValueError(
            f"{op}: step_sizes must be a list of numbers; got shape {etas.shape}. For example "
            "jnp.linspace(0.1, 1, 10)."
        )
    here = jax.grad(loss)(params)
    along = here if direction is None else direction
    _check_alike(op, params, along)

    def at(eta):
        moved = jax.tree.map(lambda w, g: w - (eta * g).astype(w.dtype), params, along)
        value, there = jax.value_and_grad(loss)(moved)
        return value, _norm(jax.tree.map(jnp.subtract, there, here))

    losses, change = lax.map(at, etas, batch_size=batch_size or etas.size)
    length = jnp.abs(etas) * _norm(along)
    return Landscape(etas, losses, change, change / jnp.where(length > 0, length, 1))


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32))


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(_dot(a, a) for a in jax.tree.leaves(tree)))


def _check_alike(op: str, params: Any, others: Any) -> None:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, others)]
    if jax.tree.structure(params) != jax.tree.structure(others) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{op}: both trees must be of the parameters' structure and shapes; got {shapes[0]} "
            f"and {shapes[1]}. Take both from the same model."
        )


def _layers(gradient: Callable[[Any], Any], params: Any) -> tuple[list[int], list[str]]:
    """The number of the layer of each array of parameters, and the layers' paths in order."""
    # An NNX variable is an array of its layer, and no layer.
    variables = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    owners = [
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for path, variable in variables
        for _ in jax.tree.leaves(variable)
    ]
    jaxpr = jax.make_jaxpr(gradient)(params).jaxpr
    first = _first_uses(jaxpr)
    last = len(first)
    rank = {v: i for i, v in enumerate(first)}
    order: dict[str, int] = {}
    for owner, v in zip(owners, jaxpr.invars):
        order[owner] = min(order.get(owner, last), rank.get(v, last))
    layers = sorted(order, key=lambda owner: order[owner])
    return [layers.index(owner) for owner in owners], layers


def _first_uses(jaxpr: Any) -> list[Var]:
    """The inputs of a program in the order in which something is computed with them."""
    stands_for = {v: v for v in jaxpr.invars}
    used: dict[Var, None] = {}
    for eqn in jaxpr.eqns:
        given = [stands_for.get(v) if isinstance(v, Var) else None for v in eqn.invars]
        inner = list(inner_programs(eqn))
        if len(eqn.invars) == 1 and given[0] is not None and not inner:
            # A reshape or a cast of a parameter is not a use of it yet.
            stands_for |= dict.fromkeys(eqn.outvars, given[0])
            continue
        if len(inner) == 1 and len(inner[0].invars) == len(eqn.invars):
            within = dict(zip(inner[0].invars, given))
            used |= dict.fromkeys(u for v in _first_uses(inner[0]) if (u := within[v]) is not None)
        else:
            used |= dict.fromkeys(u for u in given if u is not None)
    return list(used)
