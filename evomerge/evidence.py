"""Evidence: what held-out items say of a candidate beside the best parent and the best control, and what it keeps of
each parent. From the archive to plain values for JSON and tables.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evomerge.archive import Archive, Record
from evomerge.config import ObjectiveConfig, SearchConfig, Split
from evomerge.controls import BASE, PARENT, family
from evomerge.criteria import Criteria, criteria_of, sign_of
from evomerge.randomness import counter_rng
from evomerge.search import best_of
from evomerge.statistics import Floats, compare, holm, mcnemar

Row = dict[str, Any]
SIGNIFICANT = 0.05


def against(archive: Archive, config: SearchConfig, candidates: Sequence[str]) -> dict[str, list[Row]]:
    """By candidate, how it compares with the best parent and the best control on held-out items, as far as known.

    The rivals are the best there, which favors them. p-values are corrected for every candidate of the search that has
    held-out scores, since any of these could have been the one to be shown.
    """
    found: dict[str, list[Row]] = {name: [] for name in candidates}
    looked_at = [record for record in archive.records("heldout") if record.candidate.kind == "search"]
    for role, rival in rivals(archive, config):
        records = {record.candidate.id: record for record in looked_at if not record.evaluation.failed}
        for name in candidates:
            record = archive.find(name, "heldout")
            if record is not None and not record.evaluation.failed and name != rival.candidate.id:
                records[name] = record
        rows = {name: row for name, record in records.items() if (row := _row(record, rival, config)) is not None}
        corrected = dict(zip(rows, holm([row["p_value"] for row in rows.values()]), strict=True))
        for name in candidates:
            if name in rows:
                found[name].append(
                    {
                        "role": role,
                        "rival": rival.candidate.id,
                        **rows[name],
                        "corrected": corrected[name],
                        "looked_at": len(rows),
                        "distinguishable": corrected[name] < SIGNIFICANT and rows[name]["difference"] > 0,
                    }
                )
    return found


def rivals(archive: Archive, config: SearchConfig) -> list[tuple[str, Record]]:
    """The best parent, and the best control that keeps to the constraints, on held-out items; each named once."""
    controls = [record for record in archive.records("heldout") if record.candidate.kind == "control"]
    parents = [record for record in controls if family(record.candidate) == PARENT]
    parent = best_of(parents, Criteria(config.objectives))
    control = best_of(controls, criteria_of(archive, config, "heldout"))
    found = [("best parent", parent), ("best control", control)]
    return [(role, each) for role, each in found if each is not None and (role == "best parent" or each is not parent)]


def _row(mine: Record, theirs: Record, config: SearchConfig) -> Row | None:
    """The difference of the weighted means over the objectives whose items are known one by one, and each of these."""
    tested = {
        objective: pair for objective in config.objectives if (pair := _outcomes(mine, theirs, objective)) is not None
    }
    weights = np.array([objective.weight for objective in tested])
    if not weights.sum() > 0:
        return None

    def rng(*purpose: str) -> np.random.Generator:
        return counter_rng(config.seed, "bootstrap", mine.candidate.id, theirs.candidate.id, *purpose)

    differences = {objective.name: sign_of(objective) * (own - other) for objective, (own, other) in tested.items()}
    objectives = {}
    for objective, (own, other) in tested.items():
        each = compare([differences[objective.name]], np.ones(1), rng(objective.name))
        binary = bool(np.isin(np.concatenate([own, other]), (0.0, 1.0)).all())
        objectives[objective.name] = {
            "difference": each.difference,
            "interval": [each.low, each.high],
            "p_value": mcnemar(own, other) if binary else each.p_value,
            "test": "mcnemar" if binary else "sign_flip",
            "won": int((differences[objective.name] > 0).sum()),
            "lost": int((differences[objective.name] < 0).sum()),
        }
    joint = compare(list(differences.values()), weights, rng())
    return {
        "difference": joint.difference,
        "interval": [joint.low, joint.high],
        "p_value": joint.p_value if len(objectives) > 1 else next(iter(objectives.values()))["p_value"],
        "objectives": objectives,
        "untested": [objective.name for objective in config.objectives if objective.name not in objectives],
    }


def _outcomes(mine: Record, theirs: Record, objective: ObjectiveConfig) -> tuple[Floats, Floats] | None:
    """What became of each item, of one candidate and of another; None where the metric is no mean over items."""
    own, other = (record.evaluation.outcomes.get(objective.name) for record in (mine, theirs))
    if own is None or other is None or own.count != other.count or own.count == 0:
        return None
    return own.values, other.values


def retention(archive: Archive, config: SearchConfig, candidate: str) -> list[Row]:
    """For each parent, how much a candidate keeps of what that parent does best: of the metric on which it leads the
    base by most on search items, relative to the largest score of any parent there. On held-out items where known."""
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

    def lead(metric: ObjectiveConfig) -> float:
        largest = max(abs(each[metric.name]) for each in scores.values()) or 1.0
        return sign_of(metric) * (scores[parent][metric.name] - scores[BASE][metric.name]) / largest

    return max(config.measured, key=lead)


def phrase(row: Row) -> str:
    """A comparison in a line."""
    low, high = row["interval"]
    least = "< 0.001" if row["corrected"] < 0.001 else f"{row['corrected']:.3f}"
    candidates = f" corrected for {row['looked_at']} candidates" if row["looked_at"] > 1 else ""
    return f"{row['difference']:+.3f} in the mean (95 % interval {low:+.3f} to {high:+.3f}), p {least}{candidates}"
