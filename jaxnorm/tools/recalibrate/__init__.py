"""Running statistics of batch norms anew, from data.

* `collect`: the hook that measures the input of a norm where it is called;
* `subject`: a Linen or NNX model as a pure pass, and its statistics;
* `order`: which norm feeds which, from the traced program;
* `passes`: batches in, pooled moments out; `report`: how far each layer moved.
"""

from jaxnorm.tools.recalibrate.recalibrate import Recalibrated, adapt, recalibrate
from jaxnorm.tools.recalibrate.report import LayerShift, RecalibrationReport

__all__ = ["LayerShift", "Recalibrated", "RecalibrationReport", "adapt", "recalibrate"]
