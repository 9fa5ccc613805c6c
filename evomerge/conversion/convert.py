"""A file of another program as a search file: which kind it is, and how it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config.documents import read_yaml, validate
from evomerge.config.search import SearchConfig
from evomerge.conversion import merge_recipe, mergekit_evolve
from evomerge.conversion.draft import Folder
from evomerge.conversion.options import Options
from evomerge.errors import InputError
from evomerge.files import check_writable, write_text


@dataclass(frozen=True, slots=True)
class Converted:
    """A search file that was made of another file.

    config: its content.
    text: the file, with comments.
    lost: sentences on what could not be translated.
    """

    config: SearchConfig
    text: str
    lost: Sequence[str]


def convert(path: Path, folder: Path, options: Options) -> Converted:
    """The search file of a config of mergekit-evolve, or of a merge recipe. No model is read.

    path: the file.
    folder: where the search file will lie.
    options: what the file does not say.
    Raises InputError for a file that is neither, and for one that no search can be made of.
    """
    options.check()
    document = read_yaml(path)
    if "genome" in document:
        draft = mergekit_evolve.draft_of(document, str(path), options, Folder(folder))
    elif "merge_method" in document:
        draft = merge_recipe.draft_of(path, options, Folder(folder))
    else:
        raise InputError(f"{path}: {_other(document)}")
    config = validate(SearchConfig, draft.settings, f"{path}, as a search file")
    return Converted(config, draft.text(f"Made by `evomerge convert` of {path.name}."), draft.lost)


def _other(document: Mapping[str, Any]) -> str:
    """Why a document is not converted."""
    if "objectives" in document:
        return "this is a search file already; run it with `evomerge run`."
    return "expected genome (a config of mergekit-evolve) or merge_method (a merge recipe) at the top of the file."


def check_new(path: Path) -> None:
    """Raises InputError where a file exists, which may have been edited."""
    if path.exists():
        raise InputError(f"{path}: exists already; choose another -o, since it may have been edited.")


def write_new(path: Path, text: str) -> None:
    """Writes a search file that does not exist yet.

    path: the file; missing folders are made.
    text: its content.
    Raises InputError where it exists or cannot be written.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another -o.") from None
    write_text(path, text)
