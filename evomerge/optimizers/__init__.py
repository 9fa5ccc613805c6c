"""Optimizers: ask for a generation of genomes, tell what they scored.

All of them work on told scores alone and draw every random number from a counter, so that telling the same things again
gives the same proposals: that replay is how a search resumes.

To add one: write a class with this protocol, add a row to `_MAKERS`, and run it through tests/contracts/optimizer.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evomerge.config import OptimizerConfig, OptimizerName
from evomerge.errors import InputError
from evomerge.optimizers.ranking import Ranking
from evomerge.pareto import Scores
from evomerge.spaces import Gene, Genome
from evomerge.spaces import box as box
from evomerge.spaces.paths import GATE, HOP


class Optimizer(Protocol):
    def ask(self) -> Genome:
        """The next generation, shape (population, dimension), canonical (see `spaces.canonical`); an empty one where
        there is nothing left to try."""
        ...

    def tell(self, genomes: Genome, scores: Scores) -> None:
        """The scores of genomes that were asked for, shape (n, objectives), larger is better, NaN for candidates that
        failed; in a search with limits more columns, which `Problem.ranking` understands (see there). They are a
        generation in its order, or (`optimizer.schedule: async`) any that were not told yet."""
        ...


@dataclass(frozen=True, slots=True)
class Problem:
    """What an optimizer starts from: genes, the start in their units, the seed, how scores are ranked, and the genomes
    whose scores are known from controls that they stand for, shapes (n, dimension) and (n, objectives). draw: how the
    space draws a random genome; by default uniformly."""

    genes: tuple[Gene, ...]
    start: Genome
    seed: int
    ranking: Ranking
    known: tuple[Genome, Scores] | None = None
    draw: Callable[[np.random.Generator], Genome] | None = None


def make_optimizer(config: OptimizerConfig, problem: Problem) -> Optimizer:
    """The configured optimizer, in stages where there are any. The config must be resolved (`resolve`)."""
    from evomerge.optimizers.stages import StagedOptimizer

    if not config.stages:
        return _make(config, problem)
    return StagedOptimizer(config, problem, _make)


def _make(config: OptimizerConfig, problem: Problem) -> Optimizer:
    return _MAKERS[config.name](config, problem)


def resolve(config: OptimizerConfig, dimension: int, objectives: int, genes: Sequence[Gene] = ()) -> OptimizerConfig:
    """The config with its automatic choices made: they must not change when a finished search is extended."""
    name = _suited(genes) if config.name == "auto" else config.name
    stages = tuple(
        stage.model_copy(
            update={"population": stage.population or config.population or _usual_population(stage.name, dimension)}
        )
        if stage.name is not None
        else stage
        for stage in config.stages
    )
    population = config.population or _usual_population(name, dimension)
    _check_population(name, population, "optimizer")
    for index, stage in enumerate(stages):
        if stage.name is not None and stage.population is not None:
            _check_population(stage.name, stage.population, f"optimizer.stages[{index}]")
    covariance = config.covariance
    if covariance == "auto":
        covariance = "diagonal" if dimension >= 24 or config.evaluations <= 10 * dimension else "full"
    ranking = config.ranking
    if ranking == "auto":
        ranking = "elite" if objectives > 1 else "weighted_sum"
    lag = 0 if name == "greedy_soup" else config.lag  # each soup is built on the one before
    chosen = {"name": name, "population": population, "lag": lag, "covariance": covariance, "ranking": ranking}
    return config.model_copy(update={**chosen, "stages": stages})


def _suited(genes: Sequence[Gene]) -> OptimizerName:
    """The optimizer for genes of these kinds (measured by scripts/bench/data_flow)."""
    kinds, domains = {gene.kind for gene in genes}, {gene.domain for gene in genes}
    if HOP in kinds:
        return "path_evolution"
    return "cma_es" if GATE in kinds or domains <= {"continuous"} else "group_evolution"


def _check_population(name: str, population: int, where: str) -> None:
    if name in ("cma_es", "cat_cma") and population < 4:
        raise InputError(f"{where}.population is {population}; {name} needs at least 4.")


def _usual_population(name: str, dimension: int) -> int:
    covariances = max(8, 4 + int(3 * np.log(dimension)))
    usual = {"cma_es": covariances, "cat_cma": covariances, "group_evolution": 2, "path_evolution": 8, "greedy_soup": 1}
    return usual.get(name, 16)


def _cma_es(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.cma_es import CmaEs

    return CmaEs(config, problem)


def _group_evolution(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.group_evolution import GroupEvolution

    return GroupEvolution(config, problem)


def _cat_cma(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.cat_cma import CatCma
    from evomerge.optimizers.in_generations import InGenerations

    return InGenerations(CatCma(config, problem))


def _path_evolution(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.in_generations import InGenerations
    from evomerge.optimizers.path_evolution import PathEvolution

    return InGenerations(PathEvolution(config, problem))


def _greedy_soup(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.greedy_soup import GreedySoup

    return GreedySoup(config, problem)


def _random_search(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.random_search import RandomSearch

    return RandomSearch(config, problem)


Maker = Callable[[OptimizerConfig, Problem], Optimizer]
_MAKERS: dict[str, Maker] = {
    "cma_es": _cma_es,
    "cat_cma": _cat_cma,
    "path_evolution": _path_evolution,
    "group_evolution": _group_evolution,
    "greedy_soup": _greedy_soup,
    "random_search": _random_search,
}
