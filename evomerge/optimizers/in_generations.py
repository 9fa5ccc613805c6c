"""For optimizers that learn from whole generations only: told candidates wait until their generation is complete."""

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.base import Optimizer
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.pending import Pending
from evomerge.spaces import Genome


class InGenerations:
    """Tells an optimizer its generations in the order of asking, in whatever order their candidates are told."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._pending: Pending[tuple[int, int]] = Pending()
        self._open: dict[int, tuple[Genome, list[NDArray[np.float64] | None]]] = {}
        self._asked = self._told = 0

    def ask(self) -> Genome:
        genomes = self._optimizer.ask()
        self._pending.add(genomes, [(self._asked, index) for index in range(len(genomes))])
        self._open[self._asked] = genomes, [None] * len(genomes)
        self._asked += 1
        return genomes

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
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
