"""Opening Optuna's storage, and its errors in one sentence."""

import hashlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evomerge.config.search import SearchConfig
from evomerge.config.storage_url import expanded, masked
from evomerge.errors import InputError
from evomerge.files import DATABASE

_LASTING = ("full", "no space", "readonly", "read-only", "no such", "does not exist", "permission", "password")


def study_prefix(directory: Path, config: SearchConfig) -> str:
    """What the names of a run's studies begin with, which sets them apart from other runs' in a shared storage.

    directory: the run directory.
    config: the search.
    """
    return "" if config.storage is None else f"{directory.name}-{config.digest()}-"


def storage_url(directory: Path, config: SearchConfig) -> str:
    """The complete URL of a run's storage; by default that of a database in the run directory.

    directory: the run directory.
    config: the search.
    Raises InputError where the URL names an environment variable that is not set.
    """
    return expanded(config.storage) if config.storage else f"sqlite:///{(directory / DATABASE).absolute()}"


def open_storage(url: str) -> Any:
    """The storage at a URL. A connection that a server has closed meanwhile is opened again before it is used."""
    import optuna

    local = url.startswith("sqlite")
    storage = optuna.storages.RDBStorage(url, engine_kwargs={} if local else {"pool_pre_ping": True})
    weakref.finalize(storage, storage.engine.dispose)  # nothing else closes its connections
    return storage


def check_storage(url: str | None) -> None:
    """Raises InputError where a named storage cannot be reached."""
    if url is None:
        return
    full = expanded(url)
    try:
        import sqlalchemy

        engine = sqlalchemy.create_engine(full)
        if engine.url.get_backend_name() == "sqlite":  # to connect would make the file
            Path(engine.url.database or ".").absolute().parent.stat()
        else:
            engine.connect().close()
            engine.dispose()
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "psycopg"
        advice = (
            "pip install 'evomerge[postgres]'"
            if missing
            else ("give a database URL such as postgresql://USER@HOST/NAME that this machine can reach")
        )
        raise InputError(f"storage is {masked(full)}, which cannot be opened ({brief(error)}); {advice}.") from None


@contextmanager
def presence(url: str | None, name: str) -> Iterator[None]:
    """Holds a run's lock in a PostgreSQL while a process writes to the run. The server frees it when the process dies.

    url: of the storage; nothing is locked in storages of other kinds.
    name: of the lock.
    Raises InputError where another process holds the lock.
    """
    if url is None or not is_postgres(url):
        yield
        return
    with held(expanded(url), name) as free:
        if not free:
            raise InputError(
                f"storage {masked(expanded(url))}: another process is at work on {name.rstrip('-')}; wait for it or "
                "stop it."
            )
        yield


@contextmanager
def held(url: str, name: str) -> Iterator[bool]:
    """Whether a lock of the server was free; if so, this process holds it within.

    url: the complete URL of a PostgreSQL.
    name: of the lock.
    """
    import sqlalchemy

    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
            yield bool(connection.scalar(sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), {"key": key}))
    finally:
        engine.dispose()


def is_postgres(url: str) -> bool:
    """Whether a storage is a PostgreSQL."""
    return expanded(url).startswith("postgresql")


def refusal(error: BaseException) -> tuple[bool, str]:
    """Whether a storage may accept later what it has refused now, and why it has refused it."""
    from sqlalchemy import exc

    reason = brief(getattr(error, "orig", None) or error)  # without the statement
    lasting = any(word in reason.lower() for word in _LASTING)
    return isinstance(error, (exc.OperationalError, exc.InterfaceError)) and not lasting, reason


def brief(error: BaseException) -> str:
    """An exception's type and the first line of its message, without passwords."""
    lines = masked(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
