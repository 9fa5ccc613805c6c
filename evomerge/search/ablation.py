"""Ablation: what each part of the winner brings, found by putting parts of it back.

The genes that differ between the winner and the uniform merge are taken in groups. Each group is put back alone, which
says what the winner loses without it. Then the groups are added to the uniform merge one after the other, the most
important first, which says how many of them matter together. Last, each model's weights are set to 0.

The recipes are recorded in an archive of their own beside the search's, so they change neither its results nor its
budget. The order of the groups follows scores on selection items, or on search items where there are none; held-out
items decide nothing, so that what they say of the winner's parts is no choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from evomerge.archive.archive import Archive
from evomerge.candidate import Candidate
from evomerge.config.base import Split
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.merging import methods
from evomerge.recipe import Recipe, Slice, Source
from evomerge.search.controls import UNIFORM, start_weights
from evomerge.search.loop import Search
from evomerge.search.results import Results
from evomerge.spaces import Gene, Genome, SearchSpace, canonical

ARCHIVE = "ablation"  # the name of the archive beside the search's
MOST_GROUPS = 12  # of more groups, neighbors are put together


@dataclass(frozen=True, slots=True)
class Group:
    """Genes that are put back together.

    name: what they govern: a group of tensors, or several that are neighbors.
    genes: their indices in the genome.
    """

    name: str
    genes: tuple[int, ...]


@dataclass(frozen=True)
class Ablation:
    """The recipes between the uniform merge and a winner.

    results: what the search has found.
    space: what genomes are decoded by.
    winner: the winner.
    start: the genome of the uniform merge; where nothing is merged, that of a model unchanged.
    groups: the groups of genes that differ between both.
    """

    results: Results
    space: SearchSpace
    winner: Candidate
    start: Genome
    groups: tuple[Group, ...]

    @property
    def config(self) -> SearchConfig:
        """The search's config."""
        return self.results.config

    @property
    def splits(self) -> tuple[Split, Split]:
        """The split whose scores decide the order of the groups, and the held-out split."""
        return ("selection" if "selection" in self.config.splits else "search"), "heldout"

    @property
    def from_uniform(self) -> bool:
        """Whether it starts at the uniform merge; else at a model unchanged, since the search merges no weights."""
        return self.config.space.merging is not None

    @cached_property
    def alone(self) -> tuple[Candidate, ...]:
        """The winner with each group put back alone, in the order of `groups`."""
        return tuple(
            self._candidate(f"alone-{number:02d}", number, self._mixed([group]))
            for number, group in enumerate(self.groups)
        )

    @cached_property
    def without(self) -> dict[str, Candidate]:
        """The winner with the weights of one model set to 0, by model; empty where models have no weights, or fewer
        than two take part."""
        recipe = self.winner.recipe
        method = methods.find(recipe.merge_method)
        taking = [name for name, reference in self.config.models.items() if _takes_part(recipe, reference)]
        if method is None or not method.takes("weight") or len(taking) < 2:
            return {}
        made = {}
        for number, name in enumerate(taking, start=2 * len(self.groups)):
            changed = _weightless(recipe, self.config.models[name])
            made[name] = Candidate(f"{self.winner.id}-without-{name}", "control", 0, number, changed)
        return made

    @property
    def first(self) -> list[Candidate]:
        """The candidates that are scored before the order of the groups is known."""
        return [*self.alone, *self.without.values()]

    def toward(self, order: Sequence[int]) -> list[Candidate]:
        """The uniform merge, and it with ever more groups as the winner has them, but for the winner itself.

        order: the numbers of the groups in the order in which they are added.
        """
        made = []
        for count in range(len(order)):
            rest = [self.groups[number] for number in order[count:]]
            candidate = self._candidate(f"toward-{count:02d}", len(order) + count, self._mixed(rest))
            same = [other for other in self.alone if other.genome == candidate.genome]
            made.append(same[0] if same else candidate)  # with one group left, it is the winner without this group
        return made

    def order(self, archive: Archive) -> list[int]:
        """The numbers of the groups, those first whose loss alone costs the winner most.

        archive: holds the scores of `alone`.
        """
        split = self.splits[0]
        records = [archive.find(candidate.id, split) for candidate in self.alone]
        criteria = self.results.criteria(split)
        means = [criteria.means([record.evaluation])[0] if record else -np.inf for record in records]
        return sorted(range(len(means)), key=lambda number: (means[number], number))

    def left(self, archive: Archive) -> int:
        """How many evaluations are not recorded yet.

        archive: the archive beside the search's.
        """
        missing = self._missing(archive, self.first)
        if missing:  # the order of the groups is not known, but how many recipes follow from it is
            return missing + (len(self.groups) - 1) * len(self.splits)
        return self._missing(archive, self.toward(self.order(archive)))

    def _missing(self, archive: Archive, candidates: Sequence[Candidate]) -> int:
        return sum(archive.find(one.id, split) is None for one in candidates for split in self.splits)

    def _mixed(self, groups: Sequence[Group]) -> Genome:
        """The winner with some groups put back."""
        genome = np.array(self.winner.genome, dtype=np.float64)
        for group in groups:
            genome[list(group.genes)] = self.start[list(group.genes)]
        return canonical(self.space.genes, genome)

    def _candidate(self, name: str, index: int, genome: Genome) -> Candidate:
        recipe = self.space.decode(genome)
        return Candidate(f"{self.winner.id}-{name}", "search", 0, index, recipe, tuple(genome.tolist()))


