"""Pending: what an optimizer keeps for each genome that it has proposed, until the scores come."""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from evomerge.spaces import Genome

Kept = TypeVar("Kept")


class Pending(Generic[Kept]):
    """Genomes that have been proposed and not told yet. They may be told in any order; where equal genomes were
    proposed, the first of them counts."""

    def __init__(self) -> None:
        self._kept: defaultdict[bytes, deque[Kept]] = defaultdict(deque)

    def add(self, genomes: Genome, kept: Sequence[Kept]) -> None:
        """Adds genomes that have been proposed.

        genomes: shape (n, dimension).
        kept: what is kept for each genome.
        """
        for genome, value in zip(genomes, kept, strict=True):
            self._kept[genome.tobytes()].append(value)

    def take(self, genomes: Genome) -> list[Kept]:
        """What was kept for each genome, in order. The genomes are no longer pending."""
        taken = []
        for genome in genomes:
            key = genome.tobytes()
            taken.append(self._kept[key].popleft())
            if not self._kept[key]:
                del self._kept[key]
        return taken
