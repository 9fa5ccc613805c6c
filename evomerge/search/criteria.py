"""Criteria: what makes one candidate better than another. They are objectives, and limits that a winner must keep to.

A mean over objectives needs a common scale. Accuracies and other scores between 0 and 1 are averaged as they are. Where
any other objective has a weight (a perplexity, a BLEU, a cost), gains are averaged: the gain on an objective is its
distance above the base, in units of the range of base, parents and uniform merge on search items.

A candidate that breaks a limit is infeasible. It ranks below every feasible candidate, and among the infeasible the
smaller violation ranks higher (Deb 2000, doi:10.1016/S0045-7825(99)00389-8). It is never on the front, never the best
and never exported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.archive.archive import Archive, steering
from evomerge.candidate import Evaluation, Study
from evomerge.config.scoring import ConstraintConfig, ObjectiveConfig
from evomerge.config.search import SearchConfig
from evomerge.errors import WorkFailed
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.ranking import weighted_means
from evomerge.search.controls import BASE, PARENT, UNIFORM

_ROUNDING = 1e-9
_OTHER_SCALES = {  # metrics whose scores may lie between 0 and 1 by chance
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "bleu",
    "chrf",
    "ter",
}
_ON_SEARCH_ITEMS: tuple[Study, ...] = ("search", "quantized")
_NEARLY_NOTHING = 1e-3  # of the largest score of a control: a smaller range says nothing about an objective's scale


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound that a score must reach: a share of a parent's score, or the maximum of a cost.

    name: the metric's or cost's.
    sign: 1 where a larger score is better, -1 where a smaller is.
    bound: what `sign` times the score must reach. NaN while the parent has no score, and then every candidate breaks
        the limit.
    source: where the bound comes from, in a phrase.
    """

    name: str
    sign: float
    bound: float
    source: str

    def violation(self, evaluation: Evaluation) -> float:
        """By how much an evaluation misses the bound, as a share of the bound; 0 where it reaches it, NaN for a
        failure."""
        if evaluation.scores is None:
            return np.nan
        missing = (self.bound - self.sign * evaluation.scores[self.name]) / (abs(self.bound) or 1.0)
        return np.inf if np.isnan(missing) else float(missing) if missing > _ROUNDING else 0.0

    def __str__(self) -> str:
        side = "at least" if self.sign > 0 else "at most"
        return f"{self.name} {side} {round(self.sign * self.bound, 3):.12g} ({self.source})"


@dataclass(frozen=True, slots=True)
class Scale:
    """How the scores of an objective, turned so that larger is better, become gains.

    zero: the score at which the gain is 0.
    unit: by how much the score is higher where the gain is 1.
    """

    zero: float
    unit: float


@dataclass(frozen=True, slots=True)
class Criteria:
    """The objectives and limits of a search on one split's items.

    objectives: the search's.
    limits: those on the split.
    scales: how scores become gains, by objective; empty where all scores can be averaged as they are.
    """

    objectives: tuple[ObjectiveConfig, ...]
    limits: tuple[Limit, ...] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @property
    def mean_name(self) -> str:
        """What the mean is called in tables and sentences."""
        return "mean gain" if self.scales else "mean"

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weights of the objectives, shape (objectives,)."""
        return np.array([objective.weight for objective in self.objectives])

    def violations(self, evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
        """By how much each evaluation breaks each limit, shape (n, limits); NaN for failures."""
        rows = [[limit.violation(evaluation) for limit in self.limits] for evaluation in evaluations]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.limits))

    def told(self, evaluations: Sequence[Evaluation]) -> ScoreArray:
        """What optimizers are told: scores or gains, and violations, shape (n, objectives + limits)."""
        return np.hstack([self._comparable(evaluations), self.violations(evaluations)])

    def eligible(self, evaluations: Sequence[Evaluation]) -> ScoreArray:
        """The scores or gains of evaluations that may win, shape (n, objectives); NaN for failures and infeasible
        candidates."""
        scores = self._comparable(evaluations)
        scores[(self.violations(evaluations) > 0).any(axis=1)] = np.nan
        return scores

    def feasible(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation succeeded and breaks no limit."""
        return not evaluation.failed and not self.violations([evaluation]).any()

    def means(self, evaluations: Sequence[Evaluation]) -> list[float]:
        """The weighted mean of each evaluation's scores or gains, feasible or not; -inf for failures."""
        return [float(mean) for mean in weighted_means(self._comparable(evaluations), self.weights)]

    def _comparable(self, evaluations: Sequence[Evaluation]) -> ScoreArray:
        """Scores or gains that can be averaged; larger is better; shape (n, objectives)."""
        scores = score_matrix(evaluations, self.objectives)
        for index, objective in enumerate(self.objectives):
            scale = self.scales.get(objective.name)
            if scale is not None:
                scores[:, index] = (scores[:, index] - scale.zero) / scale.unit
        return scores


def score_matrix(evaluations: Sequence[Evaluation], objectives: Sequence[ObjectiveConfig]) -> ScoreArray:
    """Scores turned so that larger is better, shape (n, objectives); NaN for failures.

    evaluations: the rows.
    objectives: the columns.
    """
    rows = [
        [np.nan] * len(objectives)
        if evaluation.scores is None
        else [sign_of(objective) * evaluation.scores[objective.name] for objective in objectives]
        for evaluation in evaluations
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(objectives))


