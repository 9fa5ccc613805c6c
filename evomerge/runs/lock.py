"""The lock of a run directory: only one process writes to a run, and the system frees the lock when that process dies.

On Linux, NFS passes flock on to its server, so that other machines see the lock. A mount without a lock service refuses
it, and then the run is refused too. SQLite must not be trusted on network file systems, so a run whose directory lies
on a network file system should name a storage.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import InputError

LOCK = ".lock"


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """A context in which this process holds the lock of a run directory. The system frees it when the process dies.

    Raises InputError where another process holds the lock, or the file system has no locks.
    """
    try:
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(
            f"{directory / LOCK}: cannot be written ({error.strerror}); make the run directory writable."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise InputError(
                f"{directory}: already in use by {holder}; wait for it, stop it, or choose another directory."
            ) from None
        except OSError as error:
            raise InputError(
                f"{directory}: its file system has no locks ({error.strerror}), and two processes must not write "
                "to one run; mount it with locks, or choose another directory."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def is_running(directory: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    try:
        handle = os.open(directory / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        return False
    finally:
        os.close(handle)
