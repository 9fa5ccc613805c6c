"""Evidence: how a candidate compares with the best parent and the best control on held-out items, and what it keeps of
each parent. The functions turn an archive into plain values for JSON and tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.archive.archive import Record
from evomerge.candidate import Study
from evomerge.config.scoring import ObjectiveConfig
from evomerge.config.search import SearchConfig
from evomerge.evidence.statistics import Floats, holm, interval, mcnemar, sign_flip, weighted_difference
from evomerge.randomness import counter_rng
from evomerge.search.best import best_of
from evomerge.search.controls import BASE, PARENT, family
from evomerge.search.criteria import Criteria, sign_of
from evomerge.search.results import Results

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """Two candidates on the items of one objective.

    difference: of the mean scores; positive where the first candidate is better.
    interval: the 95 % interval of the difference.
    p_value: of the hypothesis that there is no difference, two-sided.
    test: `mcnemar` for right and wrong answers, else `sign_flip`.
    won: on how many items the first candidate is better.
    lost: on how many items it is worse.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    won: int
    lost: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate beside a rival on held-out items.

    role: what the rival is: `best parent`, `best control` or both.
    rival: the rival's id.
    difference: of the weighted means; positive where the candidate is better.
    interval: the 95 % interval of the difference.
    p_value: of the hypothesis that there is no difference, two-sided.
    corrected: the p-value, corrected for all candidates that were compared with the rival.
    looked_at: how many candidates were compared with the rival.
    distinguishable: whether the candidate is better beyond chance.
    verdict: `better`, `not distinguishable` or `worse`.
    of: what the mean is called.
    objectives: by objective, the comparison on it, where its items have outcomes of their own.
    untested: the objectives that are left out, since their items have none.
    """

    role: str
    rival: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    corrected: float
    looked_at: int
    distinguishable: bool
    verdict: str
    of: str
    objectives: dict[str, TaskComparison]
    untested: list[str]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a candidate keeps of a parent.

    parent: the parent's name in the search file.
    metric: the metric on which the parent is best.
    items: the split on which both were scored.
    parent_score: the parent's score.
    score: the candidate's score.
    kept: the share of the parent's score that the candidate keeps; None where scores of 0 or below make it meaningless.
    """

    parent: str
    metric: str
    items: Study
    parent_score: float
    score: float
    kept: float | None


def against(results: Results, candidates: Sequence[str]) -> dict[str, list[Comparison]]:
    """How candidates compare with the best parent and the best control on held-out items, by candidate.

    A candidate's list is empty where it has no held-out scores. The rivals are chosen by their held-out scores, which
    favors them. p-values are corrected for every candidate of the search that has held-out scores, since any of these
    candidates might have been shown.

    results: the search's.
    candidates: ids.
    """
    comparisons: dict[str, list[Comparison]] = {name: [] for name in candidates}
    criteria = results.criteria("heldout")
    heldout = {record.candidate.id: record for record in results.archive.records("heldout")}
    for role, rival in rivals(results):
        pairs = {
            name: pair
            for name, record in heldout.items()
            if (record.candidate.kind == "search" or name in candidates)
            and record is not rival
            and (pair := _Pair.of(record, rival, results.config, criteria)) is not None
        }
        p_values = {name: pair.p_value for name, pair in pairs.items()}
        corrected = dict(zip(pairs, holm(list(p_values.values())), strict=True))
        for name in comparisons:
            if name in pairs:
                pair, difference = pairs[name], pairs[name].difference
                comparisons[name].append(
                    Comparison(
                        role=role,
                        rival=rival.candidate.id,
                        difference=difference,
                        interval=pair.interval,
                        p_value=p_values[name],
                        corrected=corrected[name],
                        looked_at=len(pairs),
                        distinguishable=corrected[name] < SIGNIFICANT and difference > 0,
                        verdict=_verdict(difference, corrected[name]),
                        of=criteria.mean_name,
                        objectives=pair.by_objective,
                        untested=pair.untested,
                    )
                )
    return comparisons


