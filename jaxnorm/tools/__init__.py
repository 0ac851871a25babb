"""Model surgery: what people do to the normalization of a network that is trained.

Linen and NNX models are taken as they are. Nothing is changed in place: a model and its variables
go in, others come out. What cannot be done exactly is refused, with the reason.
"""

from jaxnorm.tools.recalibrate import (
    LayerShift,
    Recalibrated,
    RecalibrationReport,
    adapt,
    recalibrate,
)  # fmt: skip

__all__ = ["LayerShift", "Recalibrated", "RecalibrationReport", "adapt", "recalibrate"]
