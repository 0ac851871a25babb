"""Model surgery: what people do to the normalization of a network that is trained.

Linen and NNX models are taken as they are. Nothing is changed in place: a model and its variables
go in, others come out. What cannot be done exactly is refused, with the reason.
"""

from jaxnorm.tools.fold import FoldedModel, FoldReport, fold
from jaxnorm.tools.recalibrate import (
    LayerShift,
    Recalibrated,
    RecalibrationReport,
    adapt,
    recalibrate,
)
from jaxnorm.tools.torch.convert import from_torch, match_torch, to_torch

__all__ = [
    "FoldReport",
    "FoldedModel",
    "LayerShift",
    "Recalibrated",
    "RecalibrationReport",
    "adapt",
    "fold",
    "from_torch",
    "match_torch",
    "recalibrate",
    "to_torch",
]
