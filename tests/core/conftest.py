"""Both ways in which moments are measured: a CPU's own, and that of all other platforms."""

import jax
import pytest

from jaxnorm.core import cpu


@pytest.fixture(scope="module", params=["as on CPUs", "as elsewhere"])
def ways_to_measure(request):
    """What runs on GPUs and TPUs is judged on the CPU, where it would not run by itself."""
    if request.param == "as on CPUs":
        yield
        return
    jax.clear_caches()  # of what was compiled in the other way
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "is_unsharded", lambda x: False)
        yield
    jax.clear_caches()
