"""A run in a PostgreSQL that the test starts, and passwords that end up nowhere."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from evomerge.archive.archive import Archive
from evomerge.archive.storage import presence, study_prefix
from evomerge.candidate import Candidate
from evomerge.config.storage_url import expanded, masked, refuse_password
from evomerge.errors import InputError, WorkFailed
from evomerge.events import unheard
from evomerge.runs import directory as runs
from evomerge.search.loop import Search
from evomerge.search.preparation import prepare_file
from tests import commands
from tests.archive.test_trials import check_rows_and_trials
from tests.commands import evomerge
from tests.fakes import FakePool
from tests.searches import WriteSearch
from tests.waiting import wait_until

SECRET = "open-sesame"


def postgres_binary(name: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of an empty database, with its password."""
    initdb, server = postgres_binary("initdb"), postgres_binary("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="no PostgreSQL driver here (pip install 'evomerge[postgres]')")
    user = "postgres" if os.getuid() == 0 else None  # the server refuses to be root
    folder = Path(tempfile.mkdtemp(prefix="evomerge-postgres-"))
    (folder / "password").write_text(SECRET)
    if user is not None:
        shutil.chown(folder, user)
    (folder / "password").chmod(0o644)
    options = ("--no-sync", "--auth=scram-sha-256", "--username=me", f"--pwfile={folder / 'password'}")
    subprocess.run([initdb, "-D", folder / "data", *options], check=True, stdout=subprocess.DEVNULL, user=user, cwd="/")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ("listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off")
    command = [server, "-D", str(folder / "data"), *(part for setting in settings for part in ("-c", setting))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, user=user, cwd="/")
    try:
        url = f"postgresql://me:{SECRET}@127.0.0.1:{port}/postgres"
        await_server(url)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # SIGTERM would wait for the last connection
        process.wait()
        shutil.rmtree(folder)


def await_server(url: str) -> None:
    import psycopg

    def answers() -> bool:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            return False
        return True

    wait_until(answers, pause=0.1)


@pytest.mark.slow
def test_a_run_in_a_shared_storage_is_read_from_its_url_alone_and_its_password_is_written_nowhere(
    postgres: str, search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    monkeypatch.setenv("EVOMERGE_STORAGE", postgres)
    changes = {"items": {"search": 4, "heldout": 4}, "optimizer": {"evaluations": 1, "population": 4}}
    search, directory = search_file(storage="${EVOMERGE_STORAGE}", **changes), tmp_path / "run"
    evomerge("run", search, "--output", directory)
    evomerge("resume", directory, "--set", "optimizer.evaluations=2")

    shared = json.loads(evomerge("status", postgres, "--json"))
    assert (shared["state"], shared["evaluations"]) == ("finished", 2)
    assert shared["budget"] == 2
    assert evomerge("candidates", "${EVOMERGE_STORAGE}", "--json") == evomerge("candidates", directory, "--json")
    assert evomerge("front", f"{postgres}#{run_name(directory)}", "--json") == evomerge("front", directory, "--json")

    local = runs.read(directory)
    with presence(local.config.storage, study_prefix(directory, local.config)):
        assert json.loads(evomerge("status", postgres, "--json"))["state"] == "running"
        evomerge("resume", directory, status=2)
    assert commands.status(local.archive, local.config)["state"] == "finished"

    assert not [path for path in directory.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    with psycopg.connect(postgres) as connection:
        attributes = connection.execute("SELECT value_json FROM study_user_attributes").fetchall()
        attributes += connection.execute("SELECT value_json FROM trial_user_attributes").fetchall()
    assert attributes
    assert SECRET not in str(attributes)


@pytest.fixture
def guest(postgres: str) -> Iterator[str]:
    """The URL of the same server for a user who may be refused things."""
    with administration(postgres) as ask:
        ask(f"CREATE ROLE guest LOGIN PASSWORD '{SECRET}'")
        ask("CREATE DATABASE guest OWNER guest")
        yield postgres.replace("://me:", "://guest:").removesuffix("postgres") + "guest"
        ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'guest'")
        ask("DROP DATABASE guest")
        ask("DROP ROLE guest")


@contextmanager
def administration(url: str) -> Iterator[Callable[[str], object]]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        yield connection.execute


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["and is there", "and has gone again"])
def test_a_driver_that_lost_its_lock_writes_nothing_once_another_has_begun(
    postgres: str, guest: str, search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setenv("EVOMERGE_STORAGE", guest)
    prepared = prepare_file(search_file(storage="${EVOMERGE_STORAGE}", optimizer={"name": "random_search"}), ())
    name, drop = "run", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'guest'"
    with ExitStack() as others, presence(prepared.config.storage, name) as writer, administration(postgres) as ask:

        def another_begins(candidate: Candidate) -> Sequence[float]:
            if candidate.id == "g0000-01":
                ask(drop)
                another = others.enter_context(ExitStack())
                another.enter_context(presence(prepared.config.storage, name))
                if not there:
                    another.close()
            return (0.5, 0.25)

        archive = Archive(tmp_path / name, prepared.config, prepared.space.genes, writer=writer)
        pool = FakePool([each.name for each in prepared.config.objectives], another_begins)
        with pytest.raises(WorkFailed, match=r"connection was lost, and another process has begun to work on run"):
            Search(prepared.config, prepared.space, archive, pool, unheard).run()
        held = [
            record.candidate.id for record in Archive(tmp_path / name, prepared.config, prepared.space.genes).records()
        ]
        assert held
        assert "g0000-01" not in held


@pytest.mark.slow
def test_a_server_that_drops_its_connections_or_takes_rights_away_loses_nothing(
    postgres: str, guest: str, search_file: WriteSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_STORAGE", guest)
    optimizer = {"name": "random_search", "evaluations": 6, "population": 2}
    prepared = prepare_file(search_file(storage="${EVOMERGE_STORAGE}", optimizer=optimizer), ())
    incidents: dict[str, Callable[[], object]] = {}

    def search(name: str) -> tuple[Archive, FakePool]:
        def scorer(candidate: Candidate) -> Sequence[float]:
            incidents.pop(candidate.id, lambda: None)()
            return (0.5, 0.25)

        pool = FakePool([each.name for each in prepared.config.objectives], scorer)
        with presence(prepared.config.storage, name) as writer:
            archive = Archive(tmp_path / name, prepared.config, prepared.space.genes, writer=writer)
            Search(prepared.config, prepared.space, archive, pool, unheard).run()
        return archive, pool

    expected, _ = search("undisturbed")
    with administration(postgres) as ask, administration(postgres.removesuffix("postgres") + "guest") as ask_there:
        drop = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'guest'"
        incidents |= {"uniform": lambda: ask(drop), "g0001-01": lambda: ask(drop)}
        dropped, _ = search("dropped")
        assert commands.candidates(dropped, prepared.config) == commands.candidates(expected, prepared.config)

        incidents |= {"g0001-00": lambda: ask_there("REVOKE INSERT ON trials FROM guest")}
        with pytest.raises(WorkFailed, match=r"refused evaluation g0001-00 \(.*permission denied.*nothing was lost"):
            search("revoked")
        ask_there("GRANT INSERT ON trials TO guest")
        kept = Archive(tmp_path / "revoked", prepared.config, prepared.space.genes).records()
        resumed, pool = search("revoked")
        assert len(kept) > 4
        assert not {(record.candidate.id, "search") for record in kept} & set(pool.evaluated)
        assert commands.candidates(resumed, prepared.config) == commands.candidates(expected, prepared.config)


def test_rows_in_a_postgres_are_those_that_optuna_would_have_written(postgres: str) -> None:
    check_rows_and_trials(postgres)


def run_name(directory: Path) -> str:
    return study_prefix(directory, runs.read_config(directory)).rstrip("-")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p/a:s@s@host/db", "postgresql://me:***@host/db"),
        (
            "postgresql://host/db?user=me&password=p&sslmode=require",
            "postgresql://host/db?user=me&password=***&sslmode=require",
        ),
        ("could not reach mysql://a:b@c", "could not reach mysql://a:***@c"),
    ],
)
def test_a_password_is_masked_and_refused_in_a_file(url: str, shown: str) -> None:
    assert masked(url) == shown
    with pytest.raises(ValueError, match="holds a password") as refused:
        refuse_password(url)
    assert shown in str(refused.value)


@pytest.mark.parametrize(
    "url", ["sqlite:////tmp/a.db", "postgresql://me@host:5432/db", "postgresql://me:${PW}@host/db"]
)
def test_a_url_without_password_is_taken_as_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuse_password(url) == masked(url.replace("${PW}", "")).replace("me:@", "me:${PW}@")
    monkeypatch.setenv("PW", "p")
    assert expanded(url) == url.replace("${PW}", "p")


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVOMERGE_STORAGE", raising=False)
    with pytest.raises(InputError, match="the environment variable EVOMERGE_STORAGE is not set"):
        expanded("${EVOMERGE_STORAGE}")
