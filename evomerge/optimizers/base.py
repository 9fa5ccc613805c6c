"""What every optimizer is and starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.ranking import Ranking
from evomerge.spaces import Gene, Genome


class Optimizer(Protocol):
    """Proposes genomes, and learns from their scores."""

    def ask(self) -> Genome:
        """The next generation, shape (population, dimension), canonical (see `spaces.canonical`); empty where nothing
        is left to try."""
        ...

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes the scores of genomes that were asked for.

        genomes: shape (n, dimension): a generation in its order, or with `optimizer.schedule: async` any genomes whose
            scores have not been told yet.
        scores: shape (n, objectives), larger is better, NaN for candidates that failed. A search with limits has more
            columns (see `Ranking`).
        """
        ...


@dataclass(frozen=True, slots=True)
class Problem:
    """What an optimizer starts from.

    genes: the entries of a genome.
    start: the genome to start at, shape (dimension,).
    seed: of all random numbers.
    ranking: how scores become ranks.
    known: genomes whose scores controls have given already, shape (n, dimension), with the scores, shape
        (n, objectives); None where there are none.
    draw: how the space draws a random genome; None for uniform draws.
    """

    genes: tuple[Gene, ...]
    start: Genome
    seed: int
    ranking: Ranking
    known: tuple[Genome, ScoreArray] | None = None
    draw: Callable[[np.random.Generator], Genome] | None = None
