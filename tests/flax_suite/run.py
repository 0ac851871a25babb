"""Run the normalization tests of the installed Flax with jaxnorm's layers in place of its own.

`python tests/flax_suite/run.py [pytest arguments]` downloads the source distribution of the
installed Flax version with pip (the wheel has no tests), and runs its Linen and NNX normalization
tests under the plugin `swap`.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from compiling import QUICK_FLAGS  # noqa: E402  (found on the path of the line before)

TESTS = ("linen/linen_test.py::NormalizationTest", "nnx/nn/normalization_test.py")


def main() -> int:
    """Exit status of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
        subprocess.run(
            [sys.executable, "-m", "pip", *fetch, f"flax=={version('flax')}"], check=True
        )
        (archive,) = Path(folder).glob("flax-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (tests,) = Path(folder).glob("flax-*/tests")
        path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "swap", "-q", *sys.argv[1:], *TESTS],
            cwd=tests,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "XLA_FLAGS": " ".join(QUICK_FLAGS),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
