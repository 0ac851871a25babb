"""The public function that folds a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxnorm.models.select import Layers, Selection
from jaxnorm.tools.fold.check import Comparison, compare, evaluation
from jaxnorm.tools.fold.exact import Exact
from jaxnorm.tools.fold.pairs import plan_folding
from jaxnorm.tools.fold.program import Program, trace_program
from jaxnorm.tools.fold.report import FoldReport
from jaxnorm.tools.fold.write import folded_linen, folded_nnx


@dataclass(frozen=True)
class FoldedModel:
    """A model in which norms are folded into linear maps.

    Attributes:
        model: a Linen module that is called as the first one is, or an NNX module.
        variables: the collections of the Linen module; None for NNX, whose module holds its own.
        report: what was folded, and what was kept and why. It prints as a table.

    Source: `jaxnorm.tools.fold`.

    Example:
        >>> import flax.nnx as nnx, jax.numpy as jnp
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
        >>> folded = fold(model, jnp.ones((2, 3)))
        >>> type(folded).__name__, folded.variables, len(folded.report.folded)
        ('FoldedModel', None, 1)
    """

    model: Any
    variables: Any
    report: FoldReport


def fold(model: Any, *inputs: Any, where: Layers | None = None, **kwargs: Any) -> FoldedModel:
    r"""Fold the norms of a trained model into the linear maps next to them.

    In evaluation a batch norm is :math:`y = s x + t` with

    .. math::
        s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \quad t = \beta - \mu s,

    :math:`\gamma` = 1 and :math:`\beta` = 0 where absent. After a convolution or a dense layer,

    .. math::
        W'_{..,i,o} = W_{..,i,o} \, s_o, \quad b'_o = b_o s_o + t_o,

    and before one :math:`W'_{..,i,o} = W_{..,i,o} \, s_i`,
    :math:`b'_o = b_o + \sum_i W_{..,i,o} \, t_i`. Where the convolution pads with zeros, the sum
    differs from place to place near the border: there it is a map, the convolution of an image of
    ones with :math:`\sum_i W_{..,i,o} \, t_i`, exact for images of any size. Every layer that
    scales and shifts channels by numbers that only depend on variables is folded in this way, such
    as layer scale. The scale and bias of a layer norm or an RMS norm (with its `scale_offset`) go
    into the dense layers that read it. Kernels that are computed of several variables (weight
    standardization, weight norm, spectral norm) become plain.

    The pairs are found in the traced program, through reshapes, transposes, and dropout in
    evaluation; names of layers mean nothing. A norm is kept where folding would change the
    numbers: where what lies between is read elsewhere or is not linear, where a layer is called
    more than once or in a loop, where a norm uses the statistics of its input. The report has the
    reasons. Numbers are computed in float64 and rounded once to the dtype of the parameter.

    The folded model is for evaluation: a folded batch norm that is called in training is an error.
    It can be jitted and exported, and takes inputs of other sizes than the example's.

    Args:
        model: a Linen module that is not bound, or an NNX module. Neither is changed.
        *inputs: for Linen the variables, ``{"params": ..., "batch_stats": ...}``; then example
            inputs of the model's call, arrays of any size that it takes. Their values are used to
            compare the outputs only.
        where: norms to fold: a path with * for anything, a class, several of these, or a function
            of a path and a name of a class. None: all.
        **kwargs: further arguments of the model's call. A mode need not be given.

    Returns:
        A `FoldedModel`: `model`, `variables`, `report`.

    Raises:
        TypeError: the model is neither a Linen nor an NNX module.
        ValueError: the model cannot be called with these variables and inputs, it has no norm,
            `where` selects none, or the outputs for the example differ by more than rounding
            explains.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2 (after a convolution); the rest follows from
    the formulas above.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from jaxnorm import tools
        >>> model = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> folded = tools.fold(model, model.init(jax.random.key(0), x), x)
        >>> print(folded.report.folded[0].layer, "->", folded.report.folded[0].into)
        layers_1 -> layers_0
        >>> sorted(folded.variables["params"])
        ['layers_0']
        >>> folded.model.apply(folded.variables, jnp.ones((2, 16, 16, 3))).shape
        (2, 16, 16, 4)
    """
    operation = "fold"
    if isinstance(model, linen.Module):
        if not inputs:
            raise ValueError(
                f"{operation}: a Linen module must come with its variables and an example; got "
                f"{type(model).__name__} alone. Call fold(model, variables, x)."
            )
        variables, args = inputs[0], inputs[1:]
    elif isinstance(model, nnx.Module):
        variables, args = nnx.state(model), inputs
    else:
        raise TypeError(
            f"{operation}: model must be a flax.linen.Module or a flax.nnx.Module; got {model!r}. "
            "Pass an instance."
        )
    program = trace_program(operation, model, variables, args, kwargs)
    arrays = [a for a in jax.tree.leaves(variables) if isinstance(a, jax.Array | np.ndarray)]
    exact = Exact(program, arrays)
    selection = Selection.of(operation, where)
    folding = plan_folding(operation, program, exact, selection)
    if isinstance(model, linen.Module):
        new, new_variables = folded_linen(model, variables, folding, program, exact)
    else:
        new, new_variables = folded_nnx(model, folding, program, exact), None
    evaluate, given = evaluation(
        operation, model, variables if new_variables is not None else None, args, kwargs
    )
    again, given_again = evaluation(operation, new, new_variables, args, kwargs)
    compared = compare(evaluate, lambda: jax.jit(again)(given_again), given, _narrowest(program))
    _check(operation, compared)
    return FoldedModel(
        new, new_variables, FoldReport(tuple(folding.folded), tuple(folding.kept), *compared)
    )


def _narrowest(program: Program) -> Any:
    """The floating dtype of the values of a program that rounds most."""
    dtypes = {t.dtype for t in program.types if jnp.issubdtype(t.dtype, jnp.floating)}
    return max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps), default=jnp.dtype("float32"))


def _check(operation: str, compared: Comparison) -> None:
    if compared.difference <= compared.allowed < float("inf"):
        return
    raise ValueError(
        f"{operation}: a folded model must give the model's outputs; for this example they differ "
        f"by {compared.difference:.2g} of their size, of {compared.allowed:.2g} that rounding "
        "explains. Pass an example for which the outputs are finite, or leave layers out with "
        "where= until the outputs agree, and tell jaxnorm's maintainers which layer it was."
    )
