"""Recipes, read and merged as the commands do it."""

import warnings
from pathlib import Path

from evomerge.export import checkpoint
from evomerge.merging.sources import located
from evomerge.recipe import Recipe


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from a file in mergekit's dialect.

    path: of the YAML file.
    Raises InputError for a file that is missing or is no recipe. What the file says in vain is told by
    `warnings.warn`.
    """
    return located.load(Path(path), _warn)


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "cpu",
    shard_size: str = "5GB",
    tokenizer: bool = True,
    card: bool = True,
    statistics: str | Path | None = None,
) -> str:
    """Writes a recipe's merge as a Hugging Face checkpoint and returns its fingerprint, 16 hexadecimal digits.

    recipe: the recipe, or its file.
    out: the folder to write; it must be empty or not exist.
    device: where tensors are merged, as torch names it.
    shard_size: of a file of weights: bytes, as in 5GB, or numbers of parameters, as in 5B.
    tokenizer: whether the tokenizer is written too.
    card: whether a README.md is written too.
    statistics: a folder of statistics of the models, for methods that need some.
    Raises InputError for a recipe that cannot be merged, and WorkFailed, leaving nothing, where the recipe records
    another fingerprint than the merge has.
    """
    where = "recipe" if isinstance(recipe, Recipe) else str(recipe)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    fingerprint, _ = checkpoint.merge(
        loaded,
        Path(out),
        where,
        device,
        shard_size=shard_size,
        tokenizer=tokenizer,
        card=card,
        statistics=Path(statistics) if statistics is not None else None,
        warn=_warn,
    )
    return fingerprint


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
