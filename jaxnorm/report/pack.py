"""Numbers for a page in few bytes, at the resolution of a screen.

A screen shows no more than 251 shades or heights, so each number takes one byte.
"""

import base64
import zlib
from typing import Literal

import numpy as np

Mode = Literal["linear", "log", "sqrt", "signed"]
MODES: tuple[Mode, ...] = ("linear", "log", "sqrt", "signed")
"""Ways to distribute the levels between the least and the largest number."""
LEVELS = 251
ZERO, LOWEST, HIGHEST, NOTHING = 252, 253, 254, 255
"""Codes of a zero in mode "log", of minus and plus infinity, and of NaN."""
NEAR = 0.1
"""Below this size the levels of "signed" have equal distances; above it the distances grow."""

_FORWARD = {
    "linear": lambda a: a,
    "log": np.log10,
    "sqrt": np.sqrt,
    "signed": lambda a: np.arcsinh(a / NEAR),
}


class Packer:
    """Arrays one after another, with one byte for each number.

    `runs.js` of the page has the inverse.

    Example:
        >>> packer = Packer()
        >>> packer.add(np.array([0.0, 1.0, 2.5, np.nan]), "linear")
        [0, 0.0, 2.5, 0]
        >>> list(zlib.decompress(base64.b64decode(packer.text())))
        [0, 100, 250, 255]
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, values: np.ndarray, mode: Mode) -> list[float]:
        """Append an array to the packed numbers.

        Args:
            values: an array of any shape and range.
            mode: how the levels are distributed. "log" and "sqrt" are for arrays without negative
                numbers.

        Returns:
            The position of the array, the lowest and the highest level, and the number of its mode.

        Raises:
            Nothing of its own.
        """
        values = np.asarray(values, np.float64).ravel()
        codes = np.full(values.shape, NOTHING, np.uint8)
        codes[values == np.inf], codes[values == -np.inf] = HIGHEST, LOWEST
        usable = np.isfinite(values)
        if mode == "log":
            codes[values == 0] = ZERO
            usable &= values > 0
        mapped = _FORWARD[mode](values[usable])
        low, high = (_short(f(mapped)) if mapped.size else 0.0 for f in (np.min, np.max))
        shares = (mapped - low) / (high - low) if high > low else np.zeros_like(mapped)
        codes[usable] = np.clip(np.rint(shares * (LEVELS - 1)), 0, LEVELS - 1)
        start = self._size
        self._parts.append(codes.tobytes())
        self._size += codes.size
        return [start, low, high, MODES.index(mode)]

    def text(self) -> str:
        """All packed numbers as text: deflated, in base64."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), 9)).decode("ascii")


def _short(number: float) -> float:
    return float(f"{number:.5g}")
