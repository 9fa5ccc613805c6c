"""Relaxation: categorical and whole-number genes for optimizers that handle real numbers only.

A gene with more than two choices has one coordinate for each choice, and the largest coordinate decides; so the choices
get no order. A whole number, or a choice between two, is one coordinate, which is rounded.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.spaces import Gene, Genome, canonical

_STEP = 0.3  # of a coordinate from 0 to 1: at first about one draw in three makes another choice
_CHOSEN, _OTHERS = 0.65, 0.35
Points = NDArray[np.float64]


class Relaxation:
    """Real coordinates for genes.

    low: the lower bounds, shape (coordinates,).
    high: the upper bounds, shape (coordinates,).
    scale: the first steps, shape (coordinates,).
    """

    def __init__(self, genes: Sequence[Gene]) -> None:
        self._genes = tuple(genes)
        self._widths = [len(gene.choices) if len(gene.choices) > 2 else 1 for gene in genes]
        wide = [(gene, width > 1) for gene, width in zip(genes, self._widths, strict=True) for _ in range(width)]
        self.low = np.array([0.0 if several else gene.low for gene, several in wide])
        self.high = np.array([1.0 if several else gene.high for gene, several in wide])
        self.scale = np.array([_STEP if gene.choices else gene.step for gene, _ in wide])

    def points(self, genome: Genome) -> Points:
        """The coordinates of a genome, shape (coordinates,)."""
        coordinates = [
            np.where(np.arange(width) == value, _CHOSEN, _OTHERS) if width > 1 else np.array([value])
            for value, width in zip(genome, self._widths, strict=True)
        ]
        return np.concatenate(coordinates)

    def genomes(self, points: Points) -> Genome:
        """The canonical genomes, shape (n, dimension), of coordinates of shape (n, coordinates)."""
        by_gene = np.split(points, np.cumsum(self._widths)[:-1], axis=1)
        columns = [own.argmax(axis=1) if own.shape[1] > 1 else own[:, 0] for own in by_gene]
        return canonical(self._genes, np.stack(columns, axis=1).astype(np.float64))
