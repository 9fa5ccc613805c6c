"""Sensitivity: how the parameters of a merge follow from genes, for genes by which a loss can be differentiated."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.merging.methods.slopes import Place, smooth_parameters
from evomerge.merging.plan import MergePlan, make_plan
from evomerge.spaces import Gene, Genome, SearchSpace, active
from evomerge.spaces.paths import SCALE

_STEP = 1e-4  # for a central difference; scales enter as products and quotients
_UNLIKE = (5**0.5 - 1) / 2  # so that no mark is a number that recipes hold anyway, such as a weight of 1


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The derivatives of the parameters of a merge by genes, at one genome.

    rates: for each parameter the genes that it follows, and the derivative by each of them.
    moves: the genes that some parameter follows, shape (dimension,).
    wanted: the names of the parameters that follow genes.
    bends: whether derivatives are others at another genome, since some genes are scales.
    """

    rates: Mapping[Place, Sequence[tuple[int, float]]]
    moves: NDArray[np.bool_]
    wanted: tuple[str, ...]
    bends: bool = False

    def by_gene(self, slopes: Mapping[Place, float]) -> NDArray[np.float64]:
        """The derivative of a loss by each gene, shape (dimension,).

        slopes: its derivative by each parameter of the merge.
        """
        total = np.zeros(len(self.moves))
        for place, slope in slopes.items():
            for index, rate in self.rates.get(place, ()):
                total[index] += rate * slope
        return total


def sensitivity(
    space: SearchSpace, genome: Genome, names: Sequence[str], allowed: NDArray[np.bool_] | None = None
) -> Sensitivity:
    """The sensitivity of a space at a genome.

    space: decodes genomes.
    genome: where, shape (dimension,). The choices of its categorical genes are kept.
    names: the names of the output's tensors.
    allowed: which genes are asked for, shape (dimension,); None for all.
    """
    counts = active(space.genes, genome) & np.array([gene.domain == "continuous" for gene in space.genes])
    asked = counts if allowed is None else counts & allowed
    rates: dict[Place, list[tuple[int, float]]] = {}
    for place, index, rate in (*_written(space, genome, names, asked), *_folded(space, genome, names, asked)):
        rates.setdefault(place, []).append((index, rate))
    moves = np.zeros(len(space.genes), dtype=np.bool_)
    moves[[index for rate in rates.values() for index, _ in rate]] = True
    bends = any(gene.kind == SCALE for gene, moves_it in zip(space.genes, moves, strict=True) if moves_it)
    return Sensitivity(rates, moves, tuple(dict.fromkeys(name for _, _, name in rates)), bends)


def _parameters(plan: MergePlan) -> dict[Place, float]:
    """The parameters of a plan by which its merge can be differentiated, with their values."""
    values: dict[Place, float] = {}
    for merge in plan.tensors:
        for name in smooth_parameters(plan.method, merge.shared, plan.method.slopes):
            if plan.method.shares(name):
                values[merge.name, None, name] = merge.shared[name]
            else:
                values |= {
                    (merge.name, model, name): own[name]
                    for model, own in zip(merge.models, merge.per_model, strict=True)
                }
    return values


def _written(
    space: SearchSpace, genome: Genome, names: Sequence[str], asked: NDArray[np.bool_]
) -> Iterator[tuple[Place, int, float]]:
    """Genes whose values recipes hold as they are. All get values of their own at once, by which the parameters that
    follow them are known again."""
    indices = [index for index, gene in enumerate(space.genes) if asked[index] and gene.kind != SCALE]
    marked = genome.copy()
    for place, index in enumerate(indices):
        gene = space.genes[index]
        marked[index] = gene.low + (gene.high - gene.low) * (place + _UNLIKE) / (len(indices) + 1)
    owners = {(_parameter(space.genes[index]), float(marked[index])): index for index in indices}
    for key, value in _parameters(make_plan(space.decode(marked), names)).items():
        index = owners.get((key[2], float(value)), -1)
        if index >= 0:
            yield key, index, 1.0


def _folded(
    space: SearchSpace, genome: Genome, names: Sequence[str], asked: NDArray[np.bool_]
) -> Iterator[tuple[Place, int, float]]:
    """Scales of layers, several of which may be multiplied: by central differences."""
    for index, gene in enumerate(space.genes):
        if not asked[index] or gene.kind != SCALE:
            continue
        ends = []
        for step in (_STEP, -_STEP):
            moved = genome.copy()
            moved[index] = min(max(genome[index] + step, gene.low), gene.high)
            ends.append((moved[index], _parameters(make_plan(space.decode(moved), names))))
        (high, above), (low, below) = ends
        for place in above.keys() & below.keys():
            rate = (above[place] - below[place]) / (high - low)
            if abs(rate) > 1e-9:
                yield place, index, rate


def _parameter(gene: Gene) -> str:
    """The name of the parameter that a gene decides: a method's own genes carry the method's name before it."""
    return gene.kind.rpartition(".")[2]
