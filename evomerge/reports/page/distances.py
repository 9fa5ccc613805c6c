"""How far a merge is from the models that it is made of, layer by layer."""

import math
from collections import defaultdict
from dataclasses import dataclass

from evomerge.config.search import SearchConfig
from evomerge.layers import layer_count, place_of, place_order
from evomerge.merging.naming import naming_in
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.statistics import Find
from evomerge.merging.streamed.merge import StreamedMerge
from evomerge.merging.vocabulary import with_tokens
from evomerge.recipe import Recipe
from evomerge.reports.page.recipes import BASE

MOST_PARAMETERS = 300_000_000  # of a model: a merge of more takes longer than people wait for a report


@dataclass(frozen=True, slots=True)
class Distances:
    """Distances, as shares of the norm of the base's weights in the same place.

    places: `embeddings`, the numbers of the layers, `head`.
    merged: by model, how far the merge is from it in each place; the base is called `base`.
    parents: by model, how far it is from the base in each place.
    whole: by model, how far the whole merge is from it.
    whole_parents: by model, how far the whole of it is from the base.
    """

    places: tuple[str, ...]
    merged: dict[str, tuple[float, ...]]
    parents: dict[str, tuple[float, ...]]
    whole: dict[str, float]
    whole_parents: dict[str, float]


def distances(recipe: Recipe, config: SearchConfig, models: Models, statistics: Find | None = None) -> Distances | str:
    """The distances of a recipe's merge, or a sentence that says why there are none.

    recipe: the recipe, whose references are those of the config.
    config: the search's, which names the models.
    models: the models of the search.
    statistics: finds what was measured of them.
    """
    size = sum(math.prod(info.shape) for info in models.table.values())
    if size > MOST_PARAMETERS:
        return (
            f"The models have {size / 1e6:,.0f} million parameters each. Distances are only computed for models of "
            f"up to {MOST_PARAMETERS / 1e6:,.0f} million, since the merge has to be made for them."
        )
    if recipe.evomerge.parallel:
        return "The merge runs layers side by side, so that distances of weights would not say what it does."
    moved = naming_in(models.base.folder).vocabulary if config.space.tokenizer_source is not None else frozenset()
    recipe = with_tokens(recipe, config, models)
    merge = StreamedMerge(recipe, models, "the recipe", "cpu", config.evaluation.dtype, statistics)
    if not merge.plan.keeps_layers or len(merge.plan.layers) != layer_count(models.table):
        return "The merge has other layers than its parents, so that no weight of it lies opposite to one of theirs."
    return _measured(merge, {BASE: config.base, **config.models}, models, moved)


def _measured(merge: StreamedMerge, references: dict[str, str], models: Models, moved: frozenset[str]) -> Distances:
    """The sums of squares are taken place by place, one tensor after the other; those that are `moved` are left out."""
    norms: dict[str, float] = defaultdict(float)
    merged: dict[str, dict[str, float]] = {name: defaultdict(float) for name in references}
    parents: dict[str, dict[str, float]] = {name: defaultdict(float) for name in references if name != BASE}
    for name, made in merge.merged():
        if name in moved or any(models[reference].weights.find(name) is None for reference in references.values()):
            continue  # among them a head that some models tie to their embedding
        place, whole = place_of(name), made.double()
        own = {model: models[reference].weights.read(name).double() for model, reference in references.items()}
        norms[place] += float(own[BASE].square().sum())
        for model, tensor in own.items():
            merged[model][place] += float((whole - tensor).square().sum())
            if model != BASE:
                parents[model][place] += float((tensor - own[BASE]).square().sum())
    places = tuple(sorted(norms, key=place_order))
    total = math.sqrt(sum(norms.values())) or 1.0

    def by_place(squares: dict[str, float]) -> tuple[float, ...]:
        return tuple(math.sqrt(squares[place] / (norms[place] or 1.0)) for place in places)

    def whole_of(squares: dict[str, float]) -> float:
        return math.sqrt(sum(squares.values())) / total

    return Distances(
        places,
        {model: by_place(squares) for model, squares in merged.items()},
        {model: by_place(squares) for model, squares in parents.items()},
        {model: whole_of(squares) for model, squares in merged.items()},
        {model: whole_of(squares) for model, squares in parents.items()},
    )
