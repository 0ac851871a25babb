"""Tools for testing a normalization: the right answer, and how far a result may be from it.

`oracle` computes every public function and its backward pass in NumPy, in at least float64 and
independently of JAX. `assert_close` compares in units of rounding of the result's dtype, with a
budget that follows from dtype and conditioning; `tolerance`, `rounding_units`, `condition_number`
and `sum_conditioning` are its parts.

Example:
    >>> import numpy as np
    >>> from jaxnorm.testing import assert_close, oracle
    >>> x = np.float32([[1000.0, 1001.0, 1003.0]])
    >>> d = x - x[:, :1]
    >>> d = d - d.mean(-1, keepdims=True)
    >>> y = d / np.sqrt((d * d).mean(-1, keepdims=True) + np.float32(1e-6))
    >>> assert_close(y, oracle.layer_norm(x), np.float32)
"""

from jaxnorm.testing import oracle
from jaxnorm.testing.tolerances import (
    BUDGETS,
    TERMS_IN_BUDGET,
    assert_close,
    condition_number,
    rounding_units,
    sum_conditioning,
    tolerance,
)

__all__ = [
    "BUDGETS",
    "TERMS_IN_BUDGET",
    "assert_close",
    "condition_number",
    "oracle",
    "rounding_units",
    "sum_conditioning",
    "tolerance",
]
