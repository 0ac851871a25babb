"""Numbers for a page in few bytes: a screen shows neither the 251st shade nor the 251st height."""

import base64
import zlib
from typing import Literal

import numpy as np

Mode = Literal["linear", "log", "sqrt", "signed"]
MODES: tuple[Mode, ...] = ("linear", "log", "sqrt", "signed")
"""How levels are spread between the least and the largest number."""
LEVELS = 251
ZERO, LOWEST, HIGHEST, NOTHING = 252, 253, 254, 255
"""Codes of a zero where there is no logarithm of it, of the infinities, of what is no number."""
NEAR = 0.1
"""Up to here the levels of "signed" are evenly spread; further out they grow with the number."""

_FORWARD = {
    "linear": lambda a: a,
    "log": np.log10,
    "sqrt": np.sqrt,
    "signed": lambda a: np.arcsinh(a / NEAR),
}


class Packer:
    """Arrays behind one another, a byte for each number.

    The page has the way back, in `runs.js`.

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
        """Take an array in.

        Args:
            values: of any shape and range.
            mode: how its levels are spread; "log" and "sqrt" are for what is nowhere negative.

        Returns:
            Where it begins, the ends of its levels, and the number of its mode.

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
        spread = _FORWARD[mode](values[usable])
        low, high = (_short(f(spread)) if spread.size else 0.0 for f in (np.min, np.max))
        shares = (spread - low) / (high - low) if high > low else np.zeros_like(spread)
        codes[usable] = np.clip(np.rint(shares * (LEVELS - 1)), 0, LEVELS - 1)
        start = self._size
        self._parts.append(codes.tobytes())
        self._size += codes.size
        return [start, low, high, MODES.index(mode)]

    def text(self) -> str:
        """All of it: deflated, in base64."""
        return base64.b64encode(zlib.compress(b"".join(self._parts), 9)).decode("ascii")


def _short(number: float) -> float:
    return float(f"{number:.5g}")
