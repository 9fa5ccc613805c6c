"""Learned genomes: Adam (Kingma and Ba 2015, algorithm 1) on the genes that a loss can be differentiated by.

Every step reads another mini-batch of search items. The step size falls linearly to a tenth. The genome that is
proposed at the end is the mean of the last steps (Polyak and Juditsky 1992), since single steps jump with their
mini-batches.
"""

import numpy as np
from numpy.typing import NDArray

from evomerge.config.running import LearningConfig
from evomerge.optimizers.adam import Adam, falling
from evomerge.spaces import Gene, Genome, box, canonical, model_of

_AVERAGED = 0.25  # of the steps, at the end
# The rate was chosen on zoos 101 and 102 (scripts/train_zoo --seed); the docs mark figures for `learned` on these. With
# more genes a step moves a merge farther. That the rate falls with their number follows one trial: .04 suited 272 a
# model.
_RATE, _GENES = 0.15, 60


class Learner:
    """A genome that follows gradients."""

    def __init__(
        self, config: LearningConfig, genes: tuple[Gene, ...], start: Genome, moves: NDArray[np.bool_]
    ) -> None:
        """config: the size and the number of steps.
        genes: the entries of a genome.
        start: where it starts, shape (dimension,).
        moves: which genes move, shape (dimension,).
        """
        self._config, self._genes, self._moves = config, genes, moves
        self._low, self._high = box(genes)
        self._adam = Adam((len(genes),))
        self._path: list[Genome] = []
        self.genome = canonical(genes, start)

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self._adam.step

    @property
    def rate(self) -> float:
        """How far a gene moves in the first steps."""
        if self._config.rate is not None:
            return self._config.rate
        moving = [gene for gene, moves in zip(self._genes, self._moves, strict=True) if moves]
        models = max(1, len({model_of(gene) for gene in moving if gene.kind == "weight"}))
        return _RATE * min(1.0, _GENES * models / max(1, len(moving)))

    def follow(self, gradient: NDArray[np.float64]) -> None:
        """Takes one step.

        gradient: the derivative of the loss by each gene, shape (dimension,).
        """
        rate = falling(self.rate, self.step + 1, self._config.steps)
        moved = self.genome - self._adam.move(np.where(self._moves, gradient, 0.0), rate)
        self.genome = np.where(self._moves, np.clip(moved, self._low, self._high), self.genome)
        self._path.append(self.genome)

    @property
    def averaged(self) -> Genome:
        """The mean genome of the last steps, shape (dimension,)."""
        count = max(1, round(_AVERAGED * len(self._path)))
        return canonical(self._genes, np.mean(self._path[-count:], axis=0)) if self._path else self.genome
