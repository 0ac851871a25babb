"""Layouts of one array in PyTorch and in Flax, and the way from the one to the other and back."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ArrayLayout:
    """The way of one array, in steps that can each be undone.

    Flax's array is a part of PyTorch's, split, transposed, flipped and reshaped, and then
    `(value + offset) * factor`.

    Attributes:
        how: the change in words, for a table.
        torch_shape: shape in PyTorch, of the whole array.
        flax_shape: shape in Flax.
        part: (axis, number, count): Flax's array is this one of equal parts along the axis.
        split: shape before the axes are exchanged.
        axes: order of the axes of `split` in Flax.
        flip: axes that run backwards in Flax, after the exchange.
        offset: is added; the difference of the constants that are added to scales.
        factor: multiplies; of running variances.
    """

    how: str
    torch_shape: Shape
    flax_shape: Shape
    part: tuple[int, int, int] | None = None
    split: Shape | None = None
    axes: Shape | None = None
    flip: Shape = ()
    offset: float = 0.0
    factor: float = 1.0

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Flax's array from PyTorch's."""
        if self.part:
            axis, number, count = self.part
            array = np.split(array, count, axis)[number]
        if self.split is not None:
            array = array.reshape(self.split)
        if self.axes is not None:
            array = array.transpose(self.axes)
        array = np.flip(array, self.flip).reshape(self.flax_shape)
        if self.offset or self.factor != 1.0:
            array = ((array.astype(np.float64) + self.offset) * self.factor).astype(array.dtype)
        return array

    def to_torch(self, array: np.ndarray, into: np.ndarray) -> None:
        """PyTorch's array from Flax's, written into the place that is given."""
        if self.offset or self.factor != 1.0:
            array = (array.astype(np.float64) / self.factor - self.offset).astype(array.dtype)
        if self.part:
            axis, number, count = self.part
            into = np.split(into, count, axis)[number]  # a view
        split = self.split if self.split is not None else into.shape
        axes = self.axes if self.axes is not None else tuple(range(len(split)))
        array = array.reshape([split[a] for a in axes])
        into[...] = np.flip(array, self.flip).transpose(np.argsort(axes)).reshape(into.shape)


def conv(shape: Shape, kernel: Shape) -> ArrayLayout | None:
    """Convolutions: (out, in / groups, *window) to (*window, in / groups, out)."""
    axes = (*range(2, len(shape)), 1, 0)
    if len(shape) != len(kernel) or tuple(shape[a] for a in axes) != kernel:
        return None
    return ArrayLayout(_named("transposed to", axes), shape, kernel, axes=axes)


def transposed_conv(shape: Shape, kernel: Shape, transpose_kernel: bool) -> ArrayLayout | None:
    """Transposed convolutions: (in, out, *window), in one of Flax's two layouts of the kernel."""
    window = range(2, len(shape))
    axes = (*window, 1, 0) if transpose_kernel else (*window, 0, 1)
    if len(shape) != len(kernel) or tuple(shape[a] for a in axes) != kernel:
        return None
    if transpose_kernel:
        return ArrayLayout(_named("transposed to", axes), shape, kernel, axes=axes)
    flip = tuple(range(len(shape) - 2))
    how = f"{_named('transposed to', axes)}, window reversed"
    return ArrayLayout(how, shape, kernel, axes=axes, flip=flip)


def dense(
    shape: Shape,
    kernel: Shape,
    in_out: bool,
    maps: Shape | None = None,
    part: tuple[int, int] | None = None,
    n_in: int = 1,
) -> ArrayLayout | None:
    """Dense layers: (out, in) to (*in, *out).

    Args:
        shape: PyTorch's.
        kernel: Flax's.
        in_out: PyTorch's is (in, out) already, as in GPT-2's `Conv1D`.
        maps: (channels, *window) that PyTorch's input was flattened from.
        part: number and count, if Flax's is one of several parts of the outputs.
        n_in: number of Flax's axes of inputs.
    """
    features = (prod(kernel[:n_in]), prod(kernel[n_in:]))
    count = part[1] if part else 1
    shape = shape[:2] + tuple(n for n in shape[2:] if n != 1)  # a window of one point is none
    if len(shape) != 2:
        return None
    wanted = (features[0], features[1] * count)
    if shape != (wanted if in_out else wanted[::-1]):
        return None
    axis = 1 if in_out else 0
    place = (axis, *part) if part else None
    text = f"part {part[0] + 1} of {count}, " if part else ""
    if maps is not None:
        if in_out or prod(maps) != features[0] or place:
            return None
        n = len(maps)
        axes = (*range(2, n + 1), 1, 0)
        how = f"inputs {maps} reordered to channels last, transposed"
        return ArrayLayout(how, shape, kernel, split=(shape[0], *maps), axes=axes)
    if in_out:
        return ArrayLayout(f"{text}as it is", shape, kernel, part=place)
    return ArrayLayout(f"{text}transposed", shape, kernel, part=place, axes=(1, 0))


def vector(
    shape: Shape, flax: Shape, part: tuple[int, int] | None = None, **change: Any
) -> ArrayLayout | None:
    """Arrays of one value a feature, and whatever has the same order of values in both."""
    count = part[1] if part else 1
    if prod(shape) != prod(flax) * count or (part and len(shape) != 1):
        return None
    squeezed = [[n for n in each if n != 1] for each in (shape, flax)]
    # One axis there may be several here: the heads of an attention.
    if not part and squeezed[0] != squeezed[1] and (len(shape) != 1 or change):
        return None
    how = f"part {part[0] + 1} of {count}" if part else "as it is"
    if shape != flax and not part:
        how = "reshaped"
    if change.get("offset"):
        how = f"{change['offset']:+g}"
    if change.get("factor", 1.0) != 1.0:
        how = f"times {change['factor']:.6g}"
    return ArrayLayout(how, shape, flax, part=(0, *part) if part else None, **change)


def _named(text: str, axes: Shape) -> str:
    return f"{text} ({', '.join(map(str, axes))})"
