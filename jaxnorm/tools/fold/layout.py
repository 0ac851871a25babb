"""Operations that move the elements of an array, and coefficients that follow them.

A coefficient stands for an array in compact form: of its rank, with length 1 along each axis on
which it does not depend. So the coefficients of a norm over (64, 56, 56, 256) are (1, 1, 1, 256).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


def compact(array: np.ndarray) -> np.ndarray:
    """An array without the axes along which it does not change."""
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = np.take(array, [0], axis)
            if array.strides[axis] == 0 or np.array_equal(
                np.broadcast_to(first, array.shape), array, equal_nan=True
            ):
                array = first
    return array


def varies_only_on(coefficient: np.ndarray, axes: Any) -> bool:
    """True if a coefficient depends on no other axes than these."""
    return all(size == 1 or axis in axes for axis, size in enumerate(coefficient.shape))


@dataclass(frozen=True)
class Reshape:
    """Another shape for the same elements in the same order."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def forward(self, coefficient: np.ndarray) -> np.ndarray:
        """The coefficient of the result, from that of the operand."""
        return _reshaped(coefficient, self.before, self.after)

    def backward(self, coefficient: np.ndarray) -> np.ndarray:
        """The coefficient of the operand, from that of the result."""
        return _reshaped(coefficient, self.after, self.before)

    def undo(self, array: np.ndarray) -> np.ndarray:
        """The operand, from the result."""
        return array.reshape(self.before)


@dataclass(frozen=True)
class Transpose:
    """The axes of an array in another order."""

    permutation: tuple[int, ...]

    def forward(self, coefficient: np.ndarray) -> np.ndarray:
        """The coefficient of the result, from that of the operand."""
        return coefficient.transpose(self.permutation)

    def backward(self, coefficient: np.ndarray) -> np.ndarray:
        """The coefficient of the operand, from that of the result."""
        return coefficient.transpose(np.argsort(self.permutation))

    undo = backward


@dataclass(frozen=True)
class Reverse:
    """The elements along some axes in reverse order."""

    axes: tuple[int, ...]

    def forward(self, coefficient: np.ndarray) -> np.ndarray:
        """The coefficient of the result, from that of the operand."""
        return np.flip(coefficient, self.axes)

    backward = undo = forward


Move = Reshape | Transpose | Reverse


def move(name: str, params: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Move | None:
    """The move that an equation of a program is; None if it is another thing."""
    if name in ("reshape", "squeeze", "expand_dims"):
        return Reshape(before, after)
    if name == "transpose":
        return Transpose(tuple(params["permutation"]))
    if name == "rev":
        return Reverse(tuple(params["dimensions"]))
    if name == "broadcast_in_dim" and math.prod(before) == math.prod(after):
        kept = tuple(params["broadcast_dimensions"])
        if kept == tuple(sorted(kept)) and all(after[a] == n for a, n in zip(kept, before)):
            return Reshape(before, after)
    return None


def pulled_back(moves: tuple[Move, ...], coefficient: np.ndarray) -> np.ndarray:
    """The coefficient before some moves, from that after them."""
    for each in reversed(moves):
        coefficient = each.backward(coefficient)
    return coefficient


def undone(moves: tuple[Move, ...], array: np.ndarray) -> np.ndarray:
    """The array before some moves, from that after them."""
    for each in reversed(moves):
        array = each.undo(array)
    return array


def _reshaped(
    coefficient: np.ndarray, before: tuple[int, ...], after: tuple[int, ...]
) -> np.ndarray:
    """A coefficient of an array of shape `before`, as one of its reshaped form."""
    full: list[int] = []  # what is reshaped: axes on which the coefficient depends, at their length
    shape: list[int] = []
    for here, there in _groups(before, after):
        if all(coefficient.shape[a] == 1 for a in here):
            full += [1] * len(here)
            shape += [1] * len(there)
        else:
            full += [before[a] for a in here]
            shape += [after[a] for a in there]
    return compact(np.broadcast_to(coefficient, full).reshape(shape))


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[range, range]]:
    """The axes of two shapes in the smallest groups that hold equally many elements."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left = before[i] if i < len(before) else 1
        right = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while left != right:
            if (left < right or j == len(after)) and i < len(before):
                left *= before[i]
                i += 1
            else:
                right *= after[j]
                j += 1
        groups.append((range(start_i, i), range(start_j, j)))
    return groups
