"""mergekit's dialect as people write it, brought to the one form that `Recipe` takes.

Mappings in place of model references become `MODEL@REVISION+ADAPTER@REVISION`. Keys that mergekit ignores at their
level are left out with a warning. Keys without a value are left out silently. A single module under `modules` is the
recipe of the whole model. `Recipe` checks everything else. The block `evomerge:`, which mergekit does not have, is
passed on unchanged, and `post: {aim: }` becomes part of the method's name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import InputError, closest

Warn = Callable[[str], None]
Reader = Callable[[Any, str, Warn], Any]  # (value, key path, called for each ignored key) -> value in the plain form
_ONLY_MODULE = "default"  # mergekit's name for the module of a model that has one
_WHOLE = "since models are merged whole; slices take layers"


def plain(document: Mapping[str, Any], warn: Warn) -> dict[str, Any]:
    """A recipe's document in the form that `Recipe` takes.

    document: the content of a recipe file.
    warn: called with a sentence for each key that is ignored.
    Raises InputError for what mergekit reads and evomerge cannot merge.
    """
    post = document.get("post")
    content: dict[str, Any] = _RECIPE({key: value for key, value in document.items() if key != "post"}, "", warn)
    content = _without_modules(content, warn)
    return content if post is None else _with_post(content, post)


def _with_post(content: dict[str, Any], post: Any) -> dict[str, Any]:
    """A recipe whose post-step is part of its method's name, which mergekit refuses; it would ignore the key `post`."""
    known = isinstance(post, Mapping) and post.keys() == {"aim"} and isinstance(post["aim"] or {}, Mapping)
    given = dict(post["aim"] or {}) if known else {}
    if not known or given.keys() - {"omega"}:
        raise InputError(f"post is {post}; expected {{aim: {{omega: NUMBER}}}}.")
    method = str(content.get("merge_method", "")).removesuffix("+aim")
    return {**content, "merge_method": f"{method}+aim", "parameters": {**given, **content.get("parameters", {})}}


def _without_modules(content: dict[str, Any], warn: Warn) -> dict[str, Any]:
    """A recipe without `modules`. A module's parameters take precedence over the recipe's."""
    modules = content.pop("modules", None)
    if not modules:
        return content
    if "models" in content or "slices" in content:
        raise InputError("give exactly one of models, slices and modules.")
    if not isinstance(modules, Mapping) or not all(isinstance(module, Mapping) for module in modules.values()):
        raise InputError(f"modules is {modules}; expected {{default: {{models: [...]}}}}, or models without modules.")
    if len(modules) > 1:
        raise InputError(
            f"modules names {len(modules)} parts ({', '.join(map(str, modules))}), but models are merged as a whole; "
            "write models without modules, and give a part its own numbers with filters of its tensors' names, as in "
            "weight: [{filter: vision_tower, value: 0}, {value: 0.5}]."
        )
    ((name, module),) = modules.items()
    if name != _ONLY_MODULE:
        warn(f"modules.{name} is read as the recipe of the whole model; mergekit would write that part alone.")
    parameters = dict(content.get("parameters") or {})
    for key, setting in (module.get("parameters") or {}).items():
        own, other = _filtered(setting), parameters.get(key)
        rest = [] if other is None else _filtered(other) or [{"value": other}]
        parameters[key] = [*own, *rest] if own else setting
    return {**content, **module, **({"parameters": parameters} if parameters else {})}


def _filtered(setting: Any) -> list[Any]:
    """The values with filters of a parameter's setting; empty where it has none."""
    settings = setting if isinstance(setting, list) else [setting]
    return settings if any(isinstance(item, Mapping) for item in settings) else []


def as_it_is(value: Any, _key: str, _warn: Warn) -> Any:
    return value


def block(readers: Mapping[str, Reader], reasons: Mapping[str, str] | None = None) -> Reader:
    """A reader of a mapping.

    readers: what reads the values, by key.
    reasons: why certain other keys are ignored, by key.
    """

    def read(value: Any, key: str, warn: Warn) -> Any:
        if not isinstance(value, Mapping):
            return value
        found = {}
        for name, content in value.items():
            path = f"{key}.{name}".removeprefix(".")
            if name not in readers:
                warn(_ignored(path, str(name), readers, (reasons or {}).get(name)))
            elif (read := readers[name](content, path, warn) if content is not None else None) is not None:
                found[name] = read
        return found

    return read


def _ignored(path: str, name: str, known: Mapping[str, Reader], reason: str | None) -> str:
    close = closest(name, known)
    hint = f"; did you mean '{close}'?" if close else "."
    return f"{path} is ignored, {reason}." if reason else f"{path} is ignored, as mergekit ignores it{hint}"


