"""Run directories: they are made, locked, run, resumed and read here.

A run directory holds search.yaml (resolved and frozen), archive.db, log.jsonl (one line per event) and best.yaml. The
last two are derived from the first two. A search with scores of the user's own has copies of their files in own, and
one that aligns models has the aligned copies in aligned.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.archive.archive import Archive, comparable, differences
from evomerge.archive.storage import check_storage, presence, study_prefix
from evomerge.config.documents import shown
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, WorkFailed, naming
from evomerge.events import Event, Listener, Started, Stopped, Warned, WorkersAwaited, WorkersReady
from evomerge.files import ALIGNED, OWN, SEARCH_FILE, STATISTICS, TASKS, check_writable, write_bytes, write_text
from evomerge.merging.sources.statistics import Names, remove_unfinished
from evomerge.runs.aligned import brought, in_place, portable, with_copies
from evomerge.runs.journal import Journal, Opened, OpenRun
from evomerge.runs.lock import LOCK, run_lock
from evomerge.runs.reading import check_archive_kept, check_readable, read_config
from evomerge.runs.trackers.tracking import Tracking
from evomerge.search import ablation
from evomerge.search.ablation import Ablation
from evomerge.search.loop import Search
from evomerge.search.preparation import Prepared, identities, prepare_file, reopen
from evomerge.search.statistics import measure, wanted
from evomerge.workers import WorkerPool
from evomerge.workers.pools import make_pool
from evomerge.workers.ray_address import given

_DIFFERENCES = 3  # between two searches that a message names


def start(
    search_file: Path,
    directory: Path,
    overrides: Sequence[str],
    address: str | None,
    listener: Listener,
    again: bool = False,
) -> OpenRun:
    """Runs a search file in a new directory, and returns the run once it has finished.

    search_file: the search file.
    directory: the run directory.
    overrides: settings that replace those of the file, as KEY=VALUE.
    address: a Ray cluster's; None for this machine.
    listener: is told what happens.
    again: whether the run is resumed where the directory already holds this very search.
    Raises InputError before anything is written, so the pool is made first.
    """
    make = partial(prepare_file, search_file, overrides, given(address))
    return begin(make, search_file, directory, address, listener, again)


def begin(
    make: Callable[[], Prepared],
    where: Path | str,
    directory: Path,
    address: str | None,
    listener: Listener,
    again: bool = False,
) -> OpenRun:
    """Runs a prepared search in a new directory, and returns the run once it has finished.

    make: prepares the search; it is called once the directory is known to be free.
    where: where the search comes from, which opens an error's message.
    The other parameters are those of `start`, which raises the same errors.
    """
    held = _held(directory)
    if held and SEARCH_FILE not in held:
        raise InputError(f"{directory}: is not empty (it holds {held[0]}); choose another --output.")
    prepared = make()
    if SEARCH_FILE in held:
        if not again or not _same_search(directory, prepared.config):
            raise InputError(_occupied(directory, prepared.config))
        copies = {name: own.folder for name, own in read_config(directory).align.items()}
        return _go_on(directory, in_place(prepared, copies) if copies else prepared, address, listener)
    check_writable(directory)
    with naming(where):
        check_storage(prepared.config.storage)
    for warning in prepared.warnings:
        listener(Warned(warning))
    with naming(where):
        prepared = with_copies(prepared, directory, listener)
    listener(WorkersAwaited())
    with closing(_pool(prepared, address, directory)) as pool:
        directory.mkdir(parents=True, exist_ok=True)
        with run_lock(directory), _present(directory, prepared.config) as writer:
            if (directory / SEARCH_FILE).exists():  # somebody was faster
                raise InputError(_occupied(directory, prepared.config))
            prepared = _frozen(directory, prepared)
            return _run(OpenRun(directory, prepared, _archive(directory, prepared, writer)), pool, listener)


def resume(directory: Path, overrides: Sequence[str], address: str | None, listener: Listener) -> OpenRun:
    """Resumes an interrupted run, or a finished run whose budget has grown, and returns it once it has finished.

    directory: the run directory.
    overrides: settings that replace those of the run, as KEY=VALUE.
    address: a Ray cluster's; None for this machine.
    listener: is told what happens.
    Raises InputError where the run cannot be resumed.
    """
    return _go_on(directory, _reopen(directory, overrides), address, listener)


def _go_on(directory: Path, prepared: Prepared, address: str | None, listener: Listener) -> OpenRun:
    check_archive_kept(directory, prepared.config)
    _check_own(directory, prepared.config)
    with run_lock(directory), _present(directory, prepared.config) as writer:
        run = OpenRun(directory, prepared, _archive(directory, prepared, writer))
        for warning in run.archive.check_resumable(directory):
            listener(Warned(warning))
        check_sources(run)
        listener(WorkersAwaited())
        with closing(_pool(prepared, address, directory, run.archive.statistics)) as pool:
            return _run(replace(run, prepared=_frozen(directory, prepared)), pool, listener)


def _check_own(directory: Path, config: SearchConfig) -> None:
    """Raises InputError where the files of the user's own scores are not those that the search began with."""
    from evomerge.evaluation.own_files import read_own

    with naming(directory / SEARCH_FILE):
        read_own(config)


