"""Uploads a merged checkpoint to the Hugging Face hub: the files of the checkpoint and nothing else.

The weights must have the fingerprint that the recipe beside them records. The card and the recipe are uploaded without
paths of this machine. A new repository is private unless the user says otherwise.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evomerge.errors import InputError, WorkFailed, first_line
from evomerge.export.card import model_card
from evomerge.export.licenses import OTHER, Verdict
from evomerge.export.names import hub_id, public_recipe, without_paths
from evomerge.merging.sources.weights import INDEX, RECIPE, WEIGHTS
from evomerge.recipe import Recipe
from evomerge.recipe import load as load_recipe

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
REPORTS = ("report.html", "report.md", "report.json")
_BESIDE = ("config.json", "LICENSE*", "LICENCE*", "NOTICE*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_MADE_BY_HUB = {".gitattributes"}


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was uploaded.

    url: of the commit.
    fingerprint: of the weights.
    """

    url: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Parcel:
    """A checkpoint that can be uploaded.

    folder: where it is.
    recipe: the recipe beside its weights.
    fingerprint: that of its weights, which the recipe records too.
    files: the names of the files to upload.
    left: the names of the other files in the folder.
    """

    folder: Path
    recipe: Recipe
    fingerprint: str
    files: tuple[str, ...]
    left: tuple[str, ...]

    def content(self, name: str) -> bytes | Path:
        """What is uploaded as a file: the text without paths of this machine, or the file itself."""
        if name == RECIPE:
            return public_recipe(self.recipe).to_yaml().encode()
        if name == CARD:
            return _card(self).encode()
        if name in REPORTS:
            return without_paths(_text(self.folder / name), self.recipe).encode()
        return self.folder / name


def pack(folder: Path) -> Parcel:
    """The checkpoint in a folder, checked.

    folder: as `evomerge merge` writes it.
    Raises InputError for a folder that is no such checkpoint, and WorkFailed where the weights have another fingerprint
    than the recipe records.
    """
    from evomerge.merging.streamed.merge import stored_fingerprint

    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder}: {RECIPE} is missing; name a folder that `evomerge merge` has written.")
    recipe = load_recipe(folder / RECIPE)
    recorded = recipe.evomerge.fingerprint
    if recorded is None:
        raise InputError(f"{folder / RECIPE}: evomerge.fingerprint is missing; write the folder with `evomerge merge`.")
    files = _files(folder)
    found = stored_fingerprint(folder)
    if found != recorded:
        raise WorkFailed(
            f"{folder}: the weights have fingerprint {found}, but the recipe beside them records {recorded}; nothing "
            "was uploaded, merge again."
        )
    left = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return Parcel(folder, recipe, recorded, files, tuple(left))


def _files(folder: Path) -> tuple[str, ...]:
    """The names of the files of a checkpoint. Raises InputError where one lies outside its folder."""
    from evomerge.merging.streamed.merge import GENERATION, PROCESSOR, TOKENIZER

    patterns = (*_BESIDE, GENERATION, *TOKENIZER, *PROCESSOR, *REPORTS)
    beside = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = sorted({*beside, *_weights(folder), CARD, RECIPE})
    inside = folder.resolve()
    for name in names:
        if (folder / name).resolve().parent != inside:
            raise InputError(f"{folder / name}: this leads out of the folder; put the file itself there.")
    return tuple(names)


def _weights(folder: Path) -> set[str]:
    """The files of the weights, and their index where there are several."""
    if not (folder / INDEX).is_file():
        return {WEIGHTS}
    try:
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / INDEX}: weight_map cannot be read; merge again.") from None
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{folder / INDEX}: {name} is no file of safetensors in the folder; merge again.")
    return {INDEX, *shards}


def _card(parcel: Parcel) -> str:
    """The card in the folder, or a new one, as the hub takes it: `base_model` has ids of models on the hub only."""
    path = parcel.folder / CARD
    made = model_card(parcel.recipe, parcel.fingerprint, Verdict(OTHER, ()))
    text = without_paths(_text(path), parcel.recipe) if path.is_file() else made
    opening, front, body = _divided(text)
    parents = front.get("base_model")
    if not isinstance(parents, list):
        return text
    ids = list(dict.fromkeys(name for parent in parents if (name := hub_id(str(parent)))))
    changed = {key: ids if key == "base_model" else value for key, value in front.items()}
    if not ids:
        changed = {key: value for key, value in front.items() if not key.startswith("base_model")}
    return f"{opening}---\n{yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)}---\n{body}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 (at byte {error.start}); write it again.") from None


