"""Hand-written kernels, and the one function that chooses an implementation and can explain it.

`dispatch` decides, with the reasons of `refusals`; `operator` makes a kernel work under every
transformation; `block` brings the mathematics of `core` onto a block in on-chip memory. `tpu`, with
`tiles` and `chunks`, and `gpu` cut arrays into such blocks.
"""

from jaxnorm.kernels.explain import explain

__all__ = ["explain"]
