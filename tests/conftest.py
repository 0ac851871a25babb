"""Settings of all tests: eight CPU devices, no search for a TPU, programs that compile quickly."""

import gc
import os
import sys

import pytest
from compiling import QUICK_FLAGS

pytest_plugins = ("budget", "sample", "schedule")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    flags = f"{flags} --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = " ".join((*QUICK_FLAGS, flags))
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start, too
# Without bytecode that is kept, each of these would compile all of JAX's source anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The plugin of the one would put jaxnorm's layers in place of Flax's for all other tests; the other
# needs PyTorch.
collect_ignore = ["flax_suite", "torch_suite", "mutations"]


@pytest.fixture
def compilations():
    """What JAX compiles from here on, or reads from its cache: the name of an event for each."""
    import jax

    found = []

    def listen(event, *_, **__):
        found.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "optimized: it judges what a compiler makes of a program, with all it can do"
    )
    config.addinivalue_line(
        "markers",
        "unchecked_types: it passes what annotations forbid, or what their checker does not know",
    )


def pytest_collection_finish():
    """What is imported stays: looking through it for garbage again and again takes a tenth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before what the test and its file set up: how that is compiled, and what is checked."""
    import jax  # not before the settings above
    import jaxtyping

    unchecked = item.get_closest_marker("unchecked_types") is not None
    jaxtyping.config.update("jaxtyping_disable", unchecked)
    quick = item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
