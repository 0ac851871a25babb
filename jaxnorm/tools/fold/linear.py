"""Linear layers of a program: convolutions and products with a kernel of variables."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxnorm.tools.fold.affine import AffineForms
from jaxnorm.tools.fold.exact import Exact
from jaxnorm.tools.fold.layout import Move, compact, pulled_back, varies_only_on
from jaxnorm.tools.fold.program import Call, Equation, Program

CONVOLUTIONS = (linen.Conv, linen.ConvTranspose, nnx.Conv, nnx.ConvTranspose)
PLAIN = (
    *CONVOLUTIONS, linen.ConvLocal, linen.Dense, linen.DenseGeneral, linen.Einsum,
    nnx.Linear, nnx.LinearGeneral, nnx.Einsum,
)  # fmt: skip


_OTHER_AXES = "its coefficients change along axes that the kernel does not have"


class UnfoldableError(Exception):
    """The reason why a layer is left as it is."""


@dataclass
class Linear:
    """A layer whose result is a linear map of an array with a kernel, and a bias.

    Attributes:
        call: the call of the layer.
        outer: the call that is rewritten: of the layer, or of one around it that makes its kernel.
        equation: the convolution or product.
        position: its rank in the program.
        data: the rank of its operand that is not the kernel.
        kernel: the kernel as that equation reads it, in float64.
        parameter: the value that the layer takes for its kernel.
        kernel_moves: from there to the equation.
        variable: the variable that the parameter is; None if it is computed.
        result_moves: from the result of the equation to that of the layer.
        bias: a coefficient of the layer's result.
        bias_variable: the variable that holds it; None if there is none.
        taps: of a map that is added to the result: a kernel with one input channel, which is
            applied to an image of ones; or None.
        own_dtype: of the result.
        dtype: of the result once something is folded into it.
        stored: dtype of the parameter.
        has_bias: True if there is a bias, even if it is zero for these variables.
        is_changed: True once something has been folded into it.
    """

    call: Call
    outer: Call
    equation: Equation
    position: int
    data: int
    kernel: np.ndarray
    parameter: int
    kernel_moves: tuple[Move, ...]
    variable: int | None
    result_moves: tuple[Move, ...]
    bias: np.ndarray
    bias_variable: int | None
    own_dtype: Any
    dtype: Any
    stored: Any
    taps: np.ndarray | None = None
    has_bias: bool = False
    is_changed: bool = False

    @property
    def plain_type(self) -> type | None:
        """The layer's own class of Flax, or the one that it derives from."""
        kinds = type(self.call.module).__mro__
        return next((kind for kind in kinds if kind in PLAIN), None)

    @property
    def is_widened(self) -> bool:
        """True if what was folded into it has a wider dtype."""
        return self.dtype != self.own_dtype

    @property
    def is_convolution(self) -> bool:
        """True for Flax's convolutions, which can be applied to an image of ones."""
        kind, own = self.plain_type, type(self.call.module)
        if kind not in CONVOLUTIONS:
            return False
        # The class of an NNX layer is one derived from its own, whose call is hooked.
        as_flax = inspect.unwrap(own.__call__) is inspect.unwrap(kind.__call__)
        return as_flax or own.__module__.startswith("jaxnorm.")

    def scale_result(self, scale: np.ndarray, shift: np.ndarray, has_shift: bool) -> None:
        """Fold ``scale * result + shift``, coefficients of the layer's result, into it.

        Raises:
            UnfoldableError: they change along axes that the kernel does not have.
        """
        inner = pulled_back(self.result_moves, scale)
        factor = self._kernel_coefficient(inner)
        self._kernel_coefficient(pulled_back(self.result_moves, shift))  # or it cannot be stored
        taps = None if self.taps is None else self.taps * factor
        self._change(self.kernel * factor, compact(self.bias * scale + shift), taps, has_shift)

    def _change(self, kernel: np.ndarray, bias: np.ndarray, taps: Any, has_bias: bool) -> None:
        if self.variable is None and self.plain_type is None:
            raise UnfoldableError(f"{self.call.name} computes its kernel, and is no layer of Flax")
        for array in (kernel, bias, taps):
            if array is not None and not np.all(np.abs(array) <= jnp.finfo(self.stored).max):
                raise UnfoldableError(f"the folded numbers overflow {self.stored}")
        self.kernel, self.bias, self.taps = kernel, bias, taps
        self.has_bias |= has_bias
        self.is_changed = True

    def _kernel_coefficient(self, coefficient: np.ndarray) -> np.ndarray:
        """A coefficient of the equation's result, as one of the kernel."""
        return _with_axes(coefficient, self._axes_of_result(), self.kernel.ndim)

    def stored_bias(self) -> np.ndarray:
        """The bias for the last axes of the result, of a shape that its values do not change."""
        axes = self._axes_of_result()
        shape = [n if a in axes else 1 for a, n in enumerate(self._result_shape())]
        every = np.arange(1, 1 + math.prod(shape), dtype=np.float64).reshape(shape)
        for each in self.result_moves:
            every = each.forward(every)
        first = next((a for a, n in enumerate(every.shape) if n > 1), every.ndim - 1)
        return np.broadcast_to(self.bias, every.shape).reshape(every.shape[first:])

    def _axes_of_result(self) -> dict[int, int]:
        """The axes of the equation's result that the kernel has: axis there -> in the kernel."""
        if self.equation.name == "conv_general_dilated":
            numbers = self.equation.params["dimension_numbers"]
            return {numbers.out_spec[1]: numbers.rhs_spec[0]}
        contracted, batch = self.equation.params["dimension_numbers"]
        kernel = 1 - self.data
        data_rank = len(self._data_shape())
        free = [
            a for a in range(self.kernel.ndim) if a not in (*contracted[kernel], *batch[kernel])
        ]
        first = len(batch[0])
        if kernel == 1:
            first += data_rank - len(contracted[0]) - len(batch[0])
        axes = {i: axis for i, axis in enumerate(batch[kernel])}
        return axes | {first + i: axis for i, axis in enumerate(free)}

    def _data_shape(self) -> tuple[int, ...]:
        return tuple(self.equation.traced.invars[self.data].aval.shape)

    def scale_data(self, scale: np.ndarray, shift: np.ndarray, has_shift: bool) -> None:
        """Fold ``scale * data + shift``, coefficients of the product's operand, into it.

        Raises:
            UnfoldableError: the coefficients change along axes that the kernel does not have.
        """
        if self.equation.name == "conv_general_dilated":
            raise UnfoldableError(f"{self.call.name} is a convolution, but no layer of Flax")
        contracted, batch = self.equation.params["dimension_numbers"]
        data, kernel = self.data, 1 - self.data
        axes = dict(zip((*contracted[data], *batch[data]), (*contracted[kernel], *batch[kernel])))
        factor, term = (_with_axes(each, axes, self.kernel.ndim) for each in (scale, shift))
        added = (self.kernel * term).sum(tuple(contracted[kernel]), keepdims=True)
        of_result = self._axes_of_result()
        rank = len(self._result_shape())
        order = [of_result[a] for a in sorted(of_result)]
        rest = [a for a in range(self.kernel.ndim) if a not in order]
        result = added.transpose(rest + order).reshape(
            [added.shape[of_result[a]] if a in of_result else 1 for a in range(rank)]
        )
        for each in self.result_moves:
            result = each.forward(result)
        self._change(self.kernel * factor, compact(self.bias + result), self.taps, has_shift)

    def _result_shape(self) -> tuple[int, ...]:
        return tuple(self.equation.traced.outvars[0].aval.shape)

    def scale_channels(self, scale: np.ndarray, shift: np.ndarray, has_shift: bool) -> None:
        """Fold ``scale * x + shift`` of a convolution's input, by channels on its last axis.

        At a border of zeros the shift is missing from the sums. What is missing differs there from
        place to place, so the convolution of an image of ones is added instead of one number for
        each channel.

        Raises:
            UnfoldableError: the coefficients change along other axes.
        """
        for each in (scale, shift):
            if not varies_only_on(each, (each.ndim - 1,)):
                raise UnfoldableError("its coefficients change along other axes than the channels'")
        numbers = self.equation.params["dimension_numbers"]
        groups = self.equation.params["feature_group_count"]
        out_axis, in_axis = numbers.rhs_spec[:2]
        outputs, inputs = self.kernel.shape[out_axis], self.kernel.shape[in_axis]

        def of_kernel(coefficient: np.ndarray) -> np.ndarray:
            channels = np.broadcast_to(coefficient.reshape(-1), (groups * inputs,))
            grouped = np.repeat(channels.reshape(groups, inputs), outputs // groups, axis=0)
            shape = [1] * self.kernel.ndim
            shape[out_axis], shape[in_axis] = outputs, inputs
            return (grouped if out_axis < in_axis else grouped.T).reshape(shape)

        taps = (self.kernel * of_kernel(shift)).sum(in_axis, keepdims=True)
        spatial = tuple(numbers.rhs_spec[2:])
        bias, border, has_bias = self.bias, self.taps, False
        if not has_shift:
            pass
        elif self._is_same_everywhere():
            added = taps.sum(spatial, keepdims=True).reshape((1,) * (bias.ndim - 1) + (-1,))
            bias, has_bias = compact(bias + added), True
        else:
            border = taps if border is None else border + taps
        self._change(self.kernel * of_kernel(scale), bias, border, has_bias)

    def _is_same_everywhere(self) -> bool:
        """True if every output sees the same taps, for images of any size."""
        layer, params = self.call.module, self.equation.params
        spatial = [self.kernel.shape[a] for a in params["dimension_numbers"].rhs_spec[2:]]
        if not isinstance(layer, linen.Conv | nnx.Conv):
            return False
        if any(n != 1 for n in np.ravel(layer.input_dilation or 1)):
            return False
        padding = layer.padding
        if isinstance(padding, str):
            return padding in ("VALID", "CIRCULAR") or all(n == 1 for n in spatial)
        return not np.any(np.asarray(padding))


def _with_axes(coefficient: np.ndarray, axes: dict[int, int], rank: int) -> np.ndarray:
    """A coefficient with its axes at other places.

    Args:
        coefficient: of some array.
        axes: its axis -> the axis of the result; it must not change along others.
        rank: of the result.
    """
    if not varies_only_on(coefficient, axes):
        raise UnfoldableError("its coefficients change along axes that the kernel does not have")
    order = sorted(axes, key=lambda axis: axes[axis])
    others = [axis for axis in range(coefficient.ndim) if axis not in axes]
    shape = [1] * rank
    for here, there in axes.items():
        shape[there] = coefficient.shape[here]
    return coefficient.transpose(others + order).reshape(shape)


def find_linear(program: Program, exact: Exact) -> tuple[list[Linear], dict[int, str]]:
    """The linear layers of a program, and for calls of others that have kernels, why they are none.

    Args:
        program: the traced model.
        exact: its known values.
    """
    forms = AffineForms(exact)
    kernels = AffineForms(exact, fixed=lambda v: v in exact.known and not exact.variables_of(v))
    found: dict[int, Linear] = {}
    refused: dict[int, str] = {}
    for call in sorted(program.calls, key=lambda c: c.span[1] - c.span[0]):
        if len(call.leaves) != 1 or call.loop or not call.enters:
            continue
        form = forms.of(call.leaves[0][0])
        position = program.makers.get(form.base)
        if position is None or position in found or not call.holds(position):
            continue
        equation = program.equations[position]
        if equation.name not in ("conv_general_dilated", "dot_general"):
            continue
        known = [i for i, o in enumerate(equation.operands) if o in exact.known]
        if len(known) != 1 or not exact.variables_of(equation.operands[known[0]]):
            continue
        try:
            found[position] = _linear(program, exact, kernels, call, form, equation, known[0])
        except UnfoldableError as reason:
            refused[call.index] = str(reason)
    return list(found.values()), refused


def _linear(program, exact, kernels, call, form, equation, known) -> Linear:
    position = program.makers[form.base]
    if call.several:
        raise UnfoldableError("it is called more than once")
    if equation.params.get("batch_group_count", 1) != 1:
        raise UnfoldableError("its convolution is grouped by batches")
    if equation.name == "conv_general_dilated" and known == 0:
        raise UnfoldableError("its kernel is the image of a convolution")
    if not form.is_unscaled:
        raise UnfoldableError("it scales its own result")
    for value in (form.base, *form.path[:-1]):
        if len(program.readers.get(value, ())) != 1 or value in program.outputs:
            raise UnfoldableError("what it computes is used before it is returned")
    operand = equation.operands[known]
    kernel = kernels.of(operand)
    if kernel.is_plain:
        parameter, moves = kernel.base, kernel.moves
    else:
        parameter, moves = operand, ()
    variable = parameter if parameter in program.variables else None
    bias_variable = None
    shifting = frozenset().union(*(exact.variables_of(v) for v in form.shifts))
    if np.any(form.shift) or shifting:
        shape = program.shape(call.leaves[0][0])
        fitting = [v for v in shifting if _trailing(exact.value(v), shape, form.shift)]
        if len(fitting) != 1 or len(shifting) != 1:
            raise UnfoldableError("its bias is computed")
        [bias_variable] = fitting
    dtype = program.types[call.leaves[0][0]].dtype
    return Linear(
        call=call,
        outer=_outer(program, call, exact.variables_of(operand) | shifting),
        equation=equation,
        position=position,
        data=1 - known,
        kernel=np.asarray(exact.value(operand)),
        parameter=parameter,
        kernel_moves=moves,
        variable=variable,
        result_moves=form.moves,
        bias=form.shift,
        bias_variable=bias_variable,
        has_bias=bias_variable is not None,
        own_dtype=dtype,
        dtype=dtype,
        stored=program.types[parameter].dtype,
    )


def _trailing(variable: np.ndarray, shape: tuple[int, ...], coefficient: np.ndarray) -> bool:
    """True if a variable is what is added to an array of this shape, along its last axes."""
    if variable.ndim > len(shape) or variable.shape != shape[len(shape) - variable.ndim :]:
        return False
    return np.array_equal(
        np.broadcast_to(coefficient, shape), np.broadcast_to(variable, shape), equal_nan=True
    )


def _outer(program: Program, call: Call, variables: frozenset[int]) -> Call:
    """The smallest call around a layer, or the layer's own, that alone reads some variables."""
    positions = [p for v in variables for p in program.readers.get(v, ())]
    if any(v in program.outputs for v in variables):
        raise UnfoldableError("its kernel or bias is a result of the model")
    around = [c for c in program.calls if all(c.holds(p) for p in (*call.span, *positions))]
    for outer in sorted(around, key=lambda c: c.span[1] - c.span[0]):
        if outer is call:
            return call
        if outer.loop or outer.several:
            raise UnfoldableError("its kernel is made in a part that is called more than once")
        if _is_around(program, outer, call):
            return outer
        break
    raise UnfoldableError("its kernel or bias is used elsewhere")


def _is_around(program: Program, outer: Call, call: Call) -> bool:
    """True if a call returns just what the call within it returns, of its own argument."""
    value = outer.leaves[0][0] if len(outer.leaves) == 1 else -1
    inner = {inside for _, _, inside in outer.enters}
    arguments = [outside for _, outside, _ in call.enters]
    return value == call.leaves[0][1] and len(arguments) == 1 and arguments[0] in inner