@dataclass(frozen=True, slots=True)
class Lead:
    """By how much one candidate leads another on held-out items.

    difference: of the weighted means.
    interval: the 95 % interval of the difference.
    p_value: of the hypothesis that there is no difference, two-sided, not corrected.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def lead(mine: Record, theirs: Record, results: Results) -> Lead | None:
    """By how much one candidate leads another on held-out items; None where items have no outcomes of their own.

    mine: the first candidate's record on held-out items, in whatever archive.
    theirs: the second candidate's.
    results: the search's, whose criteria count.
    """
    pair = _Pair.of(mine, theirs, results.config, results.criteria("heldout"))
    return None if pair is None else Lead(pair.difference, pair.interval, pair.p_value)


def _verdict(difference: float, p_value: float) -> str:
    if p_value >= SIGNIFICANT or difference == 0:
        return "not distinguishable"
    return "better" if difference > 0 else "worse"


def rivals(results: Results) -> list[tuple[str, Record]]:
    """The role and the record of the best parent, and of the best control that keeps to the constraints, on held-out
    items. Where both are the same candidate, there is only one entry."""
    controls = [record for record in results.archive.records("heldout") if record.candidate.kind == "control"]
    parents = [record for record in controls if family(record.candidate) == PARENT]
    criteria = results.criteria("heldout")
    parent = best_of(parents, replace(criteria, limits=()))
    control = best_of(controls, criteria)
    if parent is not None and parent is control:
        return [("best parent and control", parent)]
    return [
        (role, record) for role, record in (("best parent", parent), ("best control", control)) if record is not None
    ]


@dataclass(frozen=True)
class _Pair:
    """Two candidates on the objectives whose items have outcomes of their own.

    mine: the first candidate's record.
    theirs: the second candidate's.
    config: the search's.
    criteria: those of the records' split.
    outcomes: the outcomes of both candidates by objective, shape (items,) each.
    """

    mine: Record
    theirs: Record
    config: SearchConfig
    criteria: Criteria
    outcomes: Mapping[ObjectiveConfig, tuple[Floats, Floats]]

    @classmethod
    def of(cls, mine: Record, theirs: Record, config: SearchConfig, criteria: Criteria) -> "_Pair | None":
        """The pair; None where no objective with a weight has such outcomes."""
        outcomes = {
            objective: pair
            for objective in config.objectives
            if (pair := _outcomes(mine, theirs, objective)) is not None
        }
        return (
            cls(mine, theirs, config, criteria, outcomes)
            if sum(objective.weight for objective in outcomes) > 0
            else None
        )

    @property
    def differences(self) -> dict[ObjectiveConfig, Floats]:
        """The first candidate's lead on each item, by objective; shape (items,), larger is better."""
        return {objective: sign_of(objective) * (own - other) for objective, (own, other) in self.outcomes.items()}

    @property
    def gains(self) -> list[Floats]:
        """The first candidate's lead on each item on the scale of the mean, per objective; shape (items,)."""
        scales = self.criteria.scales
        return [
            differences / scales[objective.name].unit if objective.name in scales else differences
            for objective, differences in self.differences.items()
        ]

    @property
    def weights(self) -> Floats:
        return np.array([objective.weight for objective in self.outcomes])

    @property
    def p_value(self) -> float:
        """The p-value of the difference of the weighted means."""
        if len(self.outcomes) == 1:
            return self._task_p_value(next(iter(self.outcomes)))[1]
        return sign_flip(self.gains, self.weights, self._random("flips"))

    @property
    def difference(self) -> float:
        """The difference of the weighted means."""
        return weighted_difference(self.gains, self.weights)

    @property
    def interval(self) -> tuple[float, float]:
        low, high = interval(self.gains, self.weights, self._random("items"))
        return low, high

    @property
    def by_objective(self) -> dict[str, TaskComparison]:
        return {
            objective.name: self._task(objective, differences) for objective, differences in self.differences.items()
        }

    @property
    def untested(self) -> list[str]:
        return [
            objective.name
            for objective in self.config.objectives
            if objective.weight and objective not in self.outcomes
        ]

    def _task(self, objective: ObjectiveConfig, differences: Floats) -> TaskComparison:
        test, p_value = self._task_p_value(objective)
        low, high = interval([differences], np.ones(1), self._random("items", objective.name))
        return TaskComparison(
            difference=float(differences.mean()),
            interval=(low, high),
            p_value=p_value,
            test=test,
            won=int((differences > 0).sum()),
            lost=int((differences < 0).sum()),
        )

    def _task_p_value(self, objective: ObjectiveConfig) -> tuple[str, float]:
        """The test that fits the outcomes of an objective, and its p-value."""
        own, other = self.outcomes[objective]
        if np.isin(np.concatenate([own, other]), (0.0, 1.0)).all():
            return "mcnemar", mcnemar(own, other)
        return "sign_flip", sign_flip([own - other], np.ones(1), self._random("flips", objective.name))

    def _random(self, *purpose: str) -> np.random.Generator:
        return counter_rng(self.config.seed, *purpose, self.mine.candidate.id, self.theirs.candidate.id)


