"""YAML documents that people write: read, changed by `--set`, and checked against a pydantic model.

A mistake in a document becomes an InputError that names the file, the key path, what arrived and what was expected.
Key paths look like `objectives[0].metric`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from evomerge.errors import InputError, choices

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]
_EXPECTED = {
    "too_short": "give at least one",
    "dict_type": "write keys and values below it",
    "model_type": "write keys and values below it",
    "model_attributes_type": "write keys and values below it",
    "tuple_type": "write a list",
    "bool_type": "use true or false",
    "bool_parsing": "use true or false",
    "string_pattern_mismatch": "use letters, digits, '_', '.' and '-', with a letter or digit first",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file, read by a safe loader. Raises InputError for any other file."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a readable YAML file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 (at byte {error.start}); name a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise InputError(f"{path}: not valid YAML{line} ({problem}); correct the file.") from None
    if not isinstance(document, dict):
        found = "nothing (it is empty)" if document is None else f"a {type(document).__name__}"
        raise InputError(f"{path}: expected keys and values at the top of the file, got {found}.")
    return document


def validate(model: type[Model], document: Mapping[str, Any], path: Path | str) -> Model:
    """A document as an instance of a model.

    model: the pydantic model.
    document: the content of the file.
    path: the file or the key of the content, which opens an error's message.
    Raises InputError, one sentence, for the first problem.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_sentence(model, document, error.errors())}") from None


def _sentence(model: type[BaseModel], document: Mapping[str, Any], errors: Sequence[Any]) -> str:
    """The first problem in words. A validator's message that begins with a dot continues the key path."""
    error, location, forms = _first_problem(document, errors)
    key = _key(location)
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key; {choices(str(location[-1]), _keys_at(model, location[:-1], document))}."
    if error["type"] == "missing":
        return f"{key} is required but missing; add it."
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{key}{message}.".removeprefix(".") if message.startswith(".") or not key else f"{key}: {message}."
    expected = ", or ".join(dict.fromkeys(map(_expected, forms)))
    return f"{key or 'the file'} is {shown(error.get('input'))}; {expected}."


def _first_problem(document: Mapping[str, Any], errors: Sequence[Any]) -> tuple[Any, Location, Sequence[Any]]:
    """The most telling error about the first wrong value, its key path, and an error for each form that it may have.

    Where a value may have several forms, pydantic reports an error for each form. The most telling error is that of the
    form that was understood furthest.
    """
    located = [(error, _location(document, error)) for error in errors]
    wrong = [path for error, path in located if error["type"] != "missing"]
    first = located[0][1]
    if located[0][0]["type"] == "missing":  # where something else is wrong beside it, that may be what is missing
        first = next((path for path in wrong if path[: len(first) - 1] == first[:-1]), first)
    branches = [(error, path) for error, path in located if path[: len(first)] == first]
    error, path = max(branches, key=lambda branch: (len(branch[1]), branch[0]["type"] == "finite_number"))
    plain = error["type"] == "finite_number" or len(path) > len(first)
    return error, path, [error] if plain else [error for error, _ in branches]


def _location(document: Any, error: Any) -> Location:
    """An error's key path, without the names of forms and checks that pydantic puts in between."""
    location: Location = ()
    for key in error["loc"]:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            continue
        location += (key,)
    return (*location, error["loc"][-1]) if error["type"] == "missing" else location


def _key(location: Location) -> str:
    """A key path as `--set` takes it, such as `objectives[0].metric`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location).removeprefix(".")


def _expected(error: Any) -> str:
    """What to write instead of a value that pydantic refused."""
    if error["type"] == "literal_error":
        return choices(str(error["input"]), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    message = str(error["msg"]).replace("Input should be a ", "use a ").replace("Input should be ", "use a value ")
    return _EXPECTED.get(error["type"], message[0].lower() + message[1:])


def shown(value: Any) -> str:
    """A value as messages quote it: in JSON, at most 60 characters long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON does not know, or a value that holds itself
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(model: type[BaseModel], location: Location, document: Any) -> list[str]:
    """The keys of the model at a location; lists and dictionaries on the way are stepped over."""
    for key in location:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        document = document[key]
        if key in fields:
            models = _models_in(fields[str(key)].annotation)
            kind = _kind(models, document)
            model = next((one for one in models if kind in _kinds(one)), next(iter(models), model))
    return [field.alias or name for name, field in model.model_fields.items()]


def _kind(models: Sequence[type[BaseModel]], document: Any) -> Any:
    """The kind of a block: what its `kind` says, or else the default kind of the first model."""
    default = next((field.default for model in models[:1] if (field := model.model_fields.get("kind"))), None)
    return document.get("kind", default) if isinstance(document, Mapping) else default


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    """The values that `kind` may have in a model."""
    field = model.model_fields.get("kind")
    return getattr(field.annotation, "__args__", ()) if field is not None else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation, *annotation.__subclasses__()]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def set_value(document: dict[str, Any], override: str) -> None:
    """Sets one value in a document.

    document: the document, which is changed in place.
    override: KEY.PATH=VALUE, where VALUE is YAML and a list's items are `key[0]` or `key.0`.
    Raises InputError where the override has another form, or the path leads to no key.
    """
    key, separator, text = override.partition("=")
    *parents, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    if not separator or not all([*parents, last]):
        raise InputError(f"--set {override}: expected KEY.PATH=VALUE, for example optimizer.evaluations=100.")
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"--set {override}: the value is not valid YAML; quote it.") from None
    node: Any = document
    for index, parent in enumerate(parents):
        node = _child(node, parent, override)
        if node is None:
            raise InputError(f"--set {override}: {'.'.join(parents[: index + 1])} holds no keys to set.")
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise InputError(f"--set {override}: {'.'.join(parents)} is {shown(node)}, which holds no keys to set.")


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, key, override)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    return None


def _position(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise InputError(f"--set {override}: '{key}' is no index into a list of {len(node)}; count from 0.")
    return int(key)
