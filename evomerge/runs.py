"""A run directory: made, locked, run, resumed, read.

It holds search.yaml (resolved and frozen), archive.db, log.jsonl (one line per event) and best.yaml; all but the first
two are derived from them.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evomerge import config as configs
from evomerge.archive import DATABASE, SEARCH_FILE, TASKS, Archive, Record, check_storage, presence, study_prefix
from evomerge.config import POOLS, SearchConfig, imported
from evomerge.criteria import criteria_of
from evomerge.errors import InputError, WorkFailed, naming
from evomerge.export import shared_recipe
from evomerge.lock import LOCK, run_lock
from evomerge.preparation import Prepared, identities, prepare_file, reopen
from evomerge.search import Search, best_found, means
from evomerge.workers import Listener, WorkerPool

LOG_FILE, BEST_FILE = "log.jsonl", "best.yaml"


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run directory with its archive in memory."""

    directory: Path
    prepared: Prepared
    archive: Archive

    @property
    def config(self) -> SearchConfig:
        return self.prepared.config


def start(
    search_file: Path,
    directory: Path,
    overrides: Sequence[str],
    address: str | None,
    listener: Listener,
    again: bool = False,
) -> OpenRun:
    """Runs a search file in a new directory, or with `again` goes on where the directory holds that search already.

    Raises InputError before anything is written, so the pool comes first.
    """
    held = _held(directory)
    if held and SEARCH_FILE not in held:
        raise InputError(f"{directory}: is not empty (it holds {held[0]}); choose another --output.")
    prepared = prepare_file(search_file, overrides)
    if SEARCH_FILE in held:
        if not again or not _same_search(directory, prepared.config):
            raise InputError(_occupied(directory, prepared.config))
        return _go_on(directory, prepared, address, listener)
    _check_writable(directory)
    with naming(search_file):
        check_storage(prepared.config.storage)
    for warning in prepared.warnings:
        listener("warning", {"message": warning})
    listener("starting", {})
    with closing(make_pool(prepared.config, address)) as pool:
        directory.mkdir(parents=True, exist_ok=True)
        with run_lock(directory), _present(directory, prepared.config):
            if (directory / SEARCH_FILE).exists():  # somebody was faster
                raise InputError(_occupied(directory, prepared.config))
            write_text(directory / SEARCH_FILE, prepared.config.to_yaml())
            return _run(OpenRun(directory, prepared, _archive(directory, prepared)), pool, listener)


def resume(directory: Path, overrides: Sequence[str], address: str | None, listener: Listener) -> OpenRun:
    """Goes on with an interrupted run, or with a finished one whose budget has grown."""
    return _go_on(directory, _reopen(directory, overrides), address, listener)


def _go_on(directory: Path, prepared: Prepared, address: str | None, listener: Listener) -> OpenRun:
    _check_archive_kept(directory, prepared.config)
    with run_lock(directory), _present(directory, prepared.config):
        run = OpenRun(directory, prepared, _archive(directory, prepared))
        check_sources(run)
        listener("starting", {})
        with closing(make_pool(prepared.config, address)) as pool:
            write_text(directory / SEARCH_FILE, prepared.config.to_yaml())
            return _run(run, pool, listener)


def check_sources(run: OpenRun) -> None:
    """Raises InputError where a source model's files are not those that the search began with."""
    with naming(run.directory / SEARCH_FILE):
        run.archive.check_sources(identities(run.config))


def read(directory: Path) -> OpenRun:
    """A run as it stands, for looking at it; another process may be writing to it."""
    prepared = _reopen(directory)
    _check_archive_kept(directory, prepared.config)
    if prepared.config.storage is None and not (directory / DATABASE).exists():
        raise InputError(f"{directory}: {DATABASE} is missing, so nothing has been evaluated; resume the run first.")
    return OpenRun(directory, prepared, _archive(directory, prepared))


def _reopen(directory: Path, overrides: Sequence[str] = ()) -> Prepared:
    config = read_config(directory, overrides)
    with naming(directory / SEARCH_FILE):
        return reopen(config)


