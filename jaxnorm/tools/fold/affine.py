"""Affine forms of values: which value each one is a scaled, shifted and moved copy of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jaxnorm.tools.fold.exact import SAME, Exact
from jaxnorm.tools.fold.layout import Move, compact, move

ARITHMETIC = ("add", "add_any", "sub", "mul", "div")


@dataclass(frozen=True)
class Affine:
    """A value as ``scale * moved(base) + shift``.

    Attributes:
        base: the value that is scaled.
        moves: what moves the elements of the base to those of the value.
        scale, shift: coefficients, in float64, of the rank of the value.
        shifts: known values that were added.
        path: values between the base and this one, this one included.
    """

    base: int
    moves: tuple[Move, ...]
    scale: np.ndarray
    shift: np.ndarray
    shifts: tuple[int, ...] = ()
    path: tuple[int, ...] = ()

    @property
    def is_unscaled(self) -> bool:
        """True if nothing scales the base."""
        return bool(np.all(self.scale == 1))

    @property
    def is_plain(self) -> bool:
        """True if the base is neither scaled nor shifted."""
        return self.is_unscaled and not np.any(self.shift) and not self.shifts


class AffineForms:
    """The affine forms of the values of a program.

    Args:
        exact: the known values.
        is_base: true for values that no form may reach behind.
        fixed: true for known values that coefficients may be made of.
    """

    def __init__(
        self,
        exact: Exact,
        is_base: Callable[[int], bool] = lambda value: False,
        fixed: Callable[[int], bool] | None = None,
    ) -> None:
        self._exact = exact
        self._program = exact.program
        self._is_base = is_base
        self._fixed = fixed or exact.known.__contains__
        self._forms: dict[int, Affine] = {}

    def of(self, value: int) -> Affine:
        """The affine form of a value; of a value that is made otherwise, the value itself."""
        pending = [value]
        while pending:  # operands first; a recursion might be too deep
            here = pending[-1]
            if here in self._forms:
                pending.pop()
                continue
            wanted = [o for o in self._followed(here) if o not in self._forms]
            if wanted:
                pending.extend(wanted)
            else:
                self._forms[here] = self._form(here)
        return self._forms[value]

    def _followed(self, value: int) -> list[int]:
        position = self._program.makers.get(value)
        if position is None or self._is_base(value):
            return []
        return [o for o in self._program.equations[position].operands if not self._fixed(o)]

    def _itself(self, value: int) -> Affine:
        ones = np.ones((1,) * len(self._program.shape(value)))
        return Affine(value, (), ones, 0 * ones)

    def _form(self, value: int) -> Affine:
        itself = self._itself(value)
        followed = self._followed(value)
        if not followed:
            return itself
        equation = self._program.equations[self._program.makers[value]]
        name, operands = equation.name, equation.operands
        first = self._forms.get(operands[0])
        before, shape = self._program.shape(operands[0]), self._program.shape(value)
        if len(followed) == 2 and name == "mul":
            # The scales of a product multiply, if neither factor is shifted.
            left, right = (self._forms[o] for o in followed)
            if not (left.shifts or right.shifts or np.any(left.shift) or np.any(right.shift)):
                return replace(itself, scale=compact(left.scale * right.scale))
        if len(followed) != 1:
            return itself
        if name in SAME and first is not None:
            return replace(first, path=(*first.path, value))
        if first is not None and (moved := move(name, equation.params, before, shape)):
            return replace(
                first,
                moves=(*first.moves, moved),
                scale=moved.forward(first.scale),
                shift=moved.forward(first.shift),
                path=(*first.path, value),
            )
        form = self._forms[followed[0]]
        if self._program.shape(followed[0]) != shape:
            # An axis of length 1 is repeated: only the coefficients are known of the result.
            if name not in ARITHMETIC:
                return itself
            form = replace(form, base=value, moves=())
        if name == "neg":
            return replace(form, scale=-form.scale, shift=-form.shift, path=(*form.path, value))
        if name not in ARITHMETIC or len(operands) != 2:
            return itself
        [other] = [o for o in operands if o != followed[0]]
        constant = compact(np.asarray(self._exact.value(other)))
        if constant.ndim != len(shape):
            constant = constant.reshape((1,) * len(shape))  # a number for an array
        behind = operands[0] == other
        if name in ("add", "add_any", "sub"):
            scale, shift = form.scale, form.shift
            if name == "sub":
                constant = constant if behind else -constant
                scale, shift = (-scale, -shift) if behind else (scale, shift)
            return replace(
                form,
                scale=scale,
                shift=compact(shift + constant),
                shifts=(*form.shifts, other),
                path=(*form.path, value),
            )
        if name == "mul" or (name == "div" and not behind):
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                factor = constant if name == "mul" else 1 / constant
                return replace(
                    form,
                    scale=compact(form.scale * factor),
                    shift=compact(form.shift * factor),
                    path=(*form.path, value),
                )
        return itself
