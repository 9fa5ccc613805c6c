"""The search: controls first, then ask, dispatch, tell, record, and held-out scores at the end.

Generations are pipelined: g0..g_lag are asked at once, then tell(g) and ask(g + lag + 1) strictly alternate, so
proposals depend neither on timing nor on the number of workers (`evomerge.asynchronous` gives that up for busier ones).
There is no special code for resuming: the loop runs from the start, and a candidate that the archive already holds is
answered from there, once its genome has been compared.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from evomerge.archive import Archive, Arrival, Record, place, versions
from evomerge.asynchronous import AsyncSchedule, propose
from evomerge.candidate import Candidate, Evaluation, Split
from evomerge.config import ObjectiveConfig, SearchConfig
from evomerge.controls import essential_controls, family, further_controls, start_of_weights, start_weights
from evomerge.errors import WorkFailed
from evomerge.optimizers import Optimizer, Problem, make_optimizer
from evomerge.optimizers.ranking import Ranking, weighted_means
from evomerge.pareto import Scores, front_mask
from evomerge.spaces import Genome, SearchSpace
from evomerge.workers import Job, Listener, WorkerPool

HELDOUT_FRONT = (
    20  # with many objectives a front is long, and each held-out score costs as much as an evaluation or two
)


def score_matrix(evaluations: Sequence[Evaluation], objectives: Sequence[ObjectiveConfig]) -> Scores:
    """Scores turned so that larger is better, shape (n, objectives); NaN for failures and for what costs too much."""
    signs = {objective.name: -1.0 if objective.goal == "minimize" else 1.0 for objective in objectives}
    rows = [
        [np.nan] * len(signs)
        if evaluation.scores is None or _costs_too_much(evaluation.scores, objectives)
        else [sign * evaluation.scores[name] for name, sign in signs.items()]
        for evaluation in evaluations
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(signs))


def _costs_too_much(scores: Mapping[str, float], objectives: Sequence[ObjectiveConfig]) -> bool:
    return any(objective.max is not None and scores[objective.name] > objective.max for objective in objectives)


def objective_weights(objectives: Sequence[ObjectiveConfig]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([objective.weight for objective in objectives])


def means(records: Sequence[Record], objectives: Sequence[ObjectiveConfig]) -> list[float]:
    """The weighted mean score of each record, -inf for failures."""
    matrix = score_matrix([record.evaluation for record in records], objectives)
    return [float(value) for value in weighted_means(matrix, objective_weights(objectives))]


def best_of(records: Sequence[Record], objectives: Sequence[ObjectiveConfig]) -> Record | None:
    """The first record with the highest weighted mean; None where nothing succeeded."""
    ordered = sorted(records, key=lambda record: place(record.candidate))
    values = means(ordered, objectives)
    if not values or max(values) == -np.inf:
        return None
    return ordered[int(np.argmax(values))]


def best_found(records: Sequence[Record], objectives: Sequence[ObjectiveConfig]) -> Record | None:
    """The best search candidate, or the best control while there is none."""
    searched = [record for record in records if record.candidate.kind == "search"]
    return best_of(searched, objectives) or best_of(records, objectives)


def front_of(records: Sequence[Record], objectives: Sequence[ObjectiveConfig]) -> list[Record]:
    """The records that no other dominates, best mean first; of several with the same weights the first found."""
    ordered = sorted(records, key=lambda record: place(record.candidate))
    mask = front_mask(score_matrix([record.evaluation for record in ordered], objectives))
    kept = [record for record, on_front in zip(ordered, mask, strict=True) if on_front]
    distinct = list({record.evaluation.fingerprint: record for record in reversed(kept)}.values())[::-1]
    values = means(distinct, objectives)
    return [distinct[i] for i in sorted(range(len(distinct)), key=lambda i: -values[i])]


def reported(records: Sequence[Record], objectives: Sequence[ObjectiveConfig]) -> list[Candidate]:
    """The candidates that get held-out scores: the essential controls, the best of every other kind, and the best of
    the front."""
    chosen = [record for record in records if family(record.candidate) in ("base", "parent", "uniform")]
    for name in dict.fromkeys(family(record.candidate) for record in records):
        best = best_of([record for record in records if family(record.candidate) == name], objectives)
        chosen += [best] if best is not None else []
    chosen += front_of(records, objectives)[:HELDOUT_FRONT]
    by_id = {record.candidate.id: record.candidate for record in chosen if not record.evaluation.failed}
    return sorted(by_id.values(), key=place)


class Schedule(Protocol):
    """A source of candidates that waits for the evaluations of those it has handed out."""

    def next(self) -> Candidate | None:
        """The next candidate, or None while there is none to hand out."""
        ...

    def arrival(self) -> Arrival | None:
        """What is recorded with the next evaluation that is received, where the order of receiving them counts."""
        ...

    def receive(self, candidate: Candidate, evaluation: Evaluation) -> None: ...


class Batch:
    """A fixed list of candidates."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates, self._queue = candidates, deque(candidates)
        self._received: dict[str, Evaluation] = {}

    def next(self) -> Candidate | None:
        return self._queue.popleft() if self._queue else None

    def arrival(self) -> None:
        return None

    def receive(self, candidate: Candidate, evaluation: Evaluation) -> None:
        self._received[candidate.id] = evaluation

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By candidate, in the order of the list: who finished first must not show."""
        return {candidate.id: self._received[candidate.id] for candidate in self._candidates}


@dataclass
class _Generation:
    genomes: Genome
    evaluations: list[Evaluation | None]

    @property
    def complete(self) -> bool:
        return all(evaluation is not None for evaluation in self.evaluations)


@dataclass
class Generations:
    """The pipelined generations of an optimizer, cut off at the budget."""

    optimizer: Optimizer
    space: SearchSpace
    config: SearchConfig
    _asked: int = field(init=False, default=0)
    _told: int = field(init=False, default=0)
    _created: int = field(init=False, default=0)
    _exhausted: bool = field(init=False, default=False)
    _open: dict[int, _Generation] = field(init=False, default_factory=dict)
    _queue: deque[Candidate] = field(init=False, default_factory=deque)

    def next(self) -> Candidate | None:
        self._advance()
        return self._queue.popleft() if self._queue else None

    def _advance(self) -> None:
        """Asks and tells in their fixed order, as far as what has been received allows; tells only what leads to an
        ask."""
        while self._created < self.config.budget and not self._exhausted:
            if self._asked - self._told <= self.config.optimizer.lag:
                self._ask()
            elif self._open[self._told].complete:
                self._tell()
            else:
                return

    def _ask(self) -> None:
        genomes = self.optimizer.ask()
        self._exhausted = len(genomes) == 0
        left = self.config.budget - self._created
        for index, genome in enumerate(genomes[:left]):
            self._queue.append(propose(self.space, genome, self._asked, index))
        self._open[self._asked] = _Generation(genomes, [None] * len(genomes))
        self._created += min(len(genomes), left)
        self._asked += 1

    def _tell(self) -> None:
        generation = self._open.pop(self._told)
        evaluations = [evaluation for evaluation in generation.evaluations if evaluation is not None]
        self.optimizer.tell(generation.genomes, score_matrix(evaluations, self.config.objectives))
        self._told += 1

    def arrival(self) -> None:
        return None

    def receive(self, candidate: Candidate, evaluation: Evaluation) -> None:
        self._open[candidate.generation].evaluations[candidate.index] = evaluation


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
        self._drain([essential], "search")
        further = Batch(further_controls(self.config, self.space))
        self._drain([self._proposals(essential), further], "search")
        records = self.archive.records()
        self._drain([Batch(reported(records, self.config.objectives))], "heldout")
        self.listener("finished", {"evaluations": len(records)})

    def _proposals(self, essential: Batch) -> Schedule:
        """The optimizer, started at the best essential control (or where the space says)."""
        objectives = self.config.objectives
        scores = score_matrix(list(essential.evaluations.values()), objectives)
        ranking = Ranking(objective_weights(objectives), elite=self.config.optimizer.ranking == "elite")
        ranking.observe(scores)
        values = ranking.means(scores)
        if not np.isfinite(values).any():
            first = next(iter(essential.evaluations.values()))
            raise WorkFailed(f"no control could be evaluated, so nothing else can be ({first.error}).")
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
            return Generations(optimizer, self.space, self.config)
        schedule = AsyncSchedule(
            optimizer, self.space, self.config, lambda evaluations: score_matrix(evaluations, objectives)
        )
        for record in self.archive.arrivals():
            candidate = schedule.replayed(record)
            self._check_replay(candidate, record)
            schedule.receive(candidate, record.evaluation)
        return schedule

    def _drain(self, schedules: Sequence[Schedule], split: Split) -> None:
        """Evaluates all that the schedules hand out, the first ones first. Two jobs per worker and one more are
        kept in the pool, so that no worker waits for the archive."""
        owners: dict[str, Schedule] = {}
        while True:
            while len(owners) <= 2 * self.pool.size:
                schedule, candidate = self._next(schedules)
                if candidate is None or schedule is None:
                    break
                known = self.archive.find(candidate.id, split)
                if known is not None:
                    self._check_replay(candidate, known)
                    schedule.receive(candidate, known.evaluation)
                    continue
                owners[candidate.id] = schedule
                self.pool.submit(Job(candidate, split))
            if not owners:
                return
            job, evaluation = self.pool.wait()
            owner = owners.pop(job.candidate.id)
            self.archive.record(job.candidate, evaluation, split, owner.arrival())
            self.listener("evaluated", {"candidate": job.candidate, "evaluation": evaluation, "split": split})
            owner.receive(job.candidate, evaluation)

    def _next(self, schedules: Sequence[Schedule]) -> tuple[Schedule | None, Candidate | None]:
        for schedule in schedules:
            candidate = schedule.next()
            if candidate is not None:
                return schedule, candidate
        return None, None

    def _check_replay(self, candidate: Candidate, known: Record) -> None:
        """Raises WorkFailed where the archive holds another genome than the optimizer now proposes."""
        if candidate.kind == "search" and candidate.genome != known.candidate.genome:
            recorded, now = self.archive.recorded_versions(), versions()
            changed = [
                f"{name} {recorded[name]} → {now.get(name)}" for name in recorded if recorded[name] != now.get(name)
            ]
            hint = f"; versions changed: {', '.join(changed)}" if changed else ""
            raise WorkFailed(
                f"candidate {candidate.id} is recorded with another genome than the search now proposes{hint}; "
                "resume with the versions that recorded it."
            )
