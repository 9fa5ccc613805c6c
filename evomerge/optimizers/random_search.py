"""Uniform random search: the control that every optimizer must beat (Bergstra and Bengio 2012)."""

import numpy as np

from evomerge.config.running import OptimizerConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.pareto import ScoreArray
from evomerge.randomness import counter_rng
from evomerge.spaces import Gene, Genome, at, canonical


def random_genome(genes: tuple[Gene, ...], seed: int, index: int) -> Genome:
    """A uniform random point of the box, shape (dimension,).

    genes: the genes that span the box.
    seed: of the random numbers.
    index: the number of the point, from 0; a point depends on its seed and number alone.
    """
    return canonical(genes, at(genes, counter_rng(seed, "random_search", index).random(len(genes))))


class RandomSearch:
    """Proposes independent random points, as the space draws them; told scores change nothing."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._population, self._problem, self._asked = config.population, problem, 0

    def ask(self) -> Genome:
        """The next generation (see `Optimizer`)."""
        first, self._asked = self._asked, self._asked + self._population
        return np.stack([self._draw(index) for index in range(first, self._asked)])

    def _draw(self, index: int) -> Genome:
        if self._problem.draw is None:
            return random_genome(self._problem.genes, self._problem.seed, index)
        return self._problem.draw(counter_rng(self._problem.seed, "random_search", index))

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Does nothing: random points do not depend on scores."""
        return
