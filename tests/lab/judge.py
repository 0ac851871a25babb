"""Judge the networks that `jaxnorm demo` has trained: with a normalization they must be healthy.

`python tests/lab/judge.py FOLDER` reads the recordings in the folder and prints what is found.
The exit status is 1 if they find something in a normalized network.
"""

import sys
from pathlib import Path

from jaxnorm.monitor import Recording, diagnose


def main(folder: Path) -> int:
    """Judge the recordings and return the exit status."""
    ill, runs = [], sorted(folder.iterdir())
    for path in runs:
        findings = diagnose(Recording(path))
        print(f"{path.name:14} {', '.join(f.rule for f in findings) or 'nothing found'}")
        if findings and not path.name.endswith("-none"):
            print(findings)
            ill.append(path.name)
    if ill or not runs:
        print(f"must be healthy: {', '.join(ill) or f'{folder}, which holds no recording'}")
    return int(bool(ill) or not runs)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
