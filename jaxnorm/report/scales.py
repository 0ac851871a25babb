"""The style of each measure in charts: its name, its colours, and its good values.

The colours are those of a light page. In the dark the page replaces them by the colours of `THEME`,
and values far from good become bright. The colour-blind can distinguish blue from orange, and
purple by its lightness.
"""

from typing import Literal, NamedTuple

from jaxnorm.report.pack import Mode

Kind = Literal["linear", "log", "symlog", "sqrt"]

NEUTRAL = ("#efeeea", "#2a2e35")  # the colour of good values: light page, dark page
_FAR_LOW, _LOW, _HIGH, _FAR_HIGH = "#053061", "#4393c3", "#e08214", "#7f3b08"
_SOME, _MUCH, _FAR = "#b7a3d0", "#7b5aa6", "#3f1b6b"
# Cividis, for measures without a good value.
FREE = ("#00204d", "#414d6b", "#7c7b78", "#bcaf6f", "#ffea46")
NOT_FINITE = "#d6006c"

THEME = {  # colour on a light page -> colour on a dark page
    NEUTRAL[0]: NEUTRAL[1],
    _FAR_LOW: "#b3dbff",
    _LOW: "#3f86c4",
    _HIGH: "#c8741a",
    _FAR_HIGH: "#ffcf94",
    _SOME: "#5b4a80",
    _MUCH: "#9a7fd1",
    _FAR: "#d9c8ff",
    NOT_FINITE: "#ff4d9e",
}


class MeasureStyle(NamedTuple):
    """The style of one measure in charts: name, scale, colours, explanations."""

    label: str
    kind: Kind
    colours: dict[float, str] | None
    """Value -> colour. None if the scale comes from the values of the runs."""
    good: str
    """One sentence that says which values are good."""
    bad: str
    """Sentences that say what the other colours mean."""
    compares: bool = False
    """True if it compares with the sample before, so that the first sample has no value."""

    @property
    def mode(self) -> Mode:
        """The mode in which the numbers of the measure are packed."""
        return _MODES[self.kind]


_MODES: dict[Kind, Mode] = {"linear": "linear", "log": "log", "sqrt": "log", "symlog": "signed"}


def _around(*stops: float) -> dict[float, str]:
    colours = (_FAR_LOW, _LOW, NEUTRAL[0], _HIGH, _FAR_HIGH)
    return dict(zip(stops, colours, strict=True))


def _above(*stops: float) -> dict[float, str]:
    return dict(zip(stops, (NEUTRAL[0], _SOME, _MUCH, _FAR), strict=True))


_SPREAD = _around(0.01, 0.1, 1.0, 4.0, 16.0)
_NATS = _above(0.0, 0.05, 0.5, 5.0)
_SHARE = _above(0.0, 0.3, 0.6, 1.0)

