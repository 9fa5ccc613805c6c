"""Scores one model or recipe by hand, with the tasks, items and device of a search file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomerge.config.base import SPLITS
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.layers import layer_count
from evomerge.merging.plan import make_plan
from evomerge.merging.sources import located
from evomerge.merging.sources.models import Model, Models, find_models
from evomerge.merging.sources.preflight import preflight
from evomerge.merging.sources.references import locate, split_adapter
from evomerge.merging.sources.statistics import shelf_of
from evomerge.merging.vocabulary import tokens_of
from evomerge.recipe import Recipe
from evomerge.search.criteria import mean_of_scores
from evomerge.search.preparation import prepare_file


def score(
    target: str, search_file: Path, split: str, warn: Callable[[str], None] = lambda _: None
) -> tuple[SearchConfig, dict[str, Any]]:
    """The resolved config, and what JSON shows of a model or recipe on a split: scores, error, items, fingerprint.

    Items that were seen by the search that made the recipe are never held out; `left_out` says how many these are.

    target: a model's reference or a recipe's path.
    search_file: the file whose tasks, items and device are used.
    split: `search`, `selection` or `heldout`.
    warn: is told of settings in a recipe that have no effect.
    Raises InputError for mistakes in the file, the target or the split.
    """
    from evomerge.workers.memory import unquantized
    from evomerge.workers.worker import Worker

    if split not in SPLITS:
        raise InputError(f"--split is '{split}'; use search or heldout, or selection where items.selection is given.")
    prepared = prepare_file(search_file)
    wanted = next((name for name in prepared.config.splits if name == split), None)
    if wanted is None:
        raise InputError(f"--split is {split}, but {search_file} has no items.selection; use search or heldout.")
    recipe = located.read(target, warn)
    config, models = unquantized(prepared.config), find_models(prepared.config.base, recipe.references)
    if recipe.models is not None and len(models) == 1:
        (alone,) = models.values()
        if layer_count(alone.table) != layer_count(prepared.models.table):  # a path's checkpoint stands for itself
            config, models = config.model_copy(update={"base": alone.reference}), Models(alone, models.by_reference)
    if _has_tokens_of(recipe, models.base):  # as the recipes of searches over several vocabularies
        space = config.space.model_copy(update={"tokenizer_source": "base"})
        recipe, config = recipe.model_copy(update={"tokenizer": None}), config.model_copy(update={"space": space})
    preflight(models, same_vocabulary=config.space.tokenizer_source is None)
    make_plan(recipe, models.table, target)
    seen, head_apart = recipe.evomerge.digests, recipe.evomerge.head_apart
    shelf = shelf_of(recipe, target)
    worker = Worker(config, models, prepared.targets, seen=seen, head_apart=head_apart, statistics=shelf)
    evaluation = worker.evaluate(recipe, wanted)
    return prepared.config, {
        "target": target,
        "split": split,
        "scores": dict(evaluation.scores) if evaluation.scores is not None else None,
        "mean": mean_of_scores(evaluation.scores, config.objectives),
        "error": evaluation.error,
        "items": evaluation.items,
        "left_out": worker.left_out(wanted),
        "truncated": evaluation.truncated,
        "fingerprint": evaluation.fingerprint,
    }


def _has_tokens_of(recipe: Recipe, base: Model) -> bool:
    """Whether a recipe builds a tokenizer, and it is the base's, with as many rows."""
    wanted = recipe.vocabulary
    if wanted is None or wanted.source in ("base", "union"):
        return False
    if locate(split_adapter(wanted.source)[0]) != base.folder:
        return False
    return wanted == tokens_of(base.folder, wanted.source)
