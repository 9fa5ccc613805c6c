"""SearchSpace: the genome's entries by name, bounds and kind, and how a genome decodes to a recipe.

To add a space: write a class with this protocol and run it through the contract in tests/contracts/space.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.recipe import Recipe

Genome = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Gene:
    """One entry of the genome, in its own units. `group` names the tensors that it governs."""

    name: str
    kind: str
    group: str
    low: float
    high: float
    start: float
    step: float


class SearchSpace(Protocol):
    """What optimizers and the search need to know. `decode` is total on the box."""

    genes: tuple[Gene, ...]

    def decode(self, genome: Sequence[float] | Genome) -> Recipe: ...

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome that gives every group of tensors these weights per model, everything else at its start."""
        ...
