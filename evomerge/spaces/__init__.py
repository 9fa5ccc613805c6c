"""SearchSpace: the genome's entries by name, bounds and kind, and how a genome decodes to a recipe.

To add a space: write its settings, a class with this protocol and what makes it of a config in a file of its own, add a
row to `SPACES` in the config, and run it through the contract in tests/contracts/space.py.
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
    """That a categorical gene stands at one of these of its choices."""

    gene: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gene:
    """One entry of the genome, in its own units. `kind` is what it says, `group` names the tensors that it governs.

    With `choices` it is categorical: a value is the index of a choice, from 0 to the last, in no order, and `step`
    means nothing. It counts only while every condition in `when` holds, each on a gene that comes before it.
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
        return "categorical" if self.choices else "integer" if self.integer else "continuous"


def categorical(
    name: str, kind: str, group: str, choices: Sequence[str], start: str, when: tuple[Condition, ...] = ()
) -> Gene:
    """A gene that chooses one of `choices`."""
    last = float(len(choices) - 1)
    return Gene(name, kind, group, 0.0, last, float(choices.index(start)), 1.0, tuple(choices), when=when)


def box(genes: Sequence[Gene]) -> tuple[Genome, Genome]:
    """Lower and upper bounds of genes, each of shape (dimension,)."""
    return np.array([gene.low for gene in genes]), np.array([gene.high for gene in genes])


def at(genes: Sequence[Gene], unit: Genome) -> Genome:
    """The point of the box at `unit` in [0, 1)^dimension; every choice and whole number has the same share of it."""
    low, high = box(genes)
    whole = np.minimum(np.floor(low + (high - low + 1) * unit), high)
    return np.where(_whole(genes), whole, low + (high - low) * unit)


def active(genes: Sequence[Gene], genomes: Genome) -> NDArray[np.bool_]:
    """Which genes count, in the genomes' shape (..., dimension). A condition on a gene that is not there holds."""
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
    """The one way to write what genomes of shape (..., dimension) mean: inside the box, whole numbers where only they
    have a meaning, and genes that do not count at their start."""
    inside = np.clip(genomes, *box(genes))
    inside = np.where(_whole(genes), np.rint(inside), inside)
    return np.where(active(genes, inside), inside, [gene.start for gene in genes])


def _whole(genes: Sequence[Gene]) -> NDArray[np.bool_]:
    return np.array([gene.domain != "continuous" for gene in genes], dtype=np.bool_)


class SearchSpace(Protocol):
    """What optimizers and the search need to know. `decode` is total on the box and reads what `canonical` writes."""

    genes: tuple[Gene, ...]

    def decode(self, genome: Sequence[float] | Genome) -> Recipe: ...

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome that gives every group of tensors these weights per model, everything else at its start."""
        ...

    def draw(self, random: np.random.Generator) -> Genome:
        """A random genome, as far as sense goes: what an optimizer has to beat."""
        ...
