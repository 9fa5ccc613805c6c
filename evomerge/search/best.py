"""Which candidate is the best, which are on the front, and which get selection and held-out scores."""

from collections.abc import Sequence

import numpy as np

from evomerge.archive.archive import Archive, Record, place
from evomerge.candidate import Candidate
from evomerge.config.base import Split
from evomerge.config.search import SearchConfig
from evomerge.optimizers.pareto import front_mask
from evomerge.optimizers.ranking import weighted_means
from evomerge.search.controls import ESSENTIAL, family
from evomerge.search.criteria import Criteria, criteria_of
from evomerge.search.failures import counted

_REASONS = 3  # for which candidates failed, that a sentence tells


def all_failed(archive: Archive) -> str | None:
    """A clause for a search of which every candidate failed, with the commonest reasons; None for any other."""
    searched = [record.evaluation for record in archive.tried() if record.candidate.kind == "search"]
    if not searched or not all(evaluation.failed for evaluation in searched):
        return None
    reasons = list(counted(searched).items())
    told = "; ".join(f"{count} x {reason.rstrip('.')}" for reason, count in reasons[:_REASONS])
    more = sum(count for _, count in reasons[_REASONS:])
    return f"all {len(searched)} candidates failed ({told}{f'; {more} for other reasons' if more else ''})"


def none_feasible(archive: Archive, config: SearchConfig) -> str:
    """A sentence for a search in which no candidate keeps to the constraints: what they ask, and who came closest."""
    selected = best_of(archive.records(), criteria_of(archive, config)) is not None
    split: Split = "selection" if selected else "search"  # those who keep to them on search items break them there
    criteria = criteria_of(archive, config, split)
    asked = " and ".join(str(limit) for limit in criteria.limits)
    records = [record for record in archive.records(split) if not record.evaluation.failed]
    totals = criteria.violations([record.evaluation for record in records]).sum(axis=1)
    closest = records[int(np.argmin(totals))]
    scores = closest.evaluation.scores or {}
    reached = ", ".join(f"{name} {scores[name]:.3f}" for name in dict.fromkeys(limit.name for limit in criteria.limits))
    return (
        f"no candidate keeps to the constraints on {split} items: {asked}; {closest.candidate.id} comes closest with "
        f"{reached}, so there is nothing to export; search longer, or ask for less."
    )


HELDOUT_FRONT = (
    20  # with many objectives a front is long, and each held-out score costs as much as an evaluation or two
)


def means(records: Sequence[Record], criteria: Criteria) -> list[float]:
    """The weighted mean score of each record, -inf for failures."""
    return criteria.means([record.evaluation for record in records])


def best_of(records: Sequence[Record], criteria: Criteria) -> Record | None:
    """The first record with the highest weighted mean; None where nothing succeeded that keeps to the limits."""
    ordered = sorted(records, key=lambda record: place(record.candidate))
    scores = criteria.eligible([record.evaluation for record in ordered])
    values = weighted_means(scores, criteria.weights)
    if not values.size or values.max() == -np.inf:
        return None
    return ordered[int(np.argmax(values))]


def best_found(archive: Archive, config: SearchConfig) -> Record | None:
    """The best search candidate, or the best control while there is none; None where none keeps to the limits.

    By the search items; once the best of them all have scores on the selection items, among those by these.
    """
    records, criteria = archive.records(), criteria_of(archive, config)
    contenders = _selected(archive, config, records, criteria)
    if contenders is None:
        return _best_searched(records, criteria)
    best = _best_searched(contenders, criteria_of(archive, config, "selection"))
    return archive.find(best.candidate.id, "search") if best is not None else None


def _selected(
    archive: Archive, config: SearchConfig, records: Sequence[Record], criteria: Criteria
) -> list[Record] | None:
    """The records on selection items of those that may win by the search items, once all are there."""
    if config.items.selection is None:
        return None
    chosen = [archive.find(candidate.id, "selection") for candidate in reported(records, criteria)]
    scored = [record for record in chosen if record is not None]
    if not scored or len(scored) < len(chosen):
        return None
    feasible = {record.candidate.id for record in records if criteria.feasible(record.evaluation)}
    return [record for record in scored if record.candidate.id in feasible]


def _best_searched(records: Sequence[Record], criteria: Criteria) -> Record | None:
    searched = [record for record in records if record.candidate.kind == "search"]
    return best_of(searched, criteria) or best_of(records, criteria)


def front_of(records: Sequence[Record], criteria: Criteria) -> list[Record]:
    """The records that keep to the limits and that no other of these dominates, best mean first; of several with the
    same weights the first found."""
    ordered = sorted(records, key=lambda record: place(record.candidate))
    mask = front_mask(criteria.eligible([record.evaluation for record in ordered]))
    kept = [record for record, on_front in zip(ordered, mask, strict=True) if on_front]
    distinct = list({record.evaluation.fingerprint: record for record in reversed(kept)}.values())[::-1]
    values = means(distinct, criteria)
    return [distinct[i] for i in sorted(range(len(distinct)), key=lambda i: -values[i])]


def reported(records: Sequence[Record], criteria: Criteria) -> list[Candidate]:
    """The candidates that get selection and held-out scores: the essential controls, the best of every other kind, and
    the best of the front."""
    chosen = [record for record in records if family(record.candidate) in ESSENTIAL]
    for name in dict.fromkeys(family(record.candidate) for record in records):
        best = best_of([record for record in records if family(record.candidate) == name], criteria)
        chosen += [best] if best is not None else []
    chosen += front_of(records, criteria)[:HELDOUT_FRONT]
    by_id = {record.candidate.id: record.candidate for record in chosen if not record.evaluation.failed}
    return sorted(by_id.values(), key=place)
