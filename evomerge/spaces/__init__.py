"""SearchSpace: the genome's entries by name, bounds and kind, and how a genome decodes to a recipe.

To add a space: in a file of its own, write its settings, a class with the protocol `SearchSpace`, and a function that
makes it from a config. Then add a row to `SPACES` in the config, and run it through the contract in
tests/contracts/space.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.recipe import Recipe

Genome = NDArray[np.float64]
TAKE = "take"  # the kind of gene that says whether a model takes part, a choice between out (0) and in (1)


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition that a categorical gene has one of certain choices.

    gene: the gene's name.
    choices: the choices with which the condition holds.
    """

    gene: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gene:
    """One entry of the genome, in its own units.

    name: unique in a space.
    kind: what the gene decides, such as `weight`.
    group: the tensors that it governs.
    low: its least value.
    high: its largest value.
    start: where a search starts.
    step: the first step of a search; it means nothing for a categorical gene.
    choices: the choices of a categorical gene, in no order; its value is the index of a choice. Empty for other genes.
    integer: whether its values are whole numbers.
    when: the gene counts only while all these conditions hold. Their genes come before it.
    """

    name: str
    kind: str
    group: str
    low: float
    high: float
    start: float
    step: float
    choices: tuple[str, ...] = ()
    integer: bool = False
    when: tuple[Condition, ...] = ()

    @property
    def domain(self) -> Literal["continuous", "integer", "categorical"]:
        """What values the gene can have."""
        return "categorical" if self.choices else "integer" if self.integer else "continuous"


def model_of(gene: Gene) -> str:
    """The name of the model that a gene of a weight or a density belongs to, the second part of its name."""
    return gene.name.split(":")[1]


def categorical(
    name: str, kind: str, group: str, choices: Sequence[str], start: str, when: tuple[Condition, ...] = ()
) -> Gene:
    """A categorical gene.

    name: unique in a space.
    kind: what the gene decides.
    group: the tensors that it governs.
    choices: what it chooses from.
    start: the choice where a search starts.
    when: the conditions under which the gene counts.
    """
    last = float(len(choices) - 1)
    return Gene(name, kind, group, 0.0, last, float(choices.index(start)), 1.0, tuple(choices), when=when)


def box(genes: Sequence[Gene]) -> tuple[Genome, Genome]:
    """The lower and the upper bounds of genes, each of shape (dimension,)."""
    return np.array([gene.low for gene in genes]), np.array([gene.high for gene in genes])


def at(genes: Sequence[Gene], unit: Genome) -> Genome:
    """The point of the box that a point of the unit cube stands for, shape (dimension,).

    genes: the genes that span the box.
    unit: a point in [0, 1)^dimension. Every choice and every whole number has an equal share of the unit interval.
    """
    low, high = box(genes)
    whole = np.minimum(np.floor(low + (high - low + 1) * unit), high)
    return np.where(_whole(genes), whole, low + (high - low) * unit)


def active(genes: Sequence[Gene], genomes: Genome) -> NDArray[np.bool_]:
    """Which genes count, in the shape of the genomes. A condition on a gene that is not among the genes holds.

    genes: the genes of the genomes.
    genomes: shape (..., dimension).
    """
    position = {gene.name: index for index, gene in enumerate(genes)}
    counts = np.ones(genomes.shape, dtype=np.bool_)
    for index, gene in enumerate(genes):
        for condition in gene.when:
            other = position.get(condition.gene)
            if other is not None:
                wanted = [genes[other].choices.index(choice) for choice in condition.choices]
                counts[..., index] &= counts[..., other] & np.isin(genomes[..., other], wanted)
    return counts


def canonical(genes: Sequence[Gene], genomes: Genome) -> Genome:
    """The canonical form of genomes, the same for genomes of one meaning. Values are clipped to the box and rounded for
    integer and categorical genes, and genes that do not count have their start.

    genes: the genes of the genomes.
    genomes: shape (..., dimension).
    """
    inside = np.clip(genomes, *box(genes))
    inside = np.where(_whole(genes), np.rint(inside), inside)
    return np.where(active(genes, inside), inside, [gene.start for gene in genes])


def _whole(genes: Sequence[Gene]) -> NDArray[np.bool_]:
    return np.array([gene.domain != "continuous" for gene in genes], dtype=np.bool_)


class SearchSpace(Protocol):
    """What optimizers and the search need to know of a space.

    genes: the entries of a genome, in order.
    """

    genes: tuple[Gene, ...]

    def decode(self, genome: Sequence[float] | Genome) -> Recipe:
        """The recipe of a genome of shape (dimension,). Every point of the box has one, and it is that of the canonical
        form."""
        ...

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome that gives every group of tensors the same weights; all else is at its start.

        weights: the weight of each model, by name.
        """
        ...

    def draw(self, random: np.random.Generator) -> Genome:
        """A random genome that makes sense in this space: the control that an optimizer has to beat."""
        ...
