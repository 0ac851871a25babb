"""The rules of `diagnose`, each a function of the evidence, from the gravest on.

A rule is one defect: its threshold stands beside it with where it comes from, its finding says
what to do. To add one, write the function and name it here; a network that has the defect and the
healthy networks of the tests judge it.
"""

from jaxnorm.monitor.diagnosis.rules.activations import (
    dead_units,
    depth,
    near_epsilon,
    nonfinite,
    saturated,
)
from jaxnorm.monitor.diagnosis.rules.optimization import drift_after_drop, update_ratio
from jaxnorm.monitor.diagnosis.rules.statistics import (
    frozen_on_shifted,
    half_precision,
    idle_bias,
    imported_momentum,
    never_updated,
    small_batch,
    train_eval_divergence,
)

RULES = (
    nonfinite,
    never_updated,
    frozen_on_shifted,
    train_eval_divergence,
    small_batch,
    imported_momentum,
    half_precision,
    near_epsilon,
    depth,
    dead_units,
    saturated,
    update_ratio,
    drift_after_drop,
    idle_bias,
)
