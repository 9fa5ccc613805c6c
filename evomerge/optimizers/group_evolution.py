"""Group-wise (1+lambda) evolution: each child changes the genes of one group of tensors of the best candidate so far.

With probability 0.3 the group's genes are drawn anew from the box. Otherwise they move by a Gaussian of their steps,
and about one of the categorical genes is chosen anew. A child that is not worse replaces its parent (a (1+1)-ES by
blocks, after Rechenberg 1973). This is strong at budgets below a few hundred evaluations, where a covariance cannot be
learned. Candidates are compared by their weighted mean, whatever the ranking.
"""

import numpy as np
from numpy.typing import NDArray

from evomerge.config.running import OptimizerConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.ranking import Incumbent
from evomerge.randomness import counter_rng
from evomerge.spaces import Gene, Genome, active, at, canonical

_RESAMPLE = 0.3
_DRAWS = 20


class GroupEvolution:
    """Elitist local search over groups of genes."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._population, self._problem = config.population, problem
        self._members = [
            np.array([gene.group == group for gene in problem.genes])
            for group in dict.fromkeys(gene.group for gene in problem.genes)
        ]
        self._parent = Incumbent(problem.start)
        self._generation = 0

    def ask(self) -> Genome:
        """The next generation (see `Optimizer`). The very first candidate is the start, so that children have something
        to beat."""
        children = [self._child(index) for index in range(self._population)]
        if self._generation == 0:
            children[0] = self._parent.genome
        self._generation += 1
        return np.stack(children)

    def _child(self, index: int) -> Genome:
        """A child that differs from its parent, if a few draws find one: a step across a bound may change nothing."""
        random = counter_rng(self._problem.seed, "group_evolution", self._generation, index)
        drawn = (self._draw(random) for _ in range(_DRAWS))
        return next((child for child in drawn if not np.array_equal(child, self._parent.genome)), self._parent.genome)

    def _draw(self, random: np.random.Generator) -> Genome:
        group = self._members[random.integers(len(self._members))]
        return change_group(self._problem.genes, group, self._parent.genome, random)

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes scores in any order (see `Optimizer`)."""
        self._parent.offer(genomes, self._problem.ranking.means(scores))


def change_group(
    genes: tuple[Gene, ...], group: NDArray[np.bool_], parent: Genome, random: np.random.Generator
) -> Genome:
    """A child: the parent with the genes of a group drawn anew, or moved by their steps.

    genes: the entries of a genome.
    group: a mask of the genes that change, shape (dimension,).
    parent: the genome to change, shape (dimension,).
    random: where the numbers come from.
    """
    if random.random() < _RESAMPLE:
        drawn = at(genes, random.random(len(genes)))
    else:
        categorical = np.array([gene.domain == "categorical" for gene in genes])
        drawn = parent + np.array([gene.step for gene in genes]) * random.standard_normal(len(genes))
        drawn = np.where(categorical, _chosen_anew(genes, group & categorical, parent, random), drawn)
    child = canonical(genes, np.where(group, drawn, parent))
    awake = active(genes, child) & ~active(genes, parent)  # genes that a new choice makes count: drawn, too
    return canonical(genes, np.where(awake, drawn, child))


def _chosen_anew(
    genes: tuple[Gene, ...], chosen: NDArray[np.bool_], parent: Genome, random: np.random.Generator
) -> Genome:
    """The parent with some of the categorical genes in `chosen` chosen anew, on average one of them."""
    count = int(chosen.sum())
    if count == 0:
        return parent
    anew = random.random(len(chosen)) < 1 / count
    return np.where(anew, at(genes, random.random(len(chosen))), parent)
