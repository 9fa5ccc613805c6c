"""What a run holds, as plain values for JSON and tables. Nothing here depends on when or where a candidate ran."""

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.archive import Archive, Record
from evomerge.candidate import Evaluation
from evomerge.config import SearchConfig
from evomerge.controls import count_controls, family
from evomerge.search import best_found, best_of, front_of, means, reported

Row = dict[str, Any]


def candidate_row(record: Record) -> Row:
    """One evaluation as `candidates --json` shows it."""
    candidate, evaluation = record.candidate, record.evaluation
    return {
        "id": candidate.id,
        "kind": candidate.kind,
        "generation": candidate.generation,
        "index": candidate.index,
        "genome": list(candidate.genome) if candidate.genome is not None else None,
        "scores": scores_of(evaluation),
        "state": "failed" if evaluation.failed else "done",
        "error": evaluation.error,
        "items": evaluation.items,
        "fingerprint": evaluation.fingerprint,
    }


def scores_of(evaluation: Evaluation) -> dict[str, float] | None:
    return dict(evaluation.scores) if evaluation.scores is not None else None


def candidates(archive: Archive) -> list[Row]:
    return [candidate_row(record) for record in archive.records()]


def front(archive: Archive, config: SearchConfig) -> list[Row]:
    """The Pareto front on all search items, best mean first, with held-out scores where they are known."""
    return [with_heldout(archive, record) for record in front_of(archive.records(), config.objectives)]


def with_heldout(archive: Archive, record: Record) -> Row:
    heldout = archive.find(record.candidate.id, "heldout")
    return {**candidate_row(record), "heldout": scores_of(heldout.evaluation) if heldout else None}


def status(archive: Archive, config: SearchConfig, running: bool) -> Row:
    """State and figures of a run. `evaluations` and `budget` count search candidates; controls come on top."""
    records = archive.records()
    searched = [record for record in records if record.candidate.kind == "search"]
    controls = count_controls(config)
    best = best_found(records, config.objectives)
    return {
        "state": "running" if running else "finished" if _finished(archive, config, controls) else "interrupted",
        "evaluations": len(searched),
        "budget": config.budget,
        "controls": {"done": len(records) - len(searched), "total": controls},
        "failed": sum(record.evaluation.failed for record in records),
        "front_size": len(front_of(records, config.objectives)),
        "best_per_objective": _best_per_objective(records, config),
        "best": {**with_heldout(archive, best), "mean": means([best], config.objectives)[0]} if best else None,
    }


def _best_per_objective(records: Sequence[Record], config: SearchConfig) -> Row:
    """For each objective the best score of any candidate, and whose it is."""
    found = {}
    for objective in config.objectives:
        best = best_of(records, [objective.model_copy(update={"weight": 1.0})])
        scores = scores_of(best.evaluation) if best else None
        found[objective.name] = {"id": best.candidate.id, "score": scores[objective.name]} if best and scores else None
    return found


def _finished(archive: Archive, config: SearchConfig, controls: int) -> bool:
    records = archive.records()
    searched = sum(record.candidate.kind == "search" for record in records)
    if searched < config.budget or len(records) - searched < controls:
        return False
    return all(archive.find(candidate.id, "heldout") for candidate in reported(records, config.objectives))


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
    records = archive.records()
    rows = []
    for name in dict.fromkeys(family(record.candidate) for record in records):
        members = [record for record in records if family(record.candidate) == name]
        best = best_of(members, config.objectives)
        shown = members if name == "parent" else [best] if best else []
        for record in shown:
            title = TITLES.get(name, f"parent {record.candidate.id.removeprefix('parent-')}")
            if name == "one_knob":
                title += f" ({record.candidate.recipe.merge_method})"
            rows.append((title, with_heldout(archive, record)))
    return rows