def _outcomes(mine: Record, theirs: Record, objective: ObjectiveConfig) -> tuple[Floats, Floats] | None:
    """The outcomes of two candidates on each item of an objective, shape (items,) each; None where they have none."""
    own, other = (record.evaluation.outcomes.get(objective.name) for record in (mine, theirs))
    if own is None or other is None or own.count != other.count or own.count == 0:
        return None
    return own.values, other.values


def retention(results: Results, candidate: str) -> list[Kept]:
    """How much a candidate keeps of each parent's best metric. Held-out scores count, or search scores while the
    candidate has no held-out scores.

    A parent's best metric is the one on which it leads the base by most on search items, relative to the largest score
    of base and parents there. Where a parent leads on no metric of the search, it is the one among the reported metrics
    on which it leads the base by most on held-out items; and where there is none, the one of the search on which it
    comes closest to the largest score.

    results: the search's.
    candidate: the candidate's id.
    """
    archive = results.archive
    split: Study = "heldout" if archive.find(candidate, "heldout") is not None else results.study
    rows = []
    for name in results.config.models:
        metric = _own_best(results, f"{PARENT}-{name}", split)
        parent, mine = archive.find(f"{PARENT}-{name}", split), archive.find(candidate, split)
        if (
            metric is None
            or parent is None
            or mine is None
            or None in (parent.evaluation.scores, mine.evaluation.scores)
        ):
            continue
        theirs, own = ((record.evaluation.scores or {})[metric.name] for record in (parent, mine))
        above, below = (own, theirs) if sign_of(metric) > 0 else (theirs, own)
        kept = above / below if above >= 0 and below > 0 else None
        rows.append(Kept(name, metric.name, split, theirs, own, kept))
    return rows


def _own_best(results: Results, parent: str, split: Study) -> ObjectiveConfig | None:
    measured, reported = results.config.measured, results.config.reported
    lead, metric = _leading(results, parent, measured, results.study)
    if lead > 0 or split != "heldout":
        return metric
    lead, other = _leading(results, parent, reported[len(measured) :], "heldout")
    return other if lead > 0 else metric


def _leading(
    results: Results, parent: str, metrics: Sequence[ObjectiveConfig], study: Study
) -> tuple[float, ObjectiveConfig | None]:
    """By how much a parent leads the base on its best metric, 0 where it leads on none, and that metric."""
    names = [BASE, *(f"{PARENT}-{name}" for name in results.config.models)]
    records = {name: results.archive.find(name, study) for name in names}
    scores = {name: record.evaluation.scores for name, record in records.items() if record and record.evaluation.scores}
    if parent not in scores or BASE not in scores:
        return 0.0, None

    def merit(metric: ObjectiveConfig) -> tuple[float, float]:
        sign = sign_of(metric) / (max(abs(values[metric.name]) for values in scores.values()) or 1.0)
        mine, base = sign * scores[parent][metric.name], sign * scores[BASE][metric.name]
        return max(0.0, mine - base), mine

    best = max((metric for metric in metrics if metric.cost is None), key=merit, default=None)
    return (0.0, None) if best is None else (merit(best)[0], best)


def phrase(compared: Comparison) -> str:
    """A comparison in one line: the difference, its interval and its p-value."""
    low, high = compared.interval
    least = "< 0.001" if compared.corrected < 0.001 else f"{compared.corrected:.3f}"
    candidates = f" corrected for {compared.looked_at} candidates" if compared.looked_at > 1 else ""
    untested = f"; without {', '.join(compared.untested)}, of which no item has a score" if compared.untested else ""
    return (
        f"{compared.difference:+.3f} in the {compared.of} (95 % interval {low:+.3f} to {high:+.3f}), p {least}"
        f"{candidates}{untested}"
    )


def sentence(compared: Comparison) -> str:
    """The verdict of a comparison with its figures: `better than ...`, `worse than ...` or `not distinguishable from
    ...`."""
    joint = "from" if compared.verdict == "not distinguishable" else "than"
    return f"{compared.verdict} {joint} {compared.rival} on held-out items: {phrase(compared)}"
