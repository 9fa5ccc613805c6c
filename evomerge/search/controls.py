"""Controls: what a search must beat, evaluated like any candidate on the same items.

The base, every parent and the uniform merge are always controls. On request there are more: grids over one weight and
density for all models (task arithmetic, TIES, DARE-TIES), a grid over one weight per model, and random search with the
search's own budget.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np

from evomerge.candidate import Candidate
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.randomness import counter_rng
from evomerge.recipe import Parameters, Provenance, Recipe, Source, linear, single
from evomerge.spaces import Genome, SearchSpace, canonical

GENERATION = -1
BASE, UNIFORM, PARENT = "base", "uniform", "parent"
ESSENTIAL = (BASE, PARENT, UNIFORM)
ONE_KNOB, PER_MODEL, RANDOM = "one_knob", "per_model", "random"
_WEIGHTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5)
_TIES_WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5)
_DENSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
_LARGEST_GRID = 125
_LEVELS = {5: (0.0, 0.4, 0.7, 1.0, 1.4), 4: (0.0, 0.4, 0.8, 1.2), 3: (0.0, 0.5, 1.0), 2: (0.0, 0.7)}


def family(candidate: Candidate) -> str:
    """The kind of control: `base`, `parent`, `uniform`, `one_knob`, `per_model` or `random`; else `search`."""
    return candidate.id.split("-")[0] if candidate.kind == "control" else "search"


def essential_controls(config: SearchConfig) -> list[Candidate]:
    """Base, parents and uniform merge, in this order. There is no uniform merge where a search merges no weights."""
    recipes = {BASE: single(config.base)}
    recipes |= {f"{PARENT}-{name}": single(reference) for name, reference in config.models.items()}
    if _merges(config):
        recipes[UNIFORM] = linear(dict.fromkeys(config.models.values(), 1.0))
    return [_control(name, index, recipe) for index, (name, recipe) in enumerate(recipes.items())]


def start_weights(config: SearchConfig, control: str) -> Mapping[str, float]:
    """The weights that make an essential control, by model; empty for the base.

    config: the search's.
    control: the control's id.
    """
    if control == UNIFORM:
        return dict.fromkeys(config.models, 1.0 / len(config.models))
    return {control.removeprefix(f"{PARENT}-"): 1.0} if control.startswith(f"{PARENT}-") else {}


def further_controls(config: SearchConfig, space: SearchSpace) -> list[Candidate]:
    """The controls that the config asks for besides the essential controls, in a fixed order.

    config: the search's.
    space: from which random search draws.
    """
    first = _count_essential(config)
    recipes: list[tuple[str, Recipe, Genome | None]] = []
    if config.controls.one_knob:
        recipes += [(f"{ONE_KNOB}-{i:03d}", recipe, None) for i, recipe in enumerate(_one_knob(config))]
    if config.controls.per_model:
        recipes += [(f"{PER_MODEL}-{i:03d}", recipe, None) for i, recipe in enumerate(_per_model(config))]
    controls = [_control(name, first + i, recipe) for i, (name, recipe, _) in enumerate(recipes)]
    if config.controls.random_search:
        controls += _random_search(config, space, first + len(controls))
    return controls


def count_controls(config: SearchConfig) -> int:
    """How many controls a search has, without making them."""
    asked = config.controls
    one_knob = len(_WEIGHTS) + 2 * len(_TIES_WEIGHTS) * len(_DENSITIES) if asked.one_knob else 0
    per_model = len(_levels(config)) ** len(config.models) if asked.per_model else 0
    random = config.budget if asked.random_search else 0
    return _count_essential(config) + one_knob + per_model + random


def _count_essential(config: SearchConfig) -> int:
    return 1 + len(config.models) + _merges(config)


def _merges(config: SearchConfig) -> bool:
    return config.space.merging is not None


def start_of_weights(config: SearchConfig) -> float | None:
    """The weight at which the search starts all weights; None where the config sets none."""
    space = config.space.merging
    return space.start_of_weights if space is not None else None


def check_controls(config: SearchConfig) -> None:
    """Checks that the controls can be made. Raises InputError where one cannot."""
    if not _merges(config) and (config.controls.one_knob or config.controls.per_model):
        key = "one_knob" if config.controls.one_knob else "per_model"
        raise InputError(f"controls.{key} is true, but a data-flow search merges no weights; set it to false.")
    if config.controls.per_model:
        _levels(config)


def _random_search(config: SearchConfig, space: SearchSpace, first: int) -> list[Candidate]:
    """Candidates that the space draws at random.

    Where the optimizer has stages, only the genes of the first stage are drawn, so that random search has no advantage
    over the search itself. Rows are not weighted, since gradients have learned their weights.
    """
    stages = config.optimizer.stages
    moves = np.array([not stages or gene.kind in stages[0].genes for gene in space.genes])
    start = space.encode({})
    points = (space.draw(counter_rng(config.seed, "random_search", index)) for index in range(config.budget))
    genomes = [canonical(space.genes, np.where(moves, point, start)) for point in points]
    recipes = [space.decode(genome) for genome in genomes]
    plain = [recipe.without_step("rows") for recipe in recipes]
    return [
        _control(f"{RANDOM}-{i:04d}", first + i, drawn, tuple(genome.tolist()) if drawn == recipe else None)
        for i, (drawn, recipe, genome) in enumerate(zip(plain, recipes, genomes, strict=True))
    ]


def _one_knob(config: SearchConfig) -> Iterator[Recipe]:
    for weight in _WEIGHTS:
        yield _same_for_all(config, "task_arithmetic", {"weight": weight})
    for method in ("ties", "dare_ties"):
        for weight, density in product(_TIES_WEIGHTS, _DENSITIES):
            yield _same_for_all(config, method, {"weight": weight, "density": density})


def _per_model(config: SearchConfig) -> Iterator[Recipe]:
    for weights in per_model_weights(config):
        yield _merge(config, "task_arithmetic", [{"weight": weight} for weight in weights.values()])


def per_model_weights(config: SearchConfig) -> Iterator[dict[str, float]]:
    """Every point of the grid over one weight per model, as weights by model."""
    for weights in product(_levels(config), repeat=len(config.models)):
        yield dict(zip(config.models, weights, strict=True))


def _levels(config: SearchConfig) -> Sequence[float]:
    """The largest set of weights whose grid over all models has at most `_LARGEST_GRID` points.

    Raises InputError where even the smallest set has more.
    """
    for count, levels in _LEVELS.items():
        if count ** len(config.models) <= _LARGEST_GRID:
            return levels
    raise InputError(
        f"controls.per_model is a grid over the weight of each model, too large for {len(config.models)} models; "
        "set it to false."
    )


def _same_for_all(config: SearchConfig, method: str, parameters: Parameters) -> Recipe:
    return _merge(config, method, [parameters] * len(config.models))


def _merge(config: SearchConfig, method: str, parameters: Sequence[Parameters]) -> Recipe:
    sources, space = zip(config.models.values(), parameters, strict=True), config.space.merging
    assert space is not None
    shared: Parameters = {"normalize": False}
    return Recipe(
        merge_method=method,
        base_model=config.base,
        models=tuple(Source(model=reference, parameters=given) for reference, given in sources),
        parameters=shared | {"rescale": True} if method.startswith("dare") else shared,
        evomerge=Provenance(seed=config.seed, rescale=space.rescale),
    )


def _control(name: str, index: int, recipe: Recipe, genome: tuple[float, ...] | None = None) -> Candidate:
    return Candidate(id=name, kind="control", generation=GENERATION, index=index, recipe=recipe, genome=genome)
