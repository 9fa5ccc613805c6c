"""Scaling: the weights of many tensors as multiples of those at which a stage starts, one multiple for each group."""

import numpy as np
from numpy.typing import NDArray

from evomerge.spaces import Gene, Genome, canonical, model_of

_LOW, _HIGH, _STEP = 0.5, 1.5, 0.1


class Scaling:
    """Fewer genes that stand for many: factors of weights by model and group, and all other genes as they are.

    genes: the fewer genes.
    start: where they start, shape (len(genes),): all factors at 1.
    """

    def __init__(self, genes: tuple[Gene, ...], start: Genome) -> None:
        """genes: the many genes.
        start: where these start, shape (dimension,).
        """
        self._many, self._at = genes, start
        fewer: dict[str, Gene] = {}
        values: dict[str, float] = {}
        owners = []
        for gene, value in zip(genes, start.tolist(), strict=True):
            own = _factor(gene) if gene.kind == "weight" else gene
            fewer.setdefault(own.name, own)
            values.setdefault(own.name, 1.0 if gene.kind == "weight" else value)
            owners.append(own.name)
        place = {name: index for index, name in enumerate(fewer)}
        self._owners = np.array([place[name] for name in owners])
        self._factors: NDArray[np.bool_] = np.array([gene.kind == "weight" for gene in genes])
        self.genes = tuple(fewer.values())
        self.start: Genome = np.array([values[name] for name in fewer])

    def expanded(self, genomes: Genome) -> Genome:
        """What genomes of the fewer genes stand for.

        genomes: shape (n, len(genes)).
        """
        given = genomes[:, self._owners]
        return canonical(self._many, np.where(self._factors, self._at * given, given))


def _factor(gene: Gene) -> Gene:
    """The factor of the weights of a gene's model in its group."""
    model = model_of(gene)
    return Gene(f"factor:{model}:{gene.group}", "weight", gene.group, _LOW, _HIGH, 1.0, _STEP, when=gene.when)
