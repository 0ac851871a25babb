"""Hand-written kernels, and the one function that chooses an implementation and can explain it.

`choice` decides, `operator` makes a kernel work under every transformation, `held` brings the
mathematics of `core` onto a block. `tpu`, with `tiles` and `pieces`, and `gpu` cut arrays into such
blocks.
"""

from jaxnorm.kernels.explain import explain

__all__ = ["explain"]
