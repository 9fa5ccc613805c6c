"""The files of the user's own scores: source files and items. They are read, hashed and looked at here, and never run.

A search keeps copies of them in its run directory, so that it goes on with the code that it began with.
"""

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config.documents import shown
from evomerge.config.scoring import ScoreConfig
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, choices

_BLOCKS = ("objectives", "constraints", "report")


@dataclass(frozen=True, slots=True)
class OwnFiles:
    """What the files of one score hold.

    key: where the search file names the score, such as `objectives[0]`.
    source: the content of the source file.
    items: the content of the file with its items; None where it has none.
    """

    key: str
    source: bytes
    items: bytes | None

    def digest(self, function: str) -> str:
        """A hash of a function's name and of the files, 16 hexadecimal digits."""
        parts = [function.encode(), self.source, self.items or b""]
        lengths = json.dumps([*map(len, parts), self.items is None]).encode()
        return hashlib.sha256(b"".join([lengths, *parts])).hexdigest()[:16]


def read_own(config: SearchConfig) -> dict[str, OwnFiles]:
    """The files of every score of the user's own, by its name.

    config: the search's, with absolute paths.
    Raises InputError for a file that cannot be read, and for one whose content is not what the config's digest says.
    """
    found: dict[str, OwnFiles] = {}
    for key, score in _scores(config):
        place = Path(source_file(score))
        hint = "put it beside the search file, or name it by its path (FILE.py:FUNCTION)"
        source = _content(f"{key}.python", place, hint)
        items = None if score.items is None else _content(f"{key}.items", Path(score.items), "correct the path")
        files = OwnFiles(key, source, items)
        digest = files.digest(score.function)
        if score.digest not in (None, digest):
            raise InputError(
                f"{key}.digest is {score.digest}, but {place} and its items now have {digest}; restore the files, or "
                "begin a new search."
            )
        found.setdefault(score.name, files)
    return found


def _scores(config: SearchConfig) -> Iterator[tuple[str, ScoreConfig]]:
    """Every block of a score of the user's own, with its key path."""
    for block in _BLOCKS:
        scores: tuple[ScoreConfig, ...] = getattr(config, block)
        for index, score in enumerate(scores):
            if score.python is not None:
                yield f"{block}[{index}]", score


def source_file(score: ScoreConfig) -> str:
    """The path of the source file of a score."""
    return (score.python or "").rpartition(":")[0]


def _content(key: str, path: Path, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{key}: {path} cannot be read ({reason}); {hint}.") from None


def checked(config: SearchConfig) -> tuple[SearchConfig, dict[str, OwnFiles]]:
    """The config with the digests of the user's own scores filled in, and their files. No code is run.

    Raises InputError for files that cannot be read, source files without the function, and items that are no objects.
    """
    files = read_own(config)
    for score in config.own:
        own = files[score.name]
        _check_function(own, score)
        documents(own, score.items or "")
    return config.with_own(lambda score: {"digest": files[score.name].digest(score.function)}), files


def _check_function(files: OwnFiles, score: ScoreConfig) -> None:
    """Raises InputError where the source is not Python, binds no such name at its top level, or binds it to a function
    that cannot be called as it will be."""
    path = source_file(score)
    try:
        tree = ast.parse(files.source, path)
    except (SyntaxError, ValueError) as error:
        line = f" at line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise InputError(f"{files.key}.python: {path} is not valid Python{line}; correct it.") from None
    bound = {name: statement for statement in tree.body for name in _bound(statement)}
    if score.function not in bound:
        known = choices(score.function, bound)
        raise InputError(f"{files.key}.python names {score.function}, which {path} does not define; {known}.")
    function = bound[score.function]
    if isinstance(function, ast.FunctionDef) and not function.decorator_list:  # a decorator may change what it takes
        check_call(files.key, score, _signature(function.args))


def _signature(given: ast.arguments) -> inspect.Signature:
    """What a function takes, by its source."""
    kinds = inspect.Parameter
    first = [
        *((name, kinds.POSITIONAL_ONLY) for name in given.posonlyargs),
        *((name, kinds.POSITIONAL_OR_KEYWORD) for name in given.args),
    ]
    needed = [kinds.empty] * (len(first) - len(given.defaults))
    parameters = [
        kinds(name.arg, kind, default=default)
        for (name, kind), default in zip(first, [*needed, *given.defaults], strict=True)
    ]
    parameters += [kinds(given.vararg.arg, kinds.VAR_POSITIONAL)] if given.vararg else []
    parameters += [
        kinds(name.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else default)
        for name, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    parameters += [kinds(given.kwarg.arg, kinds.VAR_KEYWORD)] if given.kwarg else []
    return inspect.Signature(parameters)


def check_call(key: str, score: ScoreConfig, signature: inspect.Signature) -> None:
    """Raises InputError where a score's function cannot be called as it will be.

    key: where the search file names the score.
    score: its settings.
    signature: what the function takes.
    """
    try:
        signature.bind(None, None, None, **score.arguments)
    except TypeError as error:
        raise InputError(
            f"{key}.python: {score.function} cannot be called with a model, a tokenizer, a split and the arguments "
            f"{', '.join(score.arguments) or '(none)'} ({str(error).rstrip('.')}); correct either."
        ) from None


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top level of a file binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    for node in ast.walk(statement) if isinstance(statement, ast.Assign | ast.AnnAssign) else []:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def documents(files: OwnFiles, path: str) -> list[dict[str, Any]]:
    """The items of a score, one JSON object a line; empty where it has no file of items.

    files: the score's.
    path: of the items, for messages.
    Raises InputError for a line that is no object, and for a file without items.
    """
    if files.items is None:
        return []
    found = []
    for number, line in enumerate(files.items.decode("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error}); each line holds one object.") from None
        if not isinstance(item, dict):
            raise InputError(f"{path}, line {number}: expected an object, got {shown(item)}.")
        found.append(item)
    if not found:
        raise InputError(f"{files.key}.items: {path} is empty; write one JSON object a line, or remove the key.")
    return found


def kept(config: SearchConfig, files: Mapping[str, OwnFiles], there: str) -> tuple[SearchConfig, dict[str, bytes]]:
    """The config with the files of the user's own scores in a folder, and what that folder must hold: contents by file
    name.

    files: those of the config.
    there: the folder's path, wherever it will be.
    """

    def moved(score: ScoreConfig) -> dict[str, Any]:
        name = _file_name(score.name)
        items = None if score.items is None else f"{there}/{name}.jsonl"
        return {"python": f"{there}/{name}.py:{score.function}", "items": items}

    contents: dict[str, bytes] = {}
    for name, own in files.items():
        contents[f"{_file_name(name)}.py"] = own.source
        if own.items is not None:
            contents[f"{_file_name(name)}.jsonl"] = own.items
    return config.with_own(moved), contents


def _file_name(name: str) -> str:
    """What a score's files are called; names that differ in case alone must not share a file."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return plain if plain == name.lower() else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
