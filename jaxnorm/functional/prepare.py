"""The checks that all stateless normalizations share."""

from jaxnorm.core import arguments as check
from jaxnorm.core.measure import Reduction
from jaxnorm.distributed.axes import named_axis


def prepared(
    op, x, scale, bias, reduced, epsilon, mask, axis_name, groups, dtype, implementation,
    *, centered=True, blocks=None,
):  # fmt: skip
    """Reduction, mask as booleans and result dtype, from arguments that are checked here."""
    two_pass = check.implementation_of(op, implementation)
    check.not_empty(op, x, reduced)
    epsilon = check.number(op, "epsilon", epsilon, 0.0, float("inf"), "1e-6")
    mask = check.mask_of(op, mask, x)
    replicas = named_axis(op, axis_name, groups)
    dtype = check.result_dtype(op, x, scale, bias, dtype=dtype)
    return Reduction(reduced, epsilon, replicas, centered, two_pass, blocks), mask, dtype
