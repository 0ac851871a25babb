"""Tables of plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows under one another, with every column but the last as wide as its longest text.

    Args:
        rows: equally many texts in each.

    Example:
        >>> print(aligned([("layer", "why"), ("norm_1", "its output is used twice")]))
        layer   why
        norm_1  its output is used twice
    """
    widths = [max(map(len, column)) for column in list(zip(*rows))[:-1]]
    return "\n".join(
        "  ".join((*(text.ljust(width) for text, width in zip(row, widths)), row[-1]))
        for row in rows
    )
