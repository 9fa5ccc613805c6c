"""Recipes read on another machine than the one that exported them: their models are found by other references."""

from collections.abc import Callable
from pathlib import Path

from evomerge.errors import InputError
from evomerge.merging.plan import unread_parameters
from evomerge.merging.sources.references import split_adapter
from evomerge.recipe import Recipe, single
from evomerge.recipe import load as load_recipe


def located(recipe: Recipe) -> Recipe:
    """A copy of a recipe in which paths that do not exist here are replaced by the references that they stood for where
    the recipe was exported. Raises InputError where an aligned model is missing, which has no other place."""
    aliases = recipe.evomerge.aliases
    tokens = [recipe.vocabulary.source] if recipe.vocabulary is not None else []
    named = (*recipe.references, *tokens)
    missing = {path: aliases[path] for path in named if path in aliases and not _is_here(path)}
    for path, own in recipe.evomerge.aligned.items():
        if path in named and not _is_here(path):
            again = (
                f", or make it again: `evomerge align {own.model} {path} --to {own.to}`" if own.by == "weights" else ""
            )
            raise InputError(
                f"{path}: is not here, and the merge needs it. It is {own.sentence}; bring it along{again}."
            )
    return recipe.renamed(missing)


def _is_here(path: str) -> bool:
    model, adapter = split_adapter(path)
    return Path(model).exists() and (adapter is None or Path(adapter).exists())


def read(target: str, warn: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a YAML file, or the recipe of one unchanged model.

    target: a path that ends in .yaml or .yml, or the reference of a model.
    warn: called with a sentence for each key or parameter that is ignored.
    Raises InputError for a file that is no recipe.
    """
    if target.endswith((".yaml", ".yml")):
        return located(load(Path(target), warn))
    return single(target)


def load(path: Path, warn: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a file.

    path: a YAML file.
    warn: called with a sentence for each key or parameter that is ignored.
    Raises InputError for a file that is no recipe.
    """
    loaded = load_recipe(path, warn)
    for warning in unread_parameters(loaded):
        warn(f"{path}: {warning}")
    return loaded
