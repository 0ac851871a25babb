"""Layers that scale and shift channels by numbers that their variables determine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from flax import linen, nnx

from jaxnorm.models.select import NORM_TYPES
from jaxnorm.tools.fold.affine import Affine, AffineForms
from jaxnorm.tools.fold.exact import Exact
from jaxnorm.tools.fold.linear import Linear, UnfoldableError
from jaxnorm.tools.fold.program import Call, Program

BATCH_NORMS = (linen.BatchNorm, nnx.BatchNorm)


@dataclass
class Scaling:
    """A layer that scales and shifts channels by known coefficients, wholly or at its end.

    Attributes:
        call: the call of the layer.
        scale, shift: coefficients of its result.
        has_shift: False if it never shifts, whatever its variables are.
        is_whole: True if it does nothing else; False for a norm of the statistics of its input.
        neutral: for a layer that does more: variables and the values that make it scale by one
            and shift by zero.
        argument: rank of its array among the leaves of its arguments; -1 if not whole.
        source: the value that comes into it; -1 if not whole.
    """

    call: Call
    scale: np.ndarray
    shift: np.ndarray
    has_shift: bool
    is_whole: bool
    neutral: dict[int, np.ndarray] = field(default_factory=dict)
    argument: int = -1
    source: int = -1

    @property
    def result(self) -> int:
        """The value that comes out of it."""
        return self.call.leaves[0][1]

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.call.module).__name__


def find_scalings(
    program: Program, exact: Exact, linear: list[Linear]
) -> tuple[list[Scaling], dict[int, str]]:
    """The layers that scale and shift, and for other norms the reason why they are none.

    Args:
        program: the traced model.
        exact: its known values.
        linear: its linear layers, which are no such layers though they may have a bias.
    """
    return _Finder(program, exact, linear).find()


class _Finder:
    def __init__(self, program: Program, exact: Exact, linear: list[Linear]) -> None:
        self._program, self._exact, self._linear = program, exact, linear

    def find(self) -> tuple[list[Scaling], dict[int, str]]:
        """The layers, and for other norms the reason why they are none."""
        found: list[Scaling] = []
        reasons: dict[int, str] = {}
        for call in sorted(self._program.calls, key=lambda c: (c.span[1] - c.span[0], c.index)):
            is_norm = isinstance(call.module, NORM_TYPES)
            if call.span[0] < 0 and not call.loop:
                continue  # traced in a program that was not kept
            try:
                scaling = self._scaling(call, found)
            except UnfoldableError as reason:
                if is_norm:
                    reasons[call.index] = str(reason)
                continue
            if scaling is not None:
                found.append(scaling)
            elif is_norm:
                reasons[call.index] = "it has no scale and no shift"
        return sorted(found, key=lambda each: each.call.index), reasons

    def _scaling(self, call: Call, found: list[Scaling]) -> Scaling | None:
        """A call as one that scales and shifts; None if it does not."""
        if call.loop:
            raise UnfoldableError(f"it is called inside a {call.loop}")
        if call.several:
            raise UnfoldableError("it is called more than once")
        if len(call.leaves) != 1:
            raise UnfoldableError("it returns several arrays")
        if any(call.holds(other.call.span[0]) for other in found):
            return None  # the layer within it is the one
        if any(call.holds(each.position) for each in self._linear):
            return None
        inside = call.leaves[0][0]
        entered = {inner: (leaf, outer) for leaf, outer, inner in call.enters}
        form = AffineForms(self._exact, is_base=entered.__contains__).of(inside)
        if form.is_plain:
            return None
        variables = {v for v in self._variables_within(call) if v in self._exact.known}
        if not variables:
            return None
        if not (np.all(np.isfinite(form.scale)) and np.all(np.isfinite(form.shift))):
            raise UnfoldableError("its scale or shift is not finite")
        self._check_variables(call, variables)
        coefficients = (form.scale, form.shift, bool(form.shifts))
        if form.base in entered and self._stays_in_place(form, inside):
            argument, source = entered[form.base]
            return Scaling(call, *coefficients, True, {}, argument, source)
        return Scaling(call, *coefficients, False, self._neutral(form, variables))

    def _variables_within(self, call: Call) -> list[int]:
        return [
            variable
            for variable in self._program.variables
            if any(call.holds(p) for p in self._program.readers.get(variable, ()))
        ]

    def _check_variables(self, call: Call, variables: set[int]) -> None:
        for variable in variables:
            readers = self._program.readers.get(variable, ())
            if variable in self._program.outputs or not all(map(call.holds, readers)):
                raise UnfoldableError("its variables are used elsewhere")

    def _stays_in_place(self, form: Affine, value: int) -> bool:
        """True if moves bring every element back to where it was."""
        before, after = self._program.shape(form.base), self._program.shape(value)
        if before != after:
            return False
        if not form.moves:
            return True
        places = moved = np.arange(np.prod(before, dtype=np.int64)).reshape(before)
        for each in form.moves:
            moved = each.forward(moved)
        return np.array_equal(places, moved)

    def _neutral(self, form: Affine, variables: set[int]) -> dict[int, np.ndarray]:
        """The values of a norm's variables for which it neither scales nor shifts at its end."""
        values = {}
        for role, wanted in (("scale", form.scale), ("shift", form.shift)):
            if not np.any(wanted != (1 if role == "scale" else 0)):
                continue
            fitting = []
            for variable in variables:
                array = self._exact.value(variable)
                offset = _offset_of(array, wanted)
                if offset is not None and (role == "scale" or offset == 0):
                    fitting.append((variable, offset))
            fitting = [each for each in fitting if each[1] == 0] or fitting
            if len(fitting) != 1:
                raise UnfoldableError(f"its {role} is not one of its variables")
            [(variable, offset)] = fitting
            array = self._exact.value(variable)
            values[variable] = np.full_like(array, 1 - offset if role == "scale" else 0)
        return values


def _offset_of(array: np.ndarray, coefficient: np.ndarray) -> float | None:
    """The number that is added to a variable to give a coefficient of its size, if there is one."""
    if array.size < coefficient.size:
        return None
    try:
        wide = np.broadcast_to(coefficient, (1,) * (coefficient.ndim - array.ndim) + array.shape)
    except ValueError:
        return None
    difference = (wide.reshape(array.shape) - array).ravel()
    offset = round(float(difference[0]), 9) if difference.size else 0.0
    return offset if np.allclose(difference, offset, rtol=0, atol=1e-9) else None