def _frozen(directory: Path, prepared: Prepared) -> Prepared:
    """Writes the search file and copies of the user's own scores into a run directory. Returns the search with these
    copies in the place of the files that it came with."""
    from evomerge.evaluation.own_files import kept, read_own

    files = read_own(prepared.config)
    config, contents = kept(prepared.config, files, OWN)
    if contents:
        (directory / OWN).mkdir(exist_ok=True)
    for name, content in contents.items():
        write_bytes(directory / OWN / name, content)
    write_text(directory / SEARCH_FILE, portable(config, directory).to_yaml())
    return replace(prepared, config=kept(prepared.config, files, str((directory / OWN).resolve()))[0])


def ablate(
    directory: Path,
    overrides: Sequence[str],
    address: str | None,
    listener: Listener,
    tell: Callable[[Ablation, int], None] = lambda *_: None,
) -> None:
    """Scores the recipes between the uniform merge and a run's winner (`evomerge.search.ablation`), but for those that
    are recorded already, so that it goes on where it was interrupted. The search's own records stay as they are.

    directory: the run directory.
    overrides: settings of workers, as KEY=VALUE; they are not kept.
    address: a Ray cluster's; None for this machine.
    listener: is told what happens.
    tell: is told what will be scored, and how many evaluations are left, before any of them begins.
    Raises InputError where the search has not ended, or its winner has nothing that could be put back.
    """
    opened = read(directory)
    _planned(opened)  # what is refused is refused before anything is written
    prepared = opened.prepared
    working = _reopen(directory, overrides) if overrides else prepared
    with run_lock(directory), _present(directory, prepared.config) as writer:
        run = OpenRun(directory, prepared, _archive(directory, prepared, writer))
        for warning in run.archive.check_resumable(directory):
            listener(Warned(warning))
        planned = _planned(run)
        beside = run.archive.beside(ablation.ARCHIVE, writer)
        left = planned.left(beside)
        if not left:
            return
        check_sources(run)
        tell(planned, left)
        with closing(_pool(working, address, directory, run.archive.statistics)) as pool:
            ablation.carry_out(planned, Search(working.config, working.space, beside, pool, listener))


def _planned(run: OpenRun) -> Ablation:
    with naming(run.directory):
        return ablation.plan(run.results, run.prepared.space)


def _pool(prepared: Prepared, address: str | None, directory: Path, names: Names | None = None) -> WorkerPool:
    """The pool of a run. `names` are those of the statistics that the run has used before."""
    return make_pool(prepared.config, prepared.models, prepared.targets, address, directory / STATISTICS, names)


def check_sources(run: OpenRun) -> None:
    """Checks that the source models' files are those that the search began with. Raises InputError where one is not."""
    with naming(run.directory / SEARCH_FILE):
        run.archive.check_sources(identities(run.prepared))


def read(directory: Path) -> OpenRun:
    """A run as it stands, with its models, for reading only; another process may be writing to it.

    Raises InputError where the directory is no run directory, or nothing has been evaluated yet.
    """
    prepared = _reopen(directory)
    check_readable(directory, prepared.config)
    return OpenRun(directory, prepared, _archive(directory, prepared))


def _reopen(directory: Path, overrides: Sequence[str] = ()) -> Prepared:
    config = read_config(directory, overrides)
    with naming(directory / SEARCH_FILE):
        return reopen(config)


def _present(directory: Path, config: SearchConfig) -> AbstractContextManager[Any]:
    """A lock on the run's study, where the archive is shared: processes see it that use other directories."""
    return presence(config.storage, study_prefix(directory, config))


def _archive(directory: Path, prepared: Prepared, writer: Any = None) -> Archive:
    return Archive(directory, prepared.config, prepared.space.genes, writer=writer)


def _held(directory: Path) -> list[str]:
    """The names of what a future run directory holds already; locks, tasks and own scores left out; sorted."""
    try:
        return sorted(
            path.name for path in directory.iterdir() if path.name not in (ALIGNED, LOCK, OWN, STATISTICS, TASKS)
        )
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
        f"{directory}: already holds another search ({_differing(read_config(directory), config)}); choose another "
        f"--output, or resume that one with `evomerge resume {directory}`."
    )


def _differing(held: SearchConfig, config: SearchConfig) -> str:
    """How a search differs from the one that a directory holds."""
    was, now = comparable(held), comparable(config)
    found = [f"{key} is {shown(there)} there and {shown(here)} here" for key, there, here in differences(was, now)]
    if held.storage != config.storage:
        found.append("its storage is another")
    more = f", and {len(found) - _DIFFERENCES} more" if len(found) > _DIFFERENCES else ""
    return ", ".join(found[:_DIFFERENCES]) + more


def _run(run: OpenRun, pool: WorkerPool, listener: Listener) -> OpenRun:
    run.archive.record_sources(identities(run.prepared))
    if run.prepared.seen is not None:
        run.archive.record_seen(run.prepared.seen)
    run.archive.record_aligned(brought(run.config))
    journal = Journal(run)
    journal(Started(os.getpid(), len(run.archive.tried())))
    tracking = Tracking(listener)

    def tell(event: Event) -> None:
        journal(event)
        listener(event)
        tracking(event)

    remove_unfinished(run.directory / STATISTICS)
    listener(Opened(run))
    tracking(Opened(run))
    try:
        tell(WorkersReady(pool.size, run.config.workers.pool))
        run.archive.record_statistics(measure(wanted(run.config), pool, tell))
        Search(run.config, run.prepared.space, run.archive, pool, tell, tuple(run.prepared.models.table)).run()
    except BaseException as error:
        with suppress(WorkFailed):  # it may be the log that cannot be written, and the first reason is what counts
            stopped = Stopped(type(error).__name__, str(error))
            journal(stopped)
            tracking(stopped)
        raise
    return run
