"""The best candidate, the front, and the candidates that get selection and held-out scores."""

from collections.abc import Collection, Sequence

import numpy as np

from evomerge.archive.archive import Record, place
from evomerge.candidate import Candidate, is_learned
from evomerge.optimizers.pareto import front_mask
from evomerge.optimizers.ranking import weighted_means
from evomerge.search.controls import ESSENTIAL, family
from evomerge.search.criteria import Criteria

FINALISTS = 8  # of every family; a score of quantized weights is a little off, so the very best may lie behind others
HELDOUT_FRONT = 20  # candidates: with many objectives a front is long, and held-out scores cost evaluations too


def means(records: Sequence[Record], criteria: Criteria) -> list[float]:
    """The weighted mean of each record's scores or gains; -inf for failures.

    records: the records.
    criteria: those of the records' split.
    """
    return criteria.means([record.evaluation for record in records])


def best_of(records: Sequence[Record], criteria: Criteria) -> Record | None:
    """The record with the highest weighted mean, of several the first; None where no record keeps to the limits.

    records: the records, in any order.
    criteria: those of the records' split.
    """
    ordered = sorted(records, key=lambda record: place(record.candidate))
    scores = criteria.eligible([record.evaluation for record in ordered])
    values = weighted_means(scores, criteria.weights)
    if not values.size or values.max() == -np.inf:
        return None
    return ordered[int(np.argmax(values))]


def best_searched(records: Sequence[Record], criteria: Criteria) -> Record | None:
    """The record of the best search candidate, or while there is none that of the best control.

    None where no record keeps to the limits.

    records: the records, in any order.
    criteria: those of the records' split.
    """
    searched = [record for record in records if record.candidate.kind == "search"]
    return best_of(searched, criteria) or best_of(records, criteria)


def front_of(records: Sequence[Record], criteria: Criteria) -> list[Record]:
    """The Pareto front: the records that keep to the limits and that no other such record dominates, best mean first.

    Of several candidates with the same weights, the front has only the first.

    records: the records, in any order.
    criteria: those of the records' split.
    """
    ordered = sorted(records, key=lambda record: place(record.candidate))
    mask = front_mask(criteria.eligible([record.evaluation for record in ordered]))
    kept = [record for record, on_front in zip(ordered, mask, strict=True) if on_front]
    first: dict[str | None, Record] = {}
    for record in kept:
        first.setdefault(record.evaluation.fingerprint, record)
    distinct = list(first.values())
    values = means(distinct, criteria)
    return [distinct[i] for i in sorted(range(len(distinct)), key=lambda i: -values[i])]


def finalists(records: Sequence[Record], criteria: Criteria) -> list[Candidate]:
    """The candidates that are scored again unquantized, in the order of the search.

    These are the essential controls, the best of every family, as many of the search's as of any controls, and the best
    of the front.

    records: the records of quantized candidates on all search items.
    criteria: those of these records.
    """
    chosen = [record for record in records if family(record.candidate) in ESSENTIAL]
    for name in dict.fromkeys(family(record.candidate) for record in records):
        rivals = [record for record in records if family(record.candidate) == name]
        while rivals and sum(family(record.candidate) == name for record in chosen) < FINALISTS:
            best = best_of(rivals, criteria)
            if best is None:
                break
            chosen.append(best)
            rivals = [record for record in rivals if record.evaluation.fingerprint != best.evaluation.fingerprint]
    chosen += front_of(records, criteria)[:HELDOUT_FRONT]
    by_id = {record.candidate.id: record.candidate for record in chosen if not record.evaluation.failed}
    return sorted(by_id.values(), key=place)


def reported(records: Sequence[Record], criteria: Criteria, watched: Collection[str] = ()) -> list[Candidate]:
    """The candidates that get selection and held-out scores, in the order of the search.

    These are the essential controls, the best candidate of every family, the best of those that gradients have led to,
    and the best of the front.

    records: the records on all search items.
    criteria: those of the search items.
    watched: the ids of further candidates.
    """
    chosen = [record for record in records if family(record.candidate) in ESSENTIAL]
    for name in dict.fromkeys(family(record.candidate) for record in records):
        best = best_of([record for record in records if family(record.candidate) == name], criteria)
        chosen += [best] if best is not None else []
    learned = best_of([record for record in records if is_learned(record.candidate)], criteria)
    chosen += [learned] if learned is not None else []
    chosen += [record for record in records if record.candidate.id in watched and record.candidate.kind == "search"]
    chosen += front_of(records, criteria)[:HELDOUT_FRONT]
    by_id = {record.candidate.id: record.candidate for record in chosen if not record.evaluation.failed}
    return sorted(by_id.values(), key=place)
