"""Searches, in any form that a program may give them."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.config import files
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, naming
from evomerge.library.functions import named
from evomerge.search.preparation import Prepared, prepare
from evomerge.workers.ray_address import given

GIVEN = "the search"  # what messages call a search that is no file
AnySearch = str | Path | Mapping[str, Any] | SearchConfig
Objective = Mapping[str, Any] | Callable[..., Any]


def prepared(
    search: AnySearch,
    objectives: Iterable[Objective] | None,
    overrides: Sequence[str],
    address: str | None,
    sources: Path,
) -> Prepared:
    """The prepared search.

    search: a search file, its content as a mapping, or a config.
    objectives: take the place of the search's, where they are given; a function is a score of the user's own.
    overrides: settings that replace others, as KEY.PATH=VALUE.
    address: a Ray cluster's; None for this machine.
    sources: a folder for the sources of functions that stand in no file of their own.
    Raises InputError for a search that cannot run.
    """
    where: str | Path
    if isinstance(search, str | Path):
        where, folder = Path(search), Path(search).expanduser().parent
        document = files.read(Path(search).expanduser())
    else:
        where, folder = GIVEN, Path.cwd()
        document = _content(search)
    if objectives is not None:
        document["objectives"] = [{"python": one} if callable(one) else dict(one) for one in objectives]
    named(document, sources)
    config = files.of_document(document, where, folder, overrides)
    with naming(where):
        return prepare(config, given(address))


def _content(search: Mapping[str, Any] | SearchConfig) -> dict[str, Any]:
    """A search as the content of a file, which may be changed."""
    if isinstance(search, SearchConfig):
        return search.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if not isinstance(search, Mapping):
        raise InputError(f"{GIVEN} is a {type(search).__name__}; give a search file, a mapping or a SearchConfig.")
    content: dict[str, Any] = copy.deepcopy(dict(search))
    return content


def overriding(settings: Mapping[str, Any] | None) -> list[str]:
    """Settings as KEY.PATH=VALUE, which is how commands take them.

    settings: by key path; values are those of a search file.
    """
    return [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]
