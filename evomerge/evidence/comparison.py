"""Evidence: what held-out items say of a candidate beside the best parent and the best control, and what it keeps of
each parent. From the archive to plain values for JSON and tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evomerge.archive.archive import Archive, Record
from evomerge.config.base import Split
from evomerge.config.scoring import ObjectiveConfig
from evomerge.config.search import SearchConfig
from evomerge.evidence.statistics import Floats, holm, interval, mcnemar, sign_flip, weighted_difference
from evomerge.randomness import counter_rng
from evomerge.search.best import best_of
from evomerge.search.controls import BASE, PARENT, family
from evomerge.search.criteria import Criteria, criteria_of, sign_of

Row = dict[str, Any]
SIGNIFICANT = 0.05


def against(archive: Archive, config: SearchConfig, candidates: Sequence[str]) -> dict[str, list[Row]]:
    """By candidate, how it compares with the best parent and the best control on held-out items, as far as known.

    The rivals are the best there, which favors them. p-values are corrected for every candidate of the search that has
    held-out scores, since any of these could have been the one to be shown.
    """
    found: dict[str, list[Row]] = {name: [] for name in candidates}
    criteria = criteria_of(archive, config, "heldout")
    heldout = {record.candidate.id: record for record in archive.records("heldout")}
    for role, rival in rivals(archive, config):
        pairs = {
            name: pair
            for name, record in heldout.items()
            if (record.candidate.kind == "search" or name in candidates)
            and record is not rival
            and (pair := _Pair.of(record, rival, config, criteria)) is not None
        }
        p_values = {name: pair.p_value for name, pair in pairs.items()}
        corrected = dict(zip(pairs, holm(list(p_values.values())), strict=True))
        for name in found:
            if name in pairs:
                row = pairs[name].row()
                found[name].append(
                    {
                        "role": role,
                        "rival": rival.candidate.id,
                        "difference": row["difference"],
                        "interval": row["interval"],
                        "p_value": p_values[name],
                        "corrected": corrected[name],
                        "looked_at": len(pairs),
                        "distinguishable": corrected[name] < SIGNIFICANT and row["difference"] > 0,
                        "verdict": _verdict(row["difference"], corrected[name]),
                        "of": criteria.mean_name,
                        "objectives": row["objectives"],
                        "untested": row["untested"],
                    }
                )
    return found


def _verdict(difference: float, p_value: float) -> str:
    if p_value >= SIGNIFICANT or difference == 0:
        return "not distinguishable"
    return "better" if difference > 0 else "worse"


def rivals(archive: Archive, config: SearchConfig) -> list[tuple[str, Record]]:
    """The best parent, and the best control that keeps to the constraints, on held-out items; each named once."""
    controls = [record for record in archive.records("heldout") if record.candidate.kind == "control"]
    parents = [record for record in controls if family(record.candidate) == PARENT]
    criteria = criteria_of(archive, config, "heldout")
    parent = best_of(parents, replace(criteria, limits=()))
    control = best_of(controls, criteria)
    if parent is not None and parent is control:
        return [("best parent and control", parent)]
    return [(role, each) for role, each in (("best parent", parent), ("best control", control)) if each is not None]


@dataclass(frozen=True)
class _Pair:
    """The items of two candidates on the objectives where these are known one by one, with a weight above 0 in all."""

    mine: Record
    theirs: Record
    config: SearchConfig
    criteria: Criteria
    outcomes: Mapping[ObjectiveConfig, tuple[Floats, Floats]]

    @classmethod
    def of(cls, mine: Record, theirs: Record, config: SearchConfig, criteria: Criteria) -> "_Pair | None":
        known = {each: pair for each in config.objectives if (pair := _outcomes(mine, theirs, each)) is not None}
        return cls(mine, theirs, config, criteria, known) if sum(each.weight for each in known) > 0 else None

    @property
    def differences(self) -> dict[ObjectiveConfig, Floats]:
        """By objective, what each item gains; shape (items,), larger is better."""
        return {each: sign_of(each) * (own - other) for each, (own, other) in self.outcomes.items()}

    @property
    def gains(self) -> list[Floats]:
        """By objective, what each item gains on the scale of the mean; shape (items,)."""
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
        """Of the difference of the weighted means."""
        if len(self.outcomes) == 1:
            return self._task_p_value(next(iter(self.outcomes)))[1]
        return sign_flip(self.gains, self.weights, self._random("flips"))

    def row(self) -> Row:
        differences, every = self.differences, self.gains
        return {
            "difference": weighted_difference(every, self.weights),
            "interval": list(interval(every, self.weights, self._random("items"))),
            "objectives": {each.name: self._task_row(each, differences[each]) for each in differences},
            "untested": [each.name for each in self.config.objectives if each.weight and each not in differences],
        }

    def _task_row(self, objective: ObjectiveConfig, differences: Floats) -> Row:
        test, p_value = self._task_p_value(objective)
        return {
            "difference": float(differences.mean()),
            "interval": list(interval([differences], np.ones(1), self._random("items", objective.name))),
            "p_value": p_value,
            "test": test,
            "won": int((differences > 0).sum()),
            "lost": int((differences < 0).sum()),
        }

    def _task_p_value(self, objective: ObjectiveConfig) -> tuple[str, float]:
        """Which test fits the outcomes of one task, and its p-value."""
        own, other = self.outcomes[objective]
        if np.isin(np.concatenate([own, other]), (0.0, 1.0)).all():
            return "mcnemar", mcnemar(own, other)
        return "sign_flip", sign_flip([own - other], np.ones(1), self._random("flips", objective.name))

    def _random(self, *purpose: str) -> np.random.Generator:
        return counter_rng(self.config.seed, *purpose, self.mine.candidate.id, self.theirs.candidate.id)


def _outcomes(mine: Record, theirs: Record, objective: ObjectiveConfig) -> tuple[Floats, Floats] | None:
    """What became of each item, of one candidate and of another; None where the metric is no mean over items."""
    own, other = (record.evaluation.outcomes.get(objective.name) for record in (mine, theirs))
    if own is None or other is None or own.count != other.count or own.count == 0:
        return None
    return own.values, other.values


def retention(archive: Archive, config: SearchConfig, candidate: str) -> list[Row]:
    """For each parent, how much a candidate keeps of what that parent does best, on held-out items where known.

    That is the metric on which it leads the base by most on search items, relative to the largest score of base and
    parents there; of a parent that leads on none, the one on which it comes closest to that score.
    """
    split: Split = "heldout" if archive.find(candidate, "heldout") is not None else "search"
    rows = []
    for name in config.models:
        metric = _own_best(archive, config, f"{PARENT}-{name}")
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
        rows.append(
            {
                "parent": name,
                "metric": metric.name,
                "items": split,
                "parent_score": theirs,
                "score": own,
                "kept": above / below if above >= 0 and below > 0 else None,
            }
        )
    return rows


def _own_best(archive: Archive, config: SearchConfig, parent: str) -> ObjectiveConfig | None:
    names = [BASE, *(f"{PARENT}-{name}" for name in config.models)]
    found = {name: archive.find(name, "search") for name in names}
    scores = {name: record.evaluation.scores for name, record in found.items() if record and record.evaluation.scores}
    if parent not in scores or BASE not in scores:
        return None

    def merit(metric: ObjectiveConfig) -> tuple[float, float]:
        sign = sign_of(metric) / (max(abs(each[metric.name]) for each in scores.values()) or 1.0)
        mine, base = sign * scores[parent][metric.name], sign * scores[BASE][metric.name]
        return max(0.0, mine - base), mine

    return max((metric for metric in config.measured if metric.cost is None), key=merit, default=None)


def phrase(row: Row) -> str:
    """A comparison in a line."""
    low, high = row["interval"]
    least = "< 0.001" if row["corrected"] < 0.001 else f"{row['corrected']:.3f}"
    candidates = f" corrected for {row['looked_at']} candidates" if row["looked_at"] > 1 else ""
    untested = f"; without {', '.join(row['untested'])}, of which no item has a score" if row["untested"] else ""
    return (
        f"{row['difference']:+.3f} in the {row['of']} (95 % interval {low:+.3f} to {high:+.3f}), p {least}{candidates}"
        f"{untested}"
    )


def sentence(row: Row) -> str:
    """The verdict on a candidate beside a rival, with the comparison: `better than ...`, `worse than ...`, `not
    distinguishable from ...`."""
    joint = "from" if row["verdict"] == "not distinguishable" else "than"
    return f"{row['verdict']} {joint} {row['rival']} on held-out items: {phrase(row)}"
