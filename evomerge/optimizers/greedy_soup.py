"""Greedy soup (Wortsman et al. 2022, Model soups, arXiv:2203.05482, recipe 1).

Models join one after the other, in the order of their own scores, the best first. A model stays where the mean score
does not fall. Every gene of the space must say whether a model takes part; without weights, the merge is the uniform
average.
"""

from collections import deque
from collections.abc import Set

import numpy as np

from evomerge.config.running import OptimizerConfig
from evomerge.errors import InputError
from evomerge.optimizers.base import Problem
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.ranking import Incumbent
from evomerge.spaces import TAKE, Genome, canonical


def check(kinds: Set[str]) -> None:
    """Raises InputError where a space has other genes than those that say which models take part.

    kinds: the kinds of genes in the space.
    """
    if kinds != {TAKE}:
        others = sorted(kinds - {TAKE})
        raise InputError(
            "optimizer.name is greedy_soup, which chooses models and nothing else, so space.participate must be true"
            + (f" and {', '.join(others)} fixed" if others else "")
            + "; change the space, or use another optimizer."
        )


class GreedySoup:
    """Proposes one candidate a generation, each built on the best one so far, until every model has been tried."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        self._problem = problem
        takes = np.array([gene.kind == TAKE for gene in problem.genes])
        nobody = np.where(takes, 0.0, problem.start)
        self._soup = Incumbent(nobody)
        alone = {index: self._with(nobody, index) for index in np.flatnonzero(takes).tolist()}
        self._queue = deque(sorted(alone, key=lambda index: -self._known_mean(alone[index])))

    def _with(self, soup: Genome, index: int) -> Genome:
        genome = soup.copy()
        genome[index] = 1.0
        return canonical(self._problem.genes, genome)

    def _known_mean(self, genome: Genome) -> float:
        """The mean score of a genome that controls have scored; -inf where they have not."""
        if self._problem.known is None:
            return -np.inf
        known, scores = self._problem.known
        same = (known == genome).all(axis=1)
        return float(self._problem.ranking.means(scores)[same].max(initial=-np.inf))

    def ask(self) -> Genome:
        """The next candidate, shape (1, dimension); empty where every model has been tried."""
        if not self._queue:
            return np.empty((0, len(self._problem.genes)))
        return self._with(self._soup.genome, self._queue.popleft())[np.newaxis]

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes the score of the last candidate (see `Optimizer`)."""
        self._soup.offer(genomes, self._problem.ranking.means(scores))