def _divided(text: str) -> tuple[str, dict[str, Any], str]:
    """What precedes the front matter of a card, the front matter, and what follows it."""
    before, opened, rest = text.partition("---\n")
    front, closed, body = rest.partition("\n---\n")
    try:
        content = yaml.safe_load(front) if opened and closed and not before.strip() else None
    except (yaml.YAMLError, ValueError):
        content = None
    return (before, content, body) if isinstance(content, dict) else ("", {}, text)


def push(parcel: Parcel, repository: str, *, public: bool, revision: str | None, message: str | None) -> Pushed:
    """Uploads a checkpoint in one commit.

    parcel: the checkpoint.
    repository: OWNER/NAME.
    public: whether everyone may see a repository that is made, or that is there.
    revision: the branch, which is made where it is missing; by default main, of a repository without a model.
    message: the commit's; by default one with the fingerprint.
    Raises InputError where the user has no login or no right, or the name is taken, and WorkFailed where the hub or the
    network fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_name(repository)
    if get_token() is None:
        raise InputError("the hub knows nobody here; log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    added = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name in parcel.files
        for content in [parcel.content(name)]
    ]
    with _sentences(repository):
        _make(api, repository, public, revision)
        title = message or f"Upload merge {parcel.fingerprint}"
        commit = api.create_commit(repository, added, commit_message=title, revision=revision)
        there = set(api.list_repo_files(repository, revision=commit.oid))
    missing = sorted(set(parcel.files) - there)
    if missing:
        raise WorkFailed(f"{repository}: the hub did not keep {', '.join(missing)}; look at its .gitignore.")
    return Pushed(commit.commit_url, parcel.fingerprint)


def check_name(repository: str) -> None:
    """Raises InputError for a name that no repository can have."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise InputError(f"'{repository}' is no name of a repository; write OWNER/NAME, such as me/my-merge.")


def _make(api: "HfApi", repository: str, public: bool, revision: str | None) -> None:
    """Makes the repository, or checks that the one that is there may be written to."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repository, private=not public)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        _check_there(api, repository, public, revision)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)


def _check_there(api: "HfApi", repository: str, public: bool, revision: str | None) -> None:
    """Raises InputError where a repository holds a model already, or shows everyone what should be private."""
    info = api.model_info(repository)
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if revision is None and files - _MADE_BY_HUB:
        raise InputError(
            f"{repository}: this name is taken; choose another, or name a branch of the repository with --revision."
        )
    if not info.private and not public:
        raise InputError(f"{repository}: everyone may see this repository; add --public if they may see the merge.")


@contextmanager
def _sentences(repository: str) -> Iterator[None]:
    """Turns the errors of the hub and of the network into one sentence each."""
    # HTTPError is that of the network library, which differs between versions of the client
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(repository, error) from None
    except (HTTPError, OSError) as error:
        raise WorkFailed(f"{repository}: the hub cannot be reached ({first_line(error)}); try again.") from None
    except (RuntimeError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(repository, cause) from None
        raise WorkFailed(f"{repository}: the upload failed ({first_line(cause or error)}); try again.") from None


def _refused(repository: str, error: Any) -> InputError | WorkFailed:
    """The error to raise for an answer of the hub."""
    status = error.response.status_code
    said = " ".join(str(getattr(error, "server_message", None) or "").split()).rstrip(".")
    reason = f" (the hub says: {said})" if said else ""
    what = {
        400: f"the hub refuses this{reason}; correct it",
        401: f"the hub does not know the login{reason}; log in with `hf auth login`, or set HF_TOKEN",
        402: f"the account cannot store this{reason}; make room, or pay for it",
        403: f"the login may not write there{reason}; use a token with the right to write, or another OWNER",
        404: f"the hub has no such repository or revision{reason}; check the name",
        409: f"somebody changed the repository meanwhile{reason}; try again",
    }
    if status in what:
        return InputError(f"{repository}: {what[status]}.")
    return WorkFailed(f"{repository}: the hub answered {status}{reason}; try again later.")


def listed(files: Sequence[str], folder: Path) -> list[str]:
    """Names of files with their sizes, a line each."""
    return [f"  {name}  {_size(folder / name)}" for name in files]


def _size(path: Path) -> str:
    if not path.exists():
        return "(made now)"
    size, unit = float(path.stat().st_size), "B"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
