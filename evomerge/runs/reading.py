"""What a run has found, read from its archive alone: no model is opened, and no library of models is imported."""

from collections.abc import Sequence
from pathlib import Path

from evomerge.archive.archive import Archive
from evomerge.config import files
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, naming
from evomerge.files import DATABASE, SEARCH_FILE
from evomerge.runs.journal import LOG_FILE
from evomerge.search.results import Results
from evomerge.spaces import Gene


def results(directory: Path) -> Results:
    """What a run has found so far; another process may be writing to it.

    Raises InputError where the directory is no run directory, or nothing has been evaluated yet.
    """
    config = read_config(directory)
    check_readable(directory, config)

    def genes() -> Sequence[Gene]:
        from evomerge.search.preparation import reopen

        with naming(directory / SEARCH_FILE):
            return reopen(config).space.genes  # runs in format 1 did not record them

    return Results(Archive(directory, config, genes, reading=True), config)


def read_config(directory: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """The config of a run.

    directory: the run directory.
    overrides: settings that replace those of the run, as KEY=VALUE.
    Raises InputError where the directory is no run directory.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run directory; give the folder that `evomerge run` made.")
    if not (directory / SEARCH_FILE).exists():
        raise InputError(f"{directory}: holds no {SEARCH_FILE}, so it is no run directory; check the path.")
    return files.load(directory / SEARCH_FILE, overrides)


def check_readable(directory: Path, config: SearchConfig) -> None:
    """Raises InputError where there is no archive to read."""
    check_archive_kept(directory, config)
    if config.storage is None and not (directory / DATABASE).exists():
        raise InputError(f"{directory}: {DATABASE} is missing, so nothing has been evaluated; resume the run first.")


def check_archive_kept(directory: Path, config: SearchConfig) -> None:
    """Raises InputError where the log tells of an archive that is gone. Else the search would silently start anew."""
    database = directory / DATABASE
    gone = not database.exists() or (database.is_file() and database.stat().st_size == 0)
    if config.storage is None and gone and (directory / LOG_FILE).exists():
        raise InputError(
            f"{database}: is {'empty' if database.exists() else 'missing'}, though {LOG_FILE} tells of evaluations; "
            "restore it from a copy, or run the search again in a new directory."
        )
