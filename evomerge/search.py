"""The search: controls first, then ask, dispatch, tell, record, and held-out scores at the end.

There is no special code for resuming: the loop runs from the start, and a candidate that the archive already holds is
answered from there, once its genome has been compared.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from evomerge.archive import Archive, Arrival, Record, place, versions
from evomerge.asynchronous import AsyncSchedule
from evomerge.candidate import Candidate, Evaluation, Split, Study
from evomerge.config import SearchConfig
from evomerge.controls import (
    ESSENTIAL,
    essential_controls,
    family,
    further_controls,
    start_of_weights,
    start_weights,
)
from evomerge.criteria import Criteria, check_limits, criteria_of
from evomerge.errors import WorkFailed
from evomerge.generations import Generations
from evomerge.optimizers.base import Problem
from evomerge.optimizers.make import make_optimizer
from evomerge.optimizers.ranking import Ranking, weighted_means
from evomerge.pareto import front_mask
from evomerge.spaces import SearchSpace
from evomerge.subsets import Subsets
from evomerge.workers import Job, Listener, WorkerPool

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


def _without_difference(controls: Sequence[Evaluation], config: SearchConfig) -> Iterator[str]:
    """A sentence for each metric on which all controls score the same: a search cannot tell candidates apart by it."""
    known = [evaluation.scores for evaluation in controls if evaluation.scores is not None]
    for metric in config.measured:
        found = {scores[metric.name] for scores in known}
        if metric.cost is None and len(found) == 1 and len(known) > 1:
            yield (
                f"{metric.name}: base, parents and uniform merge all score {found.pop():.3f}; look at what the task "
                "asks and how it is answered, since a search on it may tell no candidates apart."
            )


class Schedule(Protocol):
    """A source of jobs that waits for the evaluations of those it has handed out."""

    def next(self) -> Job | None:
        """The next job, or None while there is none to hand out."""
        ...

    def arrival(self) -> Arrival | None:
        """What is recorded with the next evaluation that is received, where the order of receiving them counts."""
        ...

    def receive(self, job: Job, evaluation: Evaluation) -> None: ...


class Batch:
    """A fixed list of candidates, on one split."""

    def __init__(self, candidates: Sequence[Candidate], split: Split = "search") -> None:
        self._candidates = candidates
        self._queue = deque(Job(candidate, split) for candidate in candidates)
        self._received: dict[str, Evaluation] = {}

    def next(self) -> Job | None:
        return self._queue.popleft() if self._queue else None

    def arrival(self) -> None:
        return None

    def receive(self, job: Job, evaluation: Evaluation) -> None:
        self._received[job.candidate.id] = evaluation

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By candidate, in the order of the list: who finished first must not show."""
        return {candidate.id: self._received[candidate.id] for candidate in self._candidates}


@dataclass
class Search:
    """One search over a pool of workers, recorded in an archive."""

    config: SearchConfig
    space: SearchSpace
    archive: Archive
    pool: WorkerPool
    listener: Listener

    def run(self) -> None:
        """Runs or resumes to the end of the budget. Interrupted anywhere, it goes on from the archive."""
        self.pool.listener = self.archive.listener = self.listener
        essential = Batch(essential_controls(self.config))
        self._drain([essential])
        further = Batch(further_controls(self.config, self.space))
        self._drain([self._proposals(essential), further])
        records = self.archive.records()
        chosen = reported(records, criteria_of(self.archive, self.config))
        for split in self.config.splits[1:]:
            self._drain([Batch(chosen, split)])
        self.listener("finished", {"evaluations": len(records)})

    def _proposals(self, essential: Batch) -> Schedule:
        """The optimizer, started at the best essential control (or where the space says)."""
        criteria = criteria_of(self.archive, self.config)
        scores = criteria.told(list(essential.evaluations.values()))
        ranking = Ranking(criteria.weights, elite=self.config.optimizer.ranking == "elite")
        ranking.observe(scores)
        values = ranking.means(scores)
        if not np.isfinite(values).any():
            first = next(iter(essential.evaluations.values()))
            raise WorkFailed(f"no control could be evaluated, so nothing else can be ({first.error}).")
        check_limits(self.archive, self.config, criteria)
        for warning in _without_difference(list(essential.evaluations.values()), self.config):
            self.listener("warning", {"message": warning})
        leader = list(essential.evaluations)[int(np.argmax(values))]
        start = self.space.encode(start_weights(self.config, leader))
        given = start_of_weights(self.config)
        if given is not None:
            start = self.space.encode(dict.fromkeys(self.config.models, given))
        self.listener("start", {"control": leader})
        weights = [start_weights(self.config, control) for control in essential.evaluations]
        merges = np.array([bool(each) for each in weights])  # all but the base
        encoded = [self.space.encode(each) for each in weights if each]
        known = (np.stack(encoded), scores[merges]) if encoded else None
        problem = Problem(self.space.genes, start, self.config.seed, ranking, known, self.space.draw)
        optimizer = make_optimizer(self.config.optimizer, problem)
        if self.config.optimizer.schedule == "pipelined":
            subsets = Subsets(criteria, list(essential.evaluations.values())) if self.config.subsets is True else None
            return Generations(optimizer, self.space, self.config, criteria, subsets)
        schedule = AsyncSchedule(optimizer, self.space, self.config, criteria.told)
        for record in self.archive.arrivals():
            job = schedule.replayed(record)
            self._check_replay(job, record)
            schedule.receive(job, record.evaluation)
        return schedule

    def _drain(self, schedules: Sequence[Schedule]) -> None:
        """Evaluates all that the schedules hand out, the first ones first. Two jobs per worker and one more are
        kept in the pool, so that no worker waits for the archive."""
        owners: dict[tuple[str, Study], Schedule] = {}
        while True:
            while len(owners) <= 2 * self.pool.size:
                schedule, job = self._next(schedules)
                if job is None or schedule is None:
                    break
                known = self.archive.find(job.candidate.id, job.study)
                if known is not None:
                    self._check_replay(job, known)
                    schedule.receive(job, known.evaluation)
                    continue
                owners[job.candidate.id, job.study] = schedule
                self.pool.submit(job)
            if not owners:
                return
            job, evaluation = self.pool.wait()
            evaluation = replace(evaluation, subset=job.subset)
            owner = owners.pop((job.candidate.id, job.study))
            self.archive.record(job.candidate, evaluation, job.study, owner.arrival())
            self.listener("evaluated", {"candidate": job.candidate, "evaluation": evaluation, "split": job.study})
            owner.receive(job, evaluation)

    def _next(self, schedules: Sequence[Schedule]) -> tuple[Schedule | None, Job | None]:
        for schedule in schedules:
            job = schedule.next()
            if job is not None:
                return schedule, job
        return None, None

    def _check_replay(self, job: Job, known: Record) -> None:
        """Raises WorkFailed where the archive holds another genome than the optimizer now proposes, or its scores on
        another subset."""
        candidate = job.candidate
        same = candidate.genome == known.candidate.genome and job.subset == known.evaluation.subset
        if candidate.kind == "search" and not same:
            recorded, now = self.archive.recorded_versions(), versions()
            changed = [
                f"{name} {recorded[name]} → {now.get(name)}" for name in recorded if recorded[name] != now.get(name)
            ]
            hint = f"; versions changed: {', '.join(changed)}" if changed else ""
            what = "genome" if candidate.genome != known.candidate.genome else "subset of items"
            raise WorkFailed(
                f"candidate {candidate.id} is recorded with another {what} than the search now proposes{hint}; "
                "resume with the versions that recorded it."
            )
