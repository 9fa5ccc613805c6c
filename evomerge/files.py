"""The names of a run directory's files, and how one of them is written: whole, or not at all."""

import os
import tempfile
from pathlib import Path

from evomerge.errors import InputError, WorkFailed

DATABASE, SEARCH_FILE = "archive.db", "search.yaml"
STATISTICS = "statistics"  # what is measured of models for methods that need it
TASKS = "tasks"  # where a submitted search keeps the tasks that came with it
ALIGNED = "aligned"  # where a search keeps the aligned copies of its models
OWN = "own"  # where a search keeps the files of the user's own scores


def check_writable(directory: Path) -> None:
    """Raises InputError where a directory cannot be made or written to; the directory is not made."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{directory}: cannot write there ({error.strerror}); choose another --output.") from None


def write_text(path: Path, text: str) -> None:
    """Writes a whole file, or nothing.

    path: the file, which is replaced if it exists.
    text: its content, written as UTF-8.
    Raises WorkFailed where it cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file, or nothing; see `write_text`."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise unwritten(path, error) from None


def unwritten(path: Path, error: OSError) -> WorkFailed:
    """The error to raise for a file that could not be written.

    path: the file.
    error: why it could not be written.
    """
    return WorkFailed(
        f"{path}: cannot be written ({error.strerror}); nothing was lost: free some space or restore the disk, then "
        "resume."
    )
