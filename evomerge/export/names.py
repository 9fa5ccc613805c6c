"""Names for models that may be shared: hub ids as they are, and for paths of this machine the last part of the path."""

import re
from collections.abc import Iterator
from pathlib import Path

from evomerge.recipe import ModelToken, Recipe, TokenizerSettings

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?:@[\w./-]+)?", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\](\w+)", re.ASCII)
_ZOO = re.compile(r"zoo:\w+", re.ASCII)
_TEMPLATE = re.compile(r"[{\n]")  # what a chat template has and the reference of a model has not


def public_names(recipe: Recipe) -> dict[str, str]:
    """A name for every model that a recipe mentions, by its reference. No two are alike, and none is a path.

    recipe: the recipe, with its aliases.
    """
    names: dict[str, str] = {}
    for reference in dict.fromkeys(_mentioned(recipe)):
        name = _public(recipe.evomerge.aliases.get(reference, reference))
        taken = set(names.values())
        numbered = (f"{name} ({number})" for number in range(2, len(taken) + 3))
        names[reference] = next(each for each in (name, *numbered) if each not in taken)
    return names


def public_recipe(recipe: Recipe) -> Recipe:
    """A copy of a recipe that names no path of this machine."""
    renamed = recipe.renamed(public_names(recipe))
    measured = renamed.evomerge.statistics
    statistics = measured and measured.model_copy(update={"folder": None})
    aligned = {
        name: own.model_copy(update={"model": _public(own.model), "to": _public(own.to)})
        for name, own in renamed.evomerge.aligned.items()
    }
    public = renamed.evomerge.model_copy(update={"aliases": {}, "aligned": aligned, "statistics": statistics})
    return renamed.model_copy(update={"evomerge": public})


def without_paths(text: str, recipe: Recipe) -> str:
    """A text with names in the place of the paths of a recipe's models."""
    noted = recipe.evomerge
    names = {path: _public(path) for own in noted.aligned.values() for path in (own.model, own.to)}
    names |= public_names(recipe) | {path: _public(alias) for path, alias in noted.aliases.items()}
    parts = {part: _public(part) for reference in names for part in reference.split("+")}
    local = {path: name for path, name in (parts | names).items() if name != path and len(path) > 1}
    for path in sorted(local, key=len, reverse=True):
        text = text.replace(path, local[path])
    return text


def hub_id(name: str) -> str | None:
    """The hub id of a public name, without its revision; None where it has none."""
    model = name.partition("+")[0].partition("@")[0]
    return model if _HUB_ID.fullmatch(model) else None


def _mentioned(recipe: Recipe) -> Iterator[str]:
    """Every reference of a recipe, those of tokenizers and chat templates among them."""
    yield from recipe.references
    yield from (slice_.base_model for slice_ in recipe.slices or () if slice_.base_model)
    yield from _of_tokenizer(TokenizerSettings(source=recipe.tokenizer_source or "base"))
    yield from _of_tokenizer(recipe.tokenizer or TokenizerSettings(source="base"))
    template = recipe.chat_template
    if template is not None and re.search(r"[/\\]", template) and not _TEMPLATE.search(template):
        yield template


def _of_tokenizer(settings: TokenizerSettings) -> Iterator[str]:
    if settings.source not in ("base", "union"):
        yield settings.source
    for token in (settings.tokens or {}).values():
        if isinstance(token.source, ModelToken):
            yield token.source.model
        elif isinstance(token.source, str):
            yield token.source


def _public(reference: str) -> str:
    """A reference as it may be shown anywhere: in a line of text, in a code span, in a cell of a table."""
    if "+" in reference and not _is_folder(reference):
        return "+".join(_public(part) for part in reference.split("+"))
    cached = _CACHED.search(reference)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}@{cached[3]}"
    if _ZOO.fullmatch(reference) or (_HUB_ID.fullmatch(reference) and not _is_folder(reference)):
        return reference
    parts = [part for part in re.split(r"[/\\]", reference) if part.strip() not in ("", ".", "..", "~")]
    return _plain(parts[-1]) if parts else "model"


def _plain(name: str) -> str:
    """A name without characters that would end a line, a code span or a cell."""
    kept = "".join(letter if letter.isprintable() and letter not in "`|<>[]" else "-" for letter in name)
    return " ".join(kept.split()) or "model"


def _is_folder(reference: str) -> bool:
    try:
        return Path(reference).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