def read_config(directory: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run directory; give the folder that `evomerge run` made.")
    if not (directory / SEARCH_FILE).exists():
        raise InputError(f"{directory}: holds no {SEARCH_FILE}, so it is no run directory; check the path.")
    return configs.load(directory / SEARCH_FILE, overrides)


def _present(directory: Path, config: SearchConfig) -> AbstractContextManager[None]:
    """The lock that others than this directory's see, where the archive is shared."""
    return presence(config.storage, study_prefix(directory, config))


def _check_archive_kept(directory: Path, config: SearchConfig) -> None:
    """Raises InputError where the log tells of an archive that is gone: going on would begin all over, silently."""
    database = directory / DATABASE
    gone = not database.exists() or (database.is_file() and database.stat().st_size == 0)
    if config.storage is None and gone and (directory / LOG_FILE).exists():
        raise InputError(
            f"{database}: is {'empty' if database.exists() else 'missing'}, though {LOG_FILE} tells of evaluations; "
            "restore it from a copy, or run the search again in a new directory."
        )


def _archive(directory: Path, prepared: Prepared) -> Archive:
    return Archive(directory, prepared.config, prepared.space.genes)


def _held(directory: Path) -> list[str]:
    """The names in a directory that is to hold a run."""
    try:
        return sorted(path.name for path in directory.iterdir() if path.name not in (LOCK, TASKS))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise InputError(
            f"{directory}: expected a folder for the run, found a file; choose another --output."
        ) from None
    except OSError as error:
        raise InputError(f"{directory}: cannot be used ({error.strerror}); choose another --output.") from None


def _same_search(directory: Path, config: SearchConfig) -> bool:
    held = read_config(directory)
    return (held.digest(), held.storage) == (config.digest(), config.storage)


def _occupied(directory: Path, config: SearchConfig) -> str:
    if _same_search(directory, config):
        return f"{directory}: already holds this search; go on with `evomerge resume {directory}`."
    return (
        f"{directory}: already holds another search; choose another --output, or resume that one with "
        f"`evomerge resume {directory}`."
    )


def _check_writable(directory: Path) -> None:
    """Raises InputError where a directory cannot be made or written to, without making it."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{directory}: cannot write there ({error.strerror}); choose another --output.") from None


def _run(run: OpenRun, pool: WorkerPool, listener: Listener) -> OpenRun:
    run.archive.record_sources(identities(run.config))
    if run.prepared.seen is not None:
        run.archive.record_seen(run.prepared.seen)
    journal = _Journal(run)
    journal("started", {"process": os.getpid(), "recorded": len(run.archive.tried())})

    def tell(event: str, fields: dict[str, Any]) -> None:
        journal(event, fields)
        listener(event, fields)

    listener("opened", {"run": run})
    try:
        journal("workers", {"count": pool.size, "pool": run.config.workers.pool})
        listener("workers", {"count": pool.size})
        Search(run.config, run.prepared.space, run.archive, pool, tell).run()
    except BaseException as error:
        with suppress(WorkFailed):  # it may be the log that cannot be written, and the first reason is what counts
            journal("stopped", {"reason": type(error).__name__, "message": str(error)})
        raise
    return run


def make_pool(config: SearchConfig, address: str | None = None) -> WorkerPool:
    """The configured pool, its workers ready."""
    from evomerge.workers.worker import Worker

    pool: WorkerPool = imported(POOLS[config.workers.pool].make)(config, partial(Worker, config), address)
    return pool


class _Journal:
    """Appends events to log.jsonl and keeps best.yaml up to date."""

    def __init__(self, run: OpenRun) -> None:
        self._run = run
        _end_line(run.directory / LOG_FILE)
        best = best_found(run.archive, run.config)
        self._best = means([best], criteria_of(run.archive, run.config))[0] if best else -math.inf

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        line = {"time": round(time.time(), 3), "event": event, **_plain(fields)}
        try:
            with (self._run.directory / LOG_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritten(self._run.directory / LOG_FILE, error) from None
        if event == "evaluated" and fields["split"] == "search":
            criteria = criteria_of(self._run.archive, self._run.config)
            mean = means([Record(fields["candidate"], fields["evaluation"])], criteria)[0]
            if mean > self._best and criteria.feasible(fields["evaluation"]):
                self._best = mean
                self._write_best()
        elif event == "finished":
            self._write_best()

    def _write_best(self) -> None:
        best = best_found(self._run.archive, self._run.config)
        if best is None:
            (self._run.directory / BEST_FILE).unlink(missing_ok=True)  # a longer search can have moved the choice
            return
        recipe = shared_recipe(best, self._run.archive, self._run.config)
        write_text(self._run.directory / BEST_FILE, recipe.to_yaml())


def _end_line(log: Path) -> None:
    """Cuts off the line that a kill or a full disk has left half-written."""
    with suppress(FileNotFoundError), log.open("rb+") as stream:
        whole = stream.read().rfind(b"\n") + 1
        stream.truncate(whole)


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """An event's fields as JSON takes them."""
    if "candidate" not in fields:
        return fields
    evaluation = fields["evaluation"]
    return {
        "id": fields["candidate"].id,
        "split": fields["split"],
        "scores": evaluation.scores,
        "error": evaluation.error,
        "seconds": round(evaluation.seconds, 4),
    }


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing. Raises WorkFailed where there is no room for it."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> WorkFailed:
    return WorkFailed(
        f"{path}: cannot be written ({error.strerror}); nothing was lost: free some space or restore the disk, then "
        "resume."
    )