def sign_of(metric: ObjectiveConfig | ConstraintConfig) -> float:
    """1 where a larger score is better, -1 where a smaller is."""
    return -1.0 if metric.goal == "minimize" else 1.0


def criteria_of(archive: Archive, config: SearchConfig, study: Study = "search") -> Criteria:
    """A search's criteria for the scores of a study, by those that base and parents have there.

    Costs are limited only on search items, since the time of an evaluation depends on how many items there are.

    archive: the search's.
    config: the search's.
    study: the study.
    """
    names = [BASE, *(f"{PARENT}-{name}" for name in config.models)]
    records = {name: archive.find(name, study) for name in names}
    parents = {name: record.evaluation for name, record in records.items() if record is not None}
    limits = [_limit(constraint, config, parents) for constraint in config.constraints]
    if study in _ON_SEARCH_ITEMS:
        limits += [Limit(cost.name, -1.0, -cost.max, "max") for cost in config.objectives if cost.max is not None]
    return Criteria(config.objectives, tuple(limits), _scales(archive, config, study))


def _scales(archive: Archive, config: SearchConfig, study: Study) -> dict[str, Scale]:
    """How scores of a study become gains, by objective. The gain of the base in that study is 0; the unit is the same
    on all splits.

    Empty where all objectives with a weight lie between 0 and 1, and while no control has been scored.
    """
    names = [BASE, *(f"{PARENT}-{name}" for name in config.models), UNIFORM]
    searched = [archive.find(name, study if study in _ON_SEARCH_ITEMS else "search") for name in names]
    control_scores = [
        record.evaluation.scores for record in searched if record is not None and record.evaluation.scores
    ]
    weighted = [objective for objective in config.objectives if objective.weight]
    if not control_scores or all(_between_0_and_1(objective, control_scores) for objective in weighted):
        return {}
    base = archive.find(BASE, study)
    start = base.evaluation.scores if base is not None and base.evaluation.scores else control_scores[0]
    return {objective.name: _scale(objective, control_scores, start) for objective in weighted}


def _between_0_and_1(objective: ObjectiveConfig, control_scores: Sequence[Mapping[str, float]]) -> bool:
    if objective.cost is not None or objective.metric in _OTHER_SCALES:
        return False
    return all(0 <= scores[objective.name] <= 1 for scores in control_scores)


def _scale(
    objective: ObjectiveConfig, control_scores: Sequence[Mapping[str, float]], base: Mapping[str, float]
) -> Scale:
    """How an objective's scores become gains.

    control_scores: the controls' scores on search items, the base's first. Where the controls score nearly the same,
        the unit is the size of the base's score.
    base: the base's scores on the split.
    """
    scores = [control[objective.name] for control in control_scores]
    spread, size = max(scores) - min(scores), max(map(abs, scores))
    unit = spread if spread > _NEARLY_NOTHING * size else abs(scores[0]) or 1.0
    return Scale(sign_of(objective) * base[objective.name], unit)


def mean_of_scores(scores: Mapping[str, float] | None, objectives: Sequence[ObjectiveConfig]) -> float | None:
    """The weighted mean of one model's scores without any controls; None where the scores have unlike scales.

    scores: by objective; None for a failure.
    objectives: the search's.
    """
    weighted = [objective for objective in objectives if objective.weight]
    if scores is None or not all(_between_0_and_1(objective, [scores]) for objective in weighted):
        return None
    return Criteria(tuple(objectives)).means([Evaluation(scores=scores)])[0]


def _limit(constraint: ConstraintConfig, config: SearchConfig, parents: Mapping[str, Evaluation]) -> Limit:
    """The limit that a constraint sets.

    parents: the evaluations of base and parents, by id, as far as there are any.
    """
    sign = sign_of(constraint)
    names = references(constraint, config)
    values = {
        name: sign * evaluation.scores[constraint.name]
        for name in names
        if (evaluation := parents.get(name)) is not None and evaluation.scores is not None
    }
    if not values or any(name not in parents for name in names):
        return Limit(constraint.name, sign, np.nan, f"of {names[0]}'s")
    best = max(values, key=lambda name: values[name])
    bound = values[best] - (1 - constraint.retain) * abs(values[best])
    return Limit(constraint.name, sign, bound, f"of {best}'s {sign * values[best]:.3f}")


def references(constraint: ConstraintConfig, config: SearchConfig) -> list[str]:
    """The ids of the controls that a constraint compares with."""
    if constraint.of is None and config.models:
        return [f"{PARENT}-{name}" for name in config.models]
    return [BASE if constraint.of in (None, "base") else f"{PARENT}-{constraint.of}"]


def check_limits(archive: Archive, config: SearchConfig, criteria: Criteria) -> None:
    """Checks that every constraint has a parent to compare with.

    archive: the search's.
    config: the search's.
    criteria: those of the scores that the search goes by.
    Raises WorkFailed where a constraint has none, since the parent could not be scored.
    """
    for index, constraint in enumerate(config.constraints):
        limit = criteria.limits[index]
        name = references(constraint, config)[0]
        record = archive.find(name, steering(config))
        if np.isnan(limit.bound) and record is not None:
            raise WorkFailed(
                f"constraints[{index}] keeps a share of what {name} scores on {limit.name}, but {name} could not be "
                f"evaluated ({record.evaluation.error}); mend it, or compare with another."
            )