def plan(results: Results, space: SearchSpace) -> Ablation:
    """The ablation of a search's winner; nothing is scored.

    results: the search's.
    space: what genomes are decoded by.
    Raises InputError where the search has not ended, and where the winner has nothing that could be put back.
    """
    best = results.best()
    if best is None or not results.finished:
        raise InputError("--ablate needs a search that has ended and has a winner; resume the run first.")
    genome = best.candidate.genome
    if genome is None:
        raise InputError(f"--ablate: the best is {best.candidate.id}, which has no genes that could be put back.")
    weights = start_weights(results.config, UNIFORM) if results.config.space.merging is not None else {}
    start = canonical(space.genes, space.encode(weights))
    groups = grouped(space.genes, np.flatnonzero(start != np.array(genome)).tolist())
    if not groups:
        raise InputError(f"--ablate: {best.candidate.id} is what the search started from, so nothing can be put back.")
    return Ablation(results, space, best.candidate, start, groups)


def grouped(genes: Sequence[Gene], numbers: Sequence[int]) -> tuple[Group, ...]:
    """Genes by the tensors that they govern, in the order of the genome; of too many groups, neighbors are together.

    genes: of the space.
    numbers: the indices of the genes to be grouped.
    """
    members: dict[str, list[int]] = {}
    for number in numbers:
        members.setdefault(genes[number].group, []).append(number)
    names = list(members)
    count = min(len(names), MOST_GROUPS)
    cuts = [len(names) * part // count for part in range(count + 1)] if count else []
    made = []
    for first, end in pairwise(cuts):
        inside = names[first:end]
        name = inside[0] if len(inside) == 1 else f"{inside[0]} to {inside[-1]}"
        made.append(Group(name, tuple(number for member in inside for number in members[member])))
    return tuple(made)


def carry_out(ablation: Ablation, search: Search) -> None:
    """Scores every recipe of an ablation that is not recorded yet.

    ablation: what is scored.
    search: scores candidates, and records them in the archive beside the search's.
    """
    for split in ablation.splits:
        search.score(ablation.first, split)
    toward = ablation.toward(ablation.order(search.archive))
    for split in ablation.splits:
        search.score(toward, split)


def _sources(recipe: Recipe) -> list[Source]:
    return [*(recipe.models or ()), *(source for slice_ in recipe.slices or () for source in slice_.sources)]


def _takes_part(recipe: Recipe, reference: str) -> bool:
    return any(source.model == reference and source.parameters.get("weight") for source in _sources(recipe))


def _weightless(recipe: Recipe, reference: str) -> Recipe:
    """A recipe in which a model's weights are 0. The model stays, since its place decides masks."""

    def changed(source: Source) -> Source:
        if source.model != reference or "weight" not in source.parameters:
            return source
        return source.model_copy(update={"parameters": source.parameters | {"weight": 0.0}})

    def changed_slice(slice_: Slice) -> Slice:
        return slice_.model_copy(update={"sources": tuple(map(changed, slice_.sources))})

    return recipe.model_copy(
        update={
            "models": tuple(map(changed, recipe.models)) if recipe.models else None,
            "slices": tuple(map(changed_slice, recipe.slices)) if recipe.slices else None,
        }
    )
