"""Files that exist whole or not at all, even if writing is interrupted."""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_whole(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder; all of them are on disk before any gets its name.

    Args:
        folder: the folder. It is made with its parents if it does not exist.
        contents: file name -> content. A file of the same name is replaced; other files are not
            changed.

    Returns:
        The paths, in the order of `contents`.

    Raises:
        OSError: the folder cannot be made or written. Earlier files are still there.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     [path] = write_whole(Path(parent) / "new", {"a.txt": b"hello"})
        ...     path.read_bytes()
        b'hello'
    """
    written: list[tuple[str, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            written.append((temporary, folder / name))
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # A temporary file is private. Give it the permissions of any other file.
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, path in written:
            os.replace(temporary, path)
    finally:
        for temporary, _ in written:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return [path for _, path in written]


def _umask() -> int:
    mask = os.umask(0)  # the mask cannot be read without setting it
    os.umask(mask)
    return mask
