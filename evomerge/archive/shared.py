"""An archive that several machines reach, opened by the URL of its storage."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from pydantic import TypeAdapter

from evomerge.archive.archive import Archive
from evomerge.archive.storage import brief, check_storage, held, is_postgres, open_storage
from evomerge.config.search import SearchConfig
from evomerge.config.storage_url import expanded, masked
from evomerge.errors import EvomergeError, InputError, choices
from evomerge.quiet import quiet
from evomerge.spaces import Gene


def open_shared(url: str) -> tuple[Archive, SearchConfig, bool]:
    """The archive of a run in a shared storage, its config, and whether a process is at work on it.

    url: of the storage; #RUN at its end chooses among several runs.
    Raises InputError where the storage cannot be opened, or does not say which run is meant.
    """
    url, _, wanted = url.partition("#")
    check_storage(url)
    try:
        with quiet():
            import optuna

            storage = open_storage(expanded(url))
            names = optuna.get_all_study_names(storage)
            runs = [name.removesuffix("search") for name in names if name.endswith("-search")]
            prefix = _chosen(runs, f"{wanted}-" if wanted else "", url)
            attributes = optuna.load_study(study_name=f"{prefix}search", storage=storage).user_attrs
        config = SearchConfig.model_validate(attributes["config"]).model_copy(update={"storage": url})
        archive = Archive(Path(prefix), config, TypeAdapter(list[Gene]).validate_python(attributes["genes"]), prefix)
        with held(expanded(url), prefix) if is_postgres(url) else nullcontext(True) as free:
            return archive, config, not free
    except EvomergeError:
        raise
    except Exception as error:
        raise InputError(f"{masked(url)}: holds no run that can be read ({brief(error)}); check the URL.") from None


def _chosen(runs: Sequence[str], wanted: str, url: str) -> str:
    if wanted in runs:
        return wanted
    if not wanted and len(runs) == 1:
        return runs[0]
    names = choices(wanted.rstrip("-"), [run.rstrip("-") for run in runs])
    raise InputError(f"{masked(url)}: say which run is meant, as in '{masked(url)}#RUN'; {names}.")
