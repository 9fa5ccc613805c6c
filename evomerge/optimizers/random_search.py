"""Uniform random search: the control that every optimizer must beat (Bergstra and Bengio 2012)."""

import numpy as np

from evomerge.config import OptimizerConfig
from evomerge.optimizers import Problem
from evomerge.pareto import Scores
from evomerge.randomness import counter_rng
from evomerge.spaces import Gene, Genome, at, canonical


def random_genome(genes: tuple[Gene, ...], seed: int, index: int) -> Genome:
    """The index-th uniform point of the box, shape (dimension,)."""
    return canonical(genes, at(genes, counter_rng(seed, "random_search", index).random(len(genes))))


class RandomSearch:
    """Independent uniform points; told scores change nothing."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._population, self._problem, self._asked = config.population, problem, 0

    def ask(self) -> Genome:
        first, self._asked = self._asked, self._asked + self._population
        return np.stack([random_genome(self._problem.genes, self._problem.seed, i) for i in range(first, self._asked)])

    def tell(self, genomes: Genome, scores: Scores) -> None:
        return
