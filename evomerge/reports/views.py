"""What a run holds, as plain values for JSON and tables. Nothing here depends on when or where a candidate ran."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evomerge.archive.archive import Archive, Record
from evomerge.candidate import Evaluation
from evomerge.config.base import SPLITS, Split
from evomerge.config.search import SearchConfig
from evomerge.evidence.comparison import against, retention
from evomerge.search import failures
from evomerge.search.best import HELDOUT_FRONT, best_found, best_of, front_of, means, reported
from evomerge.search.controls import ESSENTIAL, count_controls, family
from evomerge.search.criteria import Criteria, criteria_of

Row = dict[str, Any]


def candidate_row(archive: Archive, record: Record, criteria: Criteria) -> Row:
    """One evaluation on search items. `genes` has those that count: what a condition rules out is left out."""
    candidate, evaluation = record.candidate, record.evaluation
    return {
        "id": candidate.id,
        "kind": candidate.kind,
        "generation": candidate.generation,
        "index": candidate.index,
        "genome": list(candidate.genome) if candidate.genome is not None else None,
        "genes": archive.genes(candidate),
        "scores": scores_of(evaluation),
        "state": "failed" if evaluation.failed else "done",
        "feasible": criteria.feasible(evaluation) if evaluation.subset is None else None,
        "error": evaluation.error,
        "items": evaluation.items,
        "subset": evaluation.subset.share if evaluation.subset is not None else None,
        "fingerprint": evaluation.fingerprint,
    }


def scores_of(evaluation: Evaluation) -> dict[str, float] | None:
    return dict(evaluation.scores) if evaluation.scores is not None else None


def candidates(archive: Archive, config: SearchConfig) -> list[Row]:
    """Every evaluation, with its scores on the other splits' items or the reason why there are none."""
    criteria = criteria_by_split(archive, config)
    why = _HeldoutReasons(archive, criteria["search"])
    return [_whole_row(archive, record, criteria, why) for record in archive.tried()]


def front(archive: Archive, config: SearchConfig) -> list[Row]:
    """The Pareto front on all search items, best mean first, with held-out scores where they are known, and what they
    say of each candidate beside the best parent and the best control."""
    criteria = criteria_by_split(archive, config)
    why = _HeldoutReasons(archive, criteria["search"])
    rows = [_whole_row(archive, record, criteria, why) for record in why.front]
    compared = against(archive, config, [row["id"] for row in rows])
    return [{**row, "against": compared[row["id"]]} for row in rows]


def evidence(archive: Archive, config: SearchConfig) -> Row:
    """The best candidate beside the best parent and the best control on held-out items, and what it keeps of each
    parent; nothing while there is no best."""
    best = best_found(archive, config)
    if best is None:
        return {"candidate": None, "against": [], "retention": []}
    name = best.candidate.id
    return {
        "candidate": name,
        "against": against(archive, config, [name])[name],
        "retention": retention(archive, config, name),
    }


def criteria_by_split(archive: Archive, config: SearchConfig) -> dict[Split, Criteria]:
    """A search's criteria on the items of each split."""
    return {split: criteria_of(archive, config, split) for split in SPLITS}


def with_other_splits(archive: Archive, record: Record, criteria: Mapping[Split, Criteria]) -> Row:
    """A candidate's row with its scores on the other splits' items and the means of all, null where there are none."""
    selection, heldout = (archive.find(record.candidate.id, split) for split in SPLITS[1:])
    return {
        **candidate_row(archive, record, criteria["search"]),
        "mean": _mean(record, criteria["search"]),
        "selection": scores_of(selection.evaluation) if selection else None,
        "selection_mean": _mean(selection, criteria["selection"]),
        "heldout": scores_of(heldout.evaluation) if heldout else None,
        "heldout_mean": _mean(heldout, criteria["heldout"]),
    }


def _mean(record: Record | None, criteria: Criteria) -> float | None:
    return means([record], criteria)[0] if record is not None and not record.evaluation.failed else None


def _whole_row(archive: Archive, record: Record, criteria: Mapping[Split, Criteria], why: "_HeldoutReasons") -> Row:
    return {**with_other_splits(archive, record, criteria), "heldout_missing": why(record)}


