"""Break the package on purpose, one patch at a time, and report which tests notice.

`python tests/mutations/run.py [NAME ...]` applies each patch of this folder (or those whose path
holds one of the names) to a copy of the working tree, runs the tests that the patch names until the
first failure, and prints a line: red, or GREEN where nothing failed. The exit status is 1 where
something stays green. It is for authors: run it after a change of the tests.

A patch is what `git diff` prints, below a sentence that says what is wrong and a line `tests:` with
the arguments for pytest that should find it. `--whole` runs the whole suite instead.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FAILED = (1, 2)  # a test failed; pytest stopped at it


@dataclass(frozen=True)
class Mutation:
    """A patch with what its header says."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(HERE).with_suffix("").as_posix()

    @property
    def tests(self) -> list[str]:
        header = self.path.read_text().split("\ndiff --git", 1)[0]
        (line,) = re.findall(r"^tests: (.+)$", header, re.MULTILINE)
        return shlex.split(line)

    def apply(self, tree: Path) -> None:
        subprocess.run(["git", "apply", str(self.path)], cwd=tree, check=True)


def copy_tree(to: Path) -> None:
    """The files that git tracks or does not ignore, as they are in the working tree."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(
        ["xargs", "-0", "cp", "--parents", "--target-directory", str(to)],
        cwd=ROOT, input=names, check=True,
    )  # fmt: skip


def pytest(tree: Path, tests: list[str]) -> tuple[int, str]:
    """The exit status, and what failed first."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "", *tests]
    # `jaxnorm` must be the copy's, in subprocesses too, whatever is installed.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    return done.returncode, failed[0] if failed else done.stdout[-500:] + done.stderr[-500:]


def judge(mutation: Mutation, whole: bool) -> str:
    """Red, GREEN or UNKNOWN; printed with the seconds that it took."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        mutation.apply(tree)
        status, failed = pytest(tree, [] if whole else mutation.tests)
    shown = "red" if status in FAILED else "GREEN" if status == 0 else "UNKNOWN"
    seconds = time.monotonic() - begin
    print(f"{shown:8}{seconds:6.0f} s  {mutation.name}  {failed if status else ''}", flush=True)
    return shown


def main() -> int:
    """Exit status: 1 where a mutation stays green, 2 where one cannot be judged."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the patches' paths; all by default")
    parser.add_argument("--whole", action="store_true", help="the whole suite for each")
    parser.add_argument("--jobs", type=int, default=2, help="patches at a time (default: 2)")
    arguments = parser.parse_args()
    chosen = [
        mutation
        for mutation in map(Mutation, sorted(HERE.rglob("*.patch")))
        if not arguments.names or any(name in mutation.name for name in arguments.names)
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = Counter(pool.map(judge, chosen, [arguments.whole] * len(chosen)))
    print(", ".join(f"{count} {shown}" for shown, count in sorted(found.items())))
    return 2 if found["UNKNOWN"] else int(found["GREEN"] > 0)


if __name__ == "__main__":
    sys.exit(main())
