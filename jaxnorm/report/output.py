"""Output of the commands: folders that are checked before the work, files written whole."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jaxnorm.files import write_whole


class OutputError(OSError):
    """A folder that cannot be written; the message says which, why, and what to do."""


def check_folder(folder: str | os.PathLike[str], names: tuple[str, ...] = ()) -> Path:
    """Check that files can be written into a folder, before any work is done.

    The check leaves nothing in the file system. A folder that does not exist is not made; the first
    of its parents that exists is tried instead.

    Args:
        folder: the folder for the files.
        names: names of the files; none of them may be a folder.

    Returns:
        The folder as a path.

    Raises:
        OutputError: the folder or a parent is a file, or cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     check_folder(Path(parent) / "new").name
        'new'
    """
    folder = Path(folder)
    existing = folder.absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.path.isdir(existing):
        raise OutputError(
            f"output: the results must go into a folder; got '{folder}', where '{existing}' is not "
            "one. Choose another with --out."
        )
    for name in names:
        if os.path.isdir(folder / name):
            raise OutputError(
                f"output: '{name}' must be a file; got a folder of this name in '{folder}'. Move "
                "it away, or choose another folder with --out."
            )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return folder


def write_files(folder: str | os.PathLike[str], texts: Mapping[str, str]) -> list[Path]:
    """Write text files into a folder; all are written before any gets its name.

    Args:
        folder: the folder. It is made with its parents if it does not exist.
        texts: file name -> content. A file of the same name is replaced; other files are not
            changed.

    Returns:
        The paths, in the order of `texts`.

    Raises:
        OutputError: the folder cannot be made or written. Earlier files are still there.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     [path] = write_files(parent, {"a.txt": "hello"})
        ...     path.read_text()
        'hello'
    """
    try:
        return write_whole(
            Path(folder), {name: text.encode("utf-8") for name, text in texts.items()}
        )
    except OSError as error:
        raise _cannot_write(Path(folder), error) from None


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output: the folder must be writable; got '{folder}': {error.strerror or error}. Choose "
        "another with --out, or change its permissions."
    )
