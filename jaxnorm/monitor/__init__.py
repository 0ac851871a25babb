"""Instruments that show what happens inside a network as it trains.

    step = make_train_step(model, optimizer, loss, monitor=Monitor(every=64))

observes every normalization layer and every nonlinearity of a model that is left as it is, inside
the compiled step. `attach` and `observe` are for other training loops. The measures of shift are
pure functions. README.md in this folder shows how the numbers flow.
"""

from jaxnorm.monitor.diagnosis.diagnose import diagnose
from jaxnorm.monitor.diagnosis.findings import Finding, Findings
from jaxnorm.monitor.monitor import Monitor
from jaxnorm.monitor.probe.attach import attach
from jaxnorm.monitor.probe.observations import Observation, Observations
from jaxnorm.monitor.probe.observe import observe
from jaxnorm.monitor.probe.summary import EDGES, BatchSummary, Summary
from jaxnorm.monitor.samples.gradient_shift import (
    GradientShift,
    Landscape,
    internal_covariate_shift,
    loss_landscape,
)
from jaxnorm.monitor.samples.measures import MEASURES, measure, quantiles
from jaxnorm.monitor.samples.recording import Recording, RecordingError
from jaxnorm.monitor.samples.shift import (
    excess_kurtosis,
    kl_divergence,
    mean_drift,
    population_stability_index,
    skewness,
    track_covariate_shift,
    variance_ratio,
)

__all__ = [
    "EDGES",
    "MEASURES",
    "BatchSummary",
    "Finding",
    "Findings",
    "GradientShift",
    "Landscape",
    "Monitor",
    "Observation",
    "Observations",
    "Recording",
    "RecordingError",
    "Summary",
    "attach",
    "diagnose",
    "excess_kurtosis",
    "internal_covariate_shift",
    "kl_divergence",
    "loss_landscape",
    "mean_drift",
    "measure",
    "observe",
    "population_stability_index",
    "quantiles",
    "skewness",
    "track_covariate_shift",
    "variance_ratio",
]
