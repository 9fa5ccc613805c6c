"""Opening Optuna's storage, and its errors in one sentence."""

import hashlib
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from evomerge.config.search import SearchConfig
from evomerge.config.storage_url import expanded, masked
from evomerge.errors import EvomergeError, InputError, WorkFailed
from evomerge.files import DATABASE

_HOLDERS = "evomerge_holders"  # the table of the processes that last took the lock of each run
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
    return expanded(config.storage) if config.storage else f"sqlite:///{quote(str((directory / DATABASE).absolute()))}"


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
def presence(url: str | None, name: str) -> Iterator[Any]:
    """Holds a run's lock in a PostgreSQL while a process writes to the run. The server frees it when the process dies.

    Yields what the run's evaluations must be written with: its only connection is the one that holds the lock. Where
    the connection is lost, and the lock with it, the next one takes the lock again before anything is written, and
    raises WorkFailed where another process has had it meanwhile. None for storages of other kinds, which have no lock.

    url: of the storage.
    name: of the lock.
    Raises InputError where another process holds the lock.
    """
    if url is None or not is_postgres(url):
        yield None
        return
    import sqlalchemy

    full, holder = expanded(url), secrets.token_hex(16)
    engine = sqlalchemy.create_engine(full, pool_size=1, max_overflow=0, pool_pre_ping=True)
    before: list[bool] = []  # whether this process has had the lock

    def take(connection: Any, _: Any) -> None:
        if not _taken(connection, name, holder, again=bool(before)):
            connection.close()
            raise _elsewhere(masked(full), name.rstrip("-"), lost=bool(before))
        before.append(True)

    sqlalchemy.event.listen(engine, "connect", take)
    try:
        engine.connect().close()
        yield engine
    finally:
        engine.dispose()


def _taken(connection: Any, name: str, holder: str, again: bool) -> bool:
    """Whether a connection could take a lock; and where the same process takes it again, no other had it in between.

    connection: psycopg's.
    name: of the lock.
    holder: names this process.
    again: whether this process has had the lock before.
    """
    with connection.cursor() as ask:
        taken = ask.execute("SELECT pg_try_advisory_lock(%s)", [_key(name)]).fetchone()[0]
        if taken and again:
            row = ask.execute(f"SELECT holder FROM {_HOLDERS} WHERE name = %s", [name]).fetchone()
            taken = row is not None and row[0] == holder
        elif taken:
            ask.execute("SELECT pg_advisory_xact_lock(%s)", [_key(_HOLDERS)])  # two must not make the table at once
            ask.execute(f"CREATE TABLE IF NOT EXISTS {_HOLDERS} (name TEXT PRIMARY KEY, holder TEXT NOT NULL)")
            ask.execute(
                f"INSERT INTO {_HOLDERS} VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET holder = excluded.holder",
                [name, holder],
            )
    connection.commit()
    return bool(taken)


def _elsewhere(storage: str, run: str, lost: bool) -> EvomergeError:
    if lost:
        return WorkFailed(
            f"storage {storage}: the connection was lost, and another process has begun to work on {run} meanwhile; "
            "nothing was lost, and this process stops."
        )
    return InputError(f"storage {storage}: another process is at work on {run}; wait for it or stop it.")


def _key(name: str) -> int:
    """The number of a lock of the server."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


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
            yield bool(connection.scalar(sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), {"key": _key(name)}))
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
