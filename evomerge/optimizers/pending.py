"""Pending: what an optimizer keeps of each genome that it has handed out, until its scores come."""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from evomerge.spaces import Genome

Kept = TypeVar("Kept")


class Pending(Generic[Kept]):
    """Genomes asked for and not told yet. They may be told in any order; of equal ones the first asked for is meant."""

    def __init__(self) -> None:
        self._kept: defaultdict[bytes, deque[Kept]] = defaultdict(deque)

    def add(self, genomes: Genome, kept: Sequence[Kept]) -> None:
        """genomes: shape (n, dimension), with what is kept of each."""
        for genome, each in zip(genomes, kept, strict=True):
            self._kept[genome.tobytes()].append(each)

    def take(self, genomes: Genome) -> list[Kept]:
        """What was kept of each of these genomes, which are pending no longer."""
        taken = []
        for genome in genomes:
            key = genome.tobytes()
            taken.append(self._kept[key].popleft())
            if not self._kept[key]:
                del self._kept[key]
        return taken
