"""Settings of all tests: eight CPU devices, and no search for a TPU that is not there."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

# What these judge does not hang on how well programs are compiled, which takes most of their time;
# but for what is compiled for TPUs.
UNOPTIMIZED, OPTIMIZED = ("lab", "monitor", "training"), ("test_collectives",)

# Importing its plugin would put jaxnorm's layers in place of Flax's for all other tests.
collect_ignore = ["flax_suite"]


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    """Without most optimizations, where they do not matter."""
    import jax  # not before the settings above

    path = request.node.path
    unoptimized = path.parent.name in UNOPTIMIZED and path.stem not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", unoptimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
