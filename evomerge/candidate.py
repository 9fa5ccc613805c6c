"""Candidate and Evaluation: what is tried, and what happened to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evomerge.config.base import Split as Split
from evomerge.outcomes import Outcomes
from evomerge.recipe import Recipe

Kind = Literal["control", "search"]
Study = Literal["search", "subset", "selection", "heldout"]  # scores on a split's items, or on some of the search's


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe with its place in the search. Controls that no genome describes have none."""

    id: str
    kind: Kind
    generation: int
    index: int
    recipe: Recipe
    genome: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Subset:
    """A share of the search items of every task, above 0 and below 1, drawn by number."""

    number: int
    share: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of one candidate on one split or a subset of it, or the reason why there are none.

    `scores` maps objective names to metric values in their own direction; `outcomes` maps them to what became of
    each item, in the order of the split's items (empty for metrics that are no mean over items). `truncated` counts
    prompts that lost their beginning because the model's context is shorter.
    """

    scores: Mapping[str, float] | None
    error: str | None = None
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    items: int = 0
    fingerprint: str | None = None
    seconds: float = 0.0
    truncated: int = 0
    subset: Subset | None = None

    @property
    def failed(self) -> bool:
        return self.scores is None


def failure(reason: str, fingerprint: str | None = None) -> Evaluation:
    """An evaluation that records why a candidate has no scores."""
    return Evaluation(scores=None, error=reason, fingerprint=fingerprint)
