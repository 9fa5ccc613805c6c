"""A recipe read on another machine than the one that exported it: its models are found again."""

from collections.abc import Callable
from pathlib import Path

from evomerge.merging.plan import unread_parameters
from evomerge.merging.sources.references import split_adapter
from evomerge.recipe import Recipe, single


def located(recipe: Recipe) -> Recipe:
    """A recipe whose missing paths are replaced by what they stood for where it was exported."""
    aliases = recipe.evomerge.aliases
    missing = {path: aliases[path] for path in recipe.references if path in aliases and not _is_here(path)}
    return recipe.renamed(missing)


def _is_here(path: str) -> bool:
    model, adapter = split_adapter(path)
    return Path(model).exists() and (adapter is None or Path(adapter).exists())


def read(target: str, warn: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a YAML file, or the recipe that is a model unchanged. warn: is told of what a file says in vain."""
    if target.endswith((".yaml", ".yml")):
        return located(load(Path(target), warn))
    return single(target)


def load(path: Path, warn: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a file. warn: is told of keys and parameters that are ignored."""
    from evomerge import recipe

    found = recipe.load(path, warn)
    for warning in unread_parameters(found):
        warn(f"{path}: {warning}")
    return found