def each(reader: Reader) -> Reader:
    """A reader of a list, whose items `reader` reads."""

    def read(value: Any, key: str, warn: Warn) -> Any:
        if not isinstance(value, list):
            return value
        return [reader(item, f"{key}[{index}]", warn) for index, item in enumerate(value)]

    return read


def _form(reader: Reader) -> Reader:
    """A reader of one of the forms that a recipe may have; an empty form counts as left out."""
    return lambda value, key, warn: reader(value, key, warn) if value else None


def _named(reader: Reader) -> Reader:
    """A reader of a mapping with any keys, whose values `reader` reads."""

    def read(value: Any, key: str, warn: Warn) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: reader(content, f"{key}.{name}", warn) for name, content in value.items()}

    return read


def _setting(value: Any, key: str, warn: Warn) -> Any:
    """A parameter's value, or values with filters."""
    return each(_CONDITION)(value, key, warn) if isinstance(value, list) else _CONDITION(value, key, warn)


def _dtype(value: Any, _key: str, _warn: Warn) -> Any:
    """A dtype without the `torch.` that mergekit also takes."""
    return value.removeprefix("torch.") or None if isinstance(value, str) else value


def _architecture(value: Any, key: str, _warn: Warn) -> None:
    if value:
        raise InputError(
            f"{key} is not supported, since the model's config.json says what it is; remove it, or merge this recipe "
            "with mergekit."
        )


def reference(value: Any, key: str, warn: Warn) -> Any:
    """A model, by name or as a mapping of model, adapter and their revisions."""
    if isinstance(value, str):
        parts = [value] if _is_folder(value) else value.split("+")
        return "+".join(_part(part, key, warn) for part in parts)
    if not isinstance(value, Mapping):
        return value
    if value.get("model") is None:
        raise InputError(f"{key}.model is required but missing; write the model below it ({{model: {{path: NAME}}}}).")
    found = _REFERENCE(value, key, warn)
    return found["model"] + (f"+{found['lora']}" if "lora" in found else "")


def _path(value: Any, key: str, warn: Warn) -> str:
    """A model or an adapter in a reference, by name or as a mapping of path and revision."""
    found = _PATH(value, key, warn) if isinstance(value, Mapping) else {"path": value}
    if not found.get("path"):
        raise InputError(f"{key}.path is required but missing; add it.")
    for name, content in found.items():
        if not isinstance(content, str):
            raise InputError(f"{key}.{name} is {content}; write it as text, in quotes where YAML reads a number.")
    return _part("@".join(filter(None, (found["path"], found.get("revision")))), key, warn)


def _part(name: str, key: str, warn: Warn) -> str:
    """A model or an adapter without the revision that a folder cannot have."""
    path, at, revision = name.rpartition("@")
    if not at or _is_folder(name) or not _is_folder(path):
        return name
    warn(f"{key}: the revision {revision or '(none)'} is ignored, since {path} is a folder.")
    return path


def _is_folder(name: str) -> bool:
    return bool(name) and Path(name).expanduser().is_dir()


def _token_source(value: Any, key: str, warn: Warn) -> Any:
    """Where a token's embedding comes from: a mapping with a `kind` names no model by itself."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return reference(value, key, warn) if kind is None else _TOKEN_SOURCES.get(kind, as_it_is)(value, key, warn)


_CONDITION = block({"value": as_it_is, "filter": as_it_is})
_PATH = block({"path": as_it_is, "revision": as_it_is})
_REFERENCE = block({"model": _path, "lora": _path, "override_architecture": _architecture})
_PARAMETERS = _named(_setting)
_MODEL = block({"model": reference, "parameters": _PARAMETERS}, {"layer_range": _WHOLE})
_SOURCE = block({"model": reference, "layer_range": as_it_is, "parameters": _PARAMETERS})
_SLICE = block({"sources": each(_SOURCE), "base_model": reference, "parameters": _PARAMETERS})
_MODULE = block({"models": _form(each(_MODEL)), "slices": _form(each(_SLICE)), "parameters": _PARAMETERS})
_TOKEN_SOURCES = {
    "model_token": block({"kind": as_it_is, "model": reference, "token_id": as_it_is, "token": as_it_is}),
    "zero": block({"kind": as_it_is}),
}
_TOKEN = block({"source": _token_source, "force": as_it_is})
_TOKENIZER = block({"source": reference, "tokens": _named(_TOKEN), "pad_to_multiple_of": as_it_is})
_RECIPE = block(
    {
        "merge_method": as_it_is,
        "base_model": reference,
        "models": _form(each(_MODEL)),
        "slices": _form(each(_SLICE)),
        "modules": _form(_named(_MODULE)),
        "parameters": _PARAMETERS,
        "dtype": _dtype,
        "out_dtype": _dtype,
        "tokenizer_source": reference,
        "tokenizer": _TOKENIZER,
        "chat_template": as_it_is,
        "evomerge": as_it_is,
    }
)
