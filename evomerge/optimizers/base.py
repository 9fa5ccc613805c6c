"""What every optimizer is and starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.ranking import Ranking
from evomerge.spaces import Gene, Genome


class Optimizer(Protocol):
    def ask(self) -> Genome:
        """The next generation, shape (population, dimension), canonical (see `spaces.canonical`); an empty one where
        there is nothing left to try."""
        ...

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
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
    known: tuple[Genome, ScoreArray] | None = None
    draw: Callable[[np.random.Generator], Genome] | None = None
