"""The table of held-out scores: the controls worth comparing with, and a candidate of the search beside them."""

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.archive.archive import Record
from evomerge.evidence.statistics import Floats, interval, wilson
from evomerge.randomness import counter_rng
from evomerge.recipe import HeldoutRow, HeldoutTable
from evomerge.search.best import best_of, means
from evomerge.search.controls import ESSENTIAL, family
from evomerge.search.results import Results

TITLES: Mapping[str, str] = {
    "base": "base",
    "uniform": "uniform merge",
    "one_knob": "best one-knob grid",
    "per_model": "best per-model weights",
    "random": "random search",
    "search": "evolved best",
}
_THIS = "this merge"


def compared(results: Results) -> list[tuple[str, Record]]:
    """The title and the record on search items of every control worth comparing with, and of the evolved best, which is
    last.

    Of a family of controls, the best on search items is shown; of the essential controls, all are.
    """
    records = results.records()
    rows = []
    for name in dict.fromkeys(family(record.candidate) for record in records):
        members = [record for record in records if family(record.candidate) == name]
        for record in members if name in ESSENTIAL else _winners(name, members, results):
            title = TITLES.get(name, f"parent {record.candidate.id.removeprefix('parent-')}")
            if name == "one_knob":
                title += f" ({record.candidate.recipe.merge_method})"
            rows.append((title, record))
    return rows


def _winners(name: str, members: Sequence[Record], results: Results) -> list[Record]:
    """The best candidate of a family of controls, or of the search; empty where all of its members break constraints.

    name: the family's.
    members: its records.
    """
    best = results.best() if name == "search" else best_of(members, results.criteria())
    return [best] if best is not None and family(best.candidate) == name else []


def heldout_table(results: Results, candidate: str) -> HeldoutTable | None:
    """The held-out scores of the controls, and of a candidate in the last row; None where it has none.

    results: the search's.
    candidate: the candidate's id.
    """
    mine = results.archive.find(candidate, "heldout")
    if mine is None or mine.evaluation.scores is None:
        return None
    others = [
        (title, record.candidate.id) for title, record in compared(results) if family(record.candidate) != "search"
    ]
    rows = [
        (title, record)
        for title, name in others
        if name != candidate and (record := results.archive.find(name, "heldout")) is not None
    ]
    return HeldoutTable(
        mean_name=results.criteria("heldout").mean_name,
        items={name: outcomes.count for name, outcomes in mine.evaluation.outcomes.items()},
        rows=tuple(_row(title, record, results) for title, record in [*rows, (_THIS, mine)]),
    )


def _row(title: str, record: Record, results: Results) -> HeldoutRow:
    scores = record.evaluation.scores
    criteria = results.criteria("heldout")
    return HeldoutRow(
        title=title,
        mean=means([record], criteria)[0] if scores is not None else None,
        scores=dict(scores) if scores is not None else {},
        intervals=_intervals(record, results),
    )


def _intervals(record: Record, results: Results) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each score that is a mean over items."""
    seed, name = results.config.seed, record.candidate.id
    return {
        objective: _interval(outcomes.values, counter_rng(seed, "items", objective, name))
        for objective, outcomes in record.evaluation.outcomes.items()
        if outcomes.count
    }


def _interval(values: Floats, random: np.random.Generator) -> tuple[float, float]:
    """The interval of a mean: Wilson's for right and wrong answers, else a bootstrap's."""
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(int(values.sum()), len(values))
    return interval([values], np.ones(1), random)
