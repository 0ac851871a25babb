"""Names, numbers and colours that the terminal and the page share."""

from typing import NamedTuple

from jaxnorm.lab.results import StudySummary

NETWORKS = {"mlp": "Deep sigmoid MLP", "conv": "Small convolutional net"}

NORMALIZATIONS = {
    "none": "none",
    "batch": "batch",
    "layer": "layer",
    "group": "group",
    "instance": "instance",
    "rms": "RMS",
    "weight": "weight standardization",
}

COLUMNS = ("accuracy", "best rate", "steps to 90 %", "stable up to")

FOOTNOTE = "-  not applicable: instance normalization averages over pixels, and an MLP has none."


class Line(NamedTuple):
    """The style of the line of one normalization."""

    light: str  # colour on a light page
    dark: str  # colour on a dark page
    dash: tuple[int, ...]  # dash pattern, a second sign beside the colour


# Okabe and Ito's palette, whose colours the colour-blind can distinguish. Its two palest colours
# are darker here on white, and its darkest one is lighter on black.
LINES = {
    "none": Line("#555555", "#bbbbbb", (2, 3)),
    "batch": Line("#005a9c", "#3d9be9", ()),
    "layer": Line("#c98300", "#e69f00", (8, 3)),
    "group": Line("#009e73", "#19b98d", (5, 2, 1, 2)),
    "instance": Line("#b95f90", "#cc79a7", (6, 2)),
    "rms": Line("#d55e00", "#ee7733", (3, 2)),
    "weight": Line("#41a5dd", "#a6dcff", (10, 2, 2, 2)),
}


def cells(row: StudySummary) -> tuple[str, str, str, str]:
    """The cells of one line of the table, without its name, in the order of `COLUMNS`.

    Example:
        >>> cells(StudySummary("mlp", "batch", 0.3, 0.976, 0.005, 0.88, 40, 1.0, 30.0, True))
        ('97.6 ± 0.5 %', '0.3', '40', '≥ 30')
        >>> cells(StudySummary("mlp", "instance"))
        ('-', '-', '-', '-')
    """
    if row.best_rate is None or row.accuracy_mean is None or row.accuracy_deviation is None:
        return "-", "-", "-", "-"
    stable = "none" if row.stable_rate is None else f"{row.stable_rate:g}"
    return (
        f"{100 * row.accuracy_mean:.1f} ± {100 * row.accuracy_deviation:.1f} %",
        f"{row.best_rate:g}",
        "never" if row.steps_to_target is None else str(row.steps_to_target),
        f"≥ {stable}" if row.stable_is_largest else stable,
    )