STYLES = {
    "spread": MeasureStyle(
        "spread of a channel", "log", _SPREAD,
        "Good is neutral, the shade of 1, in every row and from the first step on.",
        "Blue: the examples have become indistinguishable to this layer, and no gradient separates "
        "them. Orange: inputs so large that a sigmoid saturates.",
    ),
    "mean": MeasureStyle(
        "mean", "symlog", _around(-10, -1, 0, 1, 10),
        "Good is neutral, the shade of 0, after a normalization; elsewhere a colour that stays.",
        "Blue lies below zero, orange above; a row that changes its colour moves.",
    ),
    "deviation": MeasureStyle(
        "standard deviation", "log", _SPREAD,
        "Good is neutral, the shade of 1, in every row and from the first step on.",
        "Blue: a signal that dies out. Orange: one that grows. Shades that deepen from row to row "
        "are a network that shrinks or blows up what passes through it.",
    ),
    "mean_drift": MeasureStyle(
        "mean drift", "sqrt", _above(0.0, 0.1, 0.5, 2.0),
        "Good is neutral, the shade of 0, and stays so.",
        "Purple: the mean moved since the sample before; the layers above have to follow.", True,
    ),
    "variance_ratio": MeasureStyle(
        "variance ratio", "log", _around(0.1, 0.5, 1.0, 2.0, 10.0),
        "Good is neutral, the shade of 1: the deviation is that of the sample before.",
        "Blue: it shrank. Orange: it grew.", True,
    ),
    "kl_divergence": MeasureStyle(
        "KL divergence", "sqrt", _NATS,
        "Good is neutral, the shade of 0: the distribution stays where it is.",
        "Purple: mean or variance are not those of the sample before.", True,
    ),
    "histogram_kl": MeasureStyle(
        "KL divergence of histograms", "sqrt", _NATS,
        "Good is neutral, the shade of 0: the distribution keeps its shape.",
        "Purple: its shape is not that of the sample before.", True,
    ),
    "population_stability_index": MeasureStyle(
        "population stability index", "sqrt", _above(0.0, 0.1, 0.25, 1.0),
        "Good is neutral: below 0.1 a distribution counts as stable.",
        "Between 0.1 and 0.25 it has moved a little, above that a lot.", True,
    ),
    "skewness": MeasureStyle(
        "skewness", "symlog", _around(-10, -2, 0, 2, 10),
        "Good is neutral, the shade of 0: as symmetric as a normal distribution.",
        "Blue: a long tail to the left. Orange: one to the right, as after every ReLU.",
    ),
    "excess_kurtosis": MeasureStyle(
        "excess kurtosis", "symlog", _around(-10, -2, 0, 3, 30),
        "Good is neutral, the shade of 0: tails as of a normal distribution.",
        "Orange: few elements carry most of the signal. Blue: two clusters, or hard limits.",
    ),
    "minimum": MeasureStyle(
        "minimum", "symlog", _around(-100, -10, 0, 10, 100),
        "Good is a colour that stays.", "A shade that deepens is a tail that grows.",
    ),
    "maximum": MeasureStyle(
        "maximum", "symlog", _around(-100, -10, 0, 10, 100),
        "Good is a colour that stays.", "A shade that deepens is a tail that grows.",
    ),
    "zeros": MeasureStyle(
        "zeros", "linear", _SHARE,
        "Good is about half after a ReLU, and none elsewhere.",
        "Dark purple: hardly anything comes through.",
    ),
    "saturated": MeasureStyle(
        "saturated", "linear", _SHARE,
        "Good is the lighter half: most elements lie where the nonlinearity has a slope.",
        "Dark purple: elements that no gradient passes.",
    ),
    "dead": MeasureStyle(
        "dead", "linear", _SHARE,
        "Good is neutral, the shade of 0: each channel is alive for some example.",
        "Purple: channels that are flat for every example, and learn nothing more.",
    ),
    "nonfinite": MeasureStyle(
        "not finite", "linear", _above(0.0, 0.01, 0.1, 1.0),
        "Good is neutral, the shade of 0, everywhere.",
        "The first cell of another shade is where a run broke.",
    ),
    "gradient_norm": MeasureStyle(
        "gradient norm", "log", None,
        "Good is about one shade in all rows: the gradient reaches each layer.",
        "Shades that change from row to row are gradients that vanish or explode with depth.",
    ),
    "running_kl": MeasureStyle(
        "running against batch", "sqrt", _NATS,
        "Good is neutral, the shade of 0, soon after the start: evaluation will see what training "
        "sees.",
        "Purple: the running statistics are not those of the batch.",
    ),
    "effective_batch": MeasureStyle(
        "effective batch", "log", None,
        "Good is bright: the statistics come from many independent numbers.",
        "Dark: they come from few, and are noise.",
    ),
    "near_epsilon": MeasureStyle(
        "near epsilon", "linear", _SHARE,
        "Good is neutral, the shade of 0: epsilon changes no channel.",
        "Purple: channels so constant that epsilon decides how they are scaled.",
    ),
}  # fmt: skip

CHANNELS = MeasureStyle(
    "nats", "sqrt", _NATS,
    "Good is neutral soon after the start, in every channel.",
    "Purple: train/eval divergence, a channel that evaluation will not normalize as training does. "
    "The rows are the channels with the largest divergence.",
)  # fmt: skip
UPDATES = MeasureStyle(
    "update to weight", "log", _around(1e-6, 1e-4, 1e-3, 1e-2, 1e-1),
    "Good is close to neutral, a thousandth, in every row.",
    "Blue: parameters that hardly move. Orange: parameters that jump.",
)  # fmt: skip