class _HeldoutReasons:
    """Says of a candidate why it has no held-out scores; None where it has."""

    def __init__(self, archive: Archive, criteria: Criteria) -> None:
        records = archive.records()
        self._archive, self._criteria = archive, criteria
        self.front = front_of(records, criteria)
        self._on_front = {record.candidate.id for record in self.front}
        self._first = {record.evaluation.fingerprint: record.candidate.id for record in self.front}
        self._chosen = {candidate.id for candidate in reported(records, criteria)}

    def __call__(self, record: Record) -> str | None:
        name, evaluation = record.candidate.id, record.evaluation
        heldout = self._archive.find(name, "heldout")
        if heldout is not None:
            return f"failed on held-out items: {heldout.evaluation.error}" if heldout.evaluation.failed else None
        if evaluation.failed:
            return "failed"
        if evaluation.subset is not None:
            return "scored on a subset of the search items only"
        if name in self._chosen:
            return "not scored on held-out items yet"
        if name in self._on_front:
            return f"only the best {HELDOUT_FRONT} of the front get held-out scores"
        return self._why_not_on_front(record)

    def _why_not_on_front(self, record: Record) -> str:
        if not self._criteria.feasible(record.evaluation):
            return "breaks a constraint"
        first = self._first.get(record.evaluation.fingerprint)
        if first is not None:
            return f"has the same weights as {first}"
        return "not on the front" + (", nor the best of its kind" if record.candidate.kind == "control" else "")


def status(archive: Archive, config: SearchConfig, running: bool) -> Row:
    """State and figures of a run. `evaluations` and `budget` count search candidates; controls come on top."""
    records, tried = archive.records(), archive.tried()
    searched = [record for record in tried if record.candidate.kind == "search"]
    controls = count_controls(config)
    criteria = criteria_of(archive, config)
    best = best_found(archive, config)
    return {
        "state": "running" if running else "finished" if _finished(archive, config, controls) else "interrupted",
        "evaluations": len(searched),
        "budget": config.budget,
        "controls": {"done": len(tried) - len(searched), "total": controls},
        "on_all_items": sum(record.candidate.kind == "search" for record in records),
        "failed": sum(record.evaluation.failed for record in tried),
        "failures": failures.counted(record.evaluation for record in tried),
        "infeasible": sum(
            not record.evaluation.failed and not criteria.feasible(record.evaluation) for record in records
        ),
        "front_size": len(front_of(records, criteria)),
        "best_per_objective": _best_per_objective(records, criteria),
        "mean": criteria.mean_name,
        "best": with_other_splits(archive, best, criteria_by_split(archive, config)) if best else None,
    }


def _best_per_objective(records: Sequence[Record], criteria: Criteria) -> Row:
    """For each objective the best score of any candidate that may win, and whose it is."""
    found = {}
    for objective in criteria.objectives:
        alone = objective.model_copy(update={"weight": 1.0})  # a cost may have none
        best = best_of(records, replace(criteria, objectives=(alone,)))
        scores = scores_of(best.evaluation) if best else None
        found[objective.name] = {"id": best.candidate.id, "score": scores[objective.name]} if best and scores else None
    return found


def _finished(archive: Archive, config: SearchConfig, controls: int) -> bool:
    tried = archive.tried()
    searched = sum(record.candidate.kind == "search" for record in tried)
    if searched < config.budget or len(tried) - searched < controls:
        return False
    chosen = reported(archive.records(), criteria_of(archive, config))
    return all(archive.find(candidate.id, split) for split in config.splits[1:] for candidate in chosen)


def _winners(name: str, members: Sequence[Record], archive: Archive, config: SearchConfig) -> list[Record]:
    """The one to show of a family of controls, or of the search; none where none may win."""
    best = best_found(archive, config) if name == "search" else best_of(members, criteria_of(archive, config))
    return [best] if best is not None and family(best.candidate) == name else []


TITLES: Mapping[str, str] = {
    "base": "base",
    "uniform": "uniform merge",
    "one_knob": "best one-knob grid",
    "per_model": "best per-model weights",
    "random": "random search",
    "search": "evolved best",
}


def comparison(archive: Archive, config: SearchConfig) -> list[tuple[str, Row]]:
    """(title, row) for every control worth comparing with, and the evolved best last; each chosen on search items."""
    records, criteria = archive.records(), criteria_by_split(archive, config)
    rows = []
    for name in dict.fromkeys(family(record.candidate) for record in records):
        members = [record for record in records if family(record.candidate) == name]
        for record in members if name in ESSENTIAL else _winners(name, members, archive, config):
            title = TITLES.get(name, f"parent {record.candidate.id.removeprefix('parent-')}")
            if name == "one_knob":
                title += f" ({record.candidate.recipe.merge_method})"
            rows.append((title, with_other_splits(archive, record, criteria)))
    return rows
