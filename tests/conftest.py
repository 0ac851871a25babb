"""One process-wide setting: eight CPU devices, and no search for a TPU that is not there."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

# Importing its plugin would put jaxnorm's layers in place of Flax's for all other tests.
collect_ignore = ["flax_suite"]
