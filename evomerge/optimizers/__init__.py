"""Optimizers: ask for a generation of genomes, tell what they scored.

All of them work on told scores alone and draw every random number from a counter, so that telling the same things again
gives the same proposals: that replay is how a search resumes.

To add one: write a class with this protocol, add a row to `_MAKERS`, and run it through tests/contracts/optimizer.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evomerge.config import OptimizerConfig
from evomerge.optimizers.ranking import Ranking
from evomerge.pareto import Scores
from evomerge.spaces import Gene, Genome
from evomerge.spaces import box as box


class Optimizer(Protocol):
    def ask(self) -> Genome:
        """The next generation, shape (population, dimension), canonical (see `spaces.canonical`); an empty one where
        there is nothing left to try."""
        ...

    def tell(self, genomes: Genome, scores: Scores) -> None:
        """The scores of a generation that was asked for, in order; shape (population, objectives), larger is better,
        NaN for candidates that failed. Generations may be told while later ones are being evaluated."""
        ...


@dataclass(frozen=True, slots=True)
class Problem:
    """What an optimizer starts from: genes, the start in their units, the seed, how scores are ranked, and the genomes
    whose scores are known from controls that they stand for, shapes (n, dimension) and (n, objectives)."""

    genes: tuple[Gene, ...]
    start: Genome
    seed: int
    ranking: Ranking
    known: tuple[Genome, Scores] | None = None


def make_optimizer(config: OptimizerConfig, problem: Problem) -> Optimizer:
    """The configured optimizer, in stages where there are any. The config must be resolved (`resolve`)."""
    from evomerge.optimizers.stages import StagedOptimizer

    maker = _MAKERS[config.name]
    if not config.stages:
        return maker(config, problem)
    return StagedOptimizer(config, problem, maker)


def resolve(config: OptimizerConfig, dimension: int, objectives: int) -> OptimizerConfig:
    """The config with its automatic choices made: they must not change when a finished search is extended."""
    population = config.population
    if population is None:
        usual = {"cma_es": max(8, 4 + int(3 * np.log(dimension))), "group_evolution": 2, "greedy_soup": 1}
        population = usual.get(config.name, 16)
    covariance = config.covariance
    if covariance == "auto":
        covariance = "diagonal" if dimension >= 24 or config.evaluations <= 10 * dimension else "full"
    ranking = config.ranking
    if ranking == "auto":
        ranking = "elite" if objectives > 1 else "weighted_sum"
    lag = 0 if config.name == "greedy_soup" else config.lag  # each soup is built on the one before
    return config.model_copy(
        update={"population": population, "lag": lag, "covariance": covariance, "ranking": ranking}
    )


def _cma_es(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.cma_es import CmaEs

    return CmaEs(config, problem)


def _group_evolution(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.group_evolution import GroupEvolution

    return GroupEvolution(config, problem)


def _greedy_soup(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.greedy_soup import GreedySoup

    return GreedySoup(config, problem)


def _random_search(config: OptimizerConfig, problem: Problem) -> Optimizer:
    from evomerge.optimizers.random_search import RandomSearch

    return RandomSearch(config, problem)


Maker = Callable[[OptimizerConfig, Problem], Optimizer]
_MAKERS: dict[str, Maker] = {
    "cma_es": _cma_es,
    "group_evolution": _group_evolution,
    "greedy_soup": _greedy_soup,
    "random_search": _random_search,
}
