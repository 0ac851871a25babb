"""A pytest plugin that runs Flax's own tests against jaxnorm's layers.

Flax's tests look layers up as attributes of `flax.linen` and `flax.nnx`, so setting those is all it
takes. `run.py` beside this file fetches the tests and runs them.
"""

import flax.linen
import flax.nnx

import jaxnorm.linen
import jaxnorm.nnx

for ours, theirs in ((jaxnorm.linen, flax.linen), (jaxnorm.nnx, flax.nnx)):
    for name in ours.__all__:
        setattr(theirs, name, getattr(ours, name))
