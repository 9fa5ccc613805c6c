"""Candidate and Evaluation: what is tried, and what happened to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.config.base import Split as Split
from evomerge.outcomes import Outcomes
from evomerge.recipe import Recipe

Kind = Literal["control", "search"]
# Scores on a split's items; on some of the search's; on all of the search's, with quantized weights.
Study = Literal["search", "subset", "quantized", "selection", "heldout"]

Sources = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
"""By metric, the references of models, each with its weight."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe with its place in the search.

    id: unique in a search.
    kind: `control` or `search`.
    generation: the number of its generation.
    index: its number in the generation.
    recipe: how it is merged.
    genome: a number for each gene; None for a control that no genome describes.
    """

    id: str
    kind: Kind
    generation: int
    index: int
    recipe: Recipe
    genome: tuple[float, ...] | None = None


def learned_id(step: int) -> str:
    """The id of the candidate that is scored after a step along gradients."""
    return f"l{step:04d}"


def is_learned(candidate: Candidate) -> bool:
    """Whether a candidate lies on the path of gradients."""
    return candidate.kind == "search" and candidate.id.startswith("l")


@dataclass(frozen=True, slots=True)
class Subset:
    """A subset of the search items of every task.

    number: decides which items are drawn.
    share: the share of the items, above 0 and below 1.
    """

    number: int
    share: float


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the shards that the work of an evaluation is divided into.

    number: its number, from 0.
    count: how many shards there are.
    """

    number: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """What a worker says to one shard of an evaluation.

    shard: the shard.
    answers: what the model answered, in a form that only evaluators read.
    costs: what the candidate costs, by name. Those that depend on the items are the shard's share.
    own: what functions of the user's own said of it, in a form that only evaluators read; None in all shards but the
        first, since they see all items.
    fingerprint: that of the merged weights; None where the shard had nothing to score, so that there was no merge.
    seconds: how long it took.
    """

    shard: Shard
    answers: Any
    costs: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str | None = None
    seconds: float = 0.0
    own: Any = None


@dataclass(frozen=True, slots=True)
class Descent:
    """A request for the gradient of a candidate's loss on one shard of a mini-batch of search items.

    step: the number of the step, which also decides which items are drawn.
    share: the share of the search items in the mini-batch; 1 for all of them.
    shard: the number of the shard.
    shards: into how many shards the mini-batch is divided.
    weights: the metrics whose losses are summed up, by name, with the weight of each in the sum.
    wanted: the names of the parameters by which derivatives are taken; empty where only losses are asked for.
    sources: for each metric, the references of the models whose layers' outputs are averaged, with the weight of each;
        empty where the loss compares no layers.
    """

    step: int
    share: float
    shard: int
    shards: int
    weights: tuple[tuple[str, float], ...]
    wanted: tuple[str, ...]
    sources: Sources = ()

    @property
    def sources_by_name(self) -> dict[str, dict[str, float]]:
        """The weight of each source in what layers should put out, by metric and the source's reference."""
        return {name: dict(weights) for name, weights in self.sources}

    @property
    def subset(self) -> Subset | None:
        """The mini-batch as a subset of the search items; None for all of them."""
        return Subset(self.step, self.share) if self.share < 1 else None

    @property
    def weights_by_name(self) -> dict[str, float]:
        """The weight of each metric's loss in the sum, by name."""
        return dict(self.weights)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker says to a request for statistics.

    name: the name of the folder that holds them.
    seconds: how long it took.
    """

    name: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Gradient:
    """What a worker says to a `Descent`.

    losses: the shard's share of the mean loss of each metric, by name.
    slopes: the derivative of the weighted sum of losses by each parameter of the merge: by the name of the tensor, the
        reference of the model (None where models share the parameter), and the name of the parameter.
    fingerprint: that of the merged weights.
    seconds: how long it took.
    """

    losses: Mapping[str, float]
    slopes: Mapping[tuple[str, str | None, str], float]
    fingerprint: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of one candidate on one split or a subset of it, or the reason why there are none.

    scores: the values of metrics, each in its own direction, by objective; None where the candidate failed.
    error: why it failed; None where it did not.
    outcomes: what became of each item, in the order of the split's items, by objective. Metrics that are no mean over
        items have none.
    items: how many items were scored.
    fingerprint: that of the merged weights; None where there was no merge.
    seconds: how long the evaluation took.
    truncated: how many prompts lost their beginning because the model's context is shorter.
    subset: the subset that was scored; None for the whole split.
    quantize: how the weights were quantized before they were scored; None where they were not.
    """

    scores: Mapping[str, float] | None
    error: str | None = None
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    items: int = 0
    fingerprint: str | None = None
    seconds: float = 0.0
    truncated: int = 0
    subset: Subset | None = None
    quantize: str | None = None

    @property
    def failed(self) -> bool:
        """Whether there are no scores."""
        return self.scores is None


def failure(reason: str, fingerprint: str | None = None) -> Evaluation:
    """The evaluation of a candidate that has no scores.

    reason: why it has none.
    fingerprint: that of the merged weights, if there was a merge.
    """
    return Evaluation(scores=None, error=reason, fingerprint=fingerprint)
