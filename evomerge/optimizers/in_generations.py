"""A wrapper for optimizers that learn from whole generations only: scores wait until their generation is complete."""

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.base import Optimizer
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.pending import Pending
from evomerge.spaces import Genome


class InGenerations:
    """Tells an optimizer whole generations, in the order in which it proposed them. Their candidates may be told in any
    order."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._pending: Pending[tuple[int, int]] = Pending()
        self._open: dict[int, tuple[Genome, list[NDArray[np.float64] | None]]] = {}
        self._asked = self._told = 0

    def ask(self) -> Genome:
        """The optimizer's next generation (see `Optimizer`)."""
        genomes = self._optimizer.ask()
        self._pending.add(genomes, [(self._asked, index) for index in range(len(genomes))])
        self._open[self._asked] = genomes, [None] * len(genomes)
        self._asked += 1
        return genomes

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes scores in any order, and passes on the generations that are complete."""
        for (generation, index), row in zip(self._pending.take(genomes), scores, strict=True):
            self._open[generation][1][index] = row
        while self._told < self._asked:
            asked, told = self._open[self._told]
            rows = [row for row in told if row is not None]
            if len(rows) < len(asked):
                return
            if rows:
                self._optimizer.tell(asked, np.stack(rows))
            del self._open[self._told]
            self._told += 1
