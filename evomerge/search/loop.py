"""The search loop: controls first, then ask, dispatch, record and tell, and held-out scores at the end.

Resuming needs no code of its own. The loop runs from the start, and a candidate that the archive already holds gets its
evaluation from there, once its genome has been compared.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from evomerge.archive.archive import Archive, Arrival, Record, steering
from evomerge.archive.gradients import GradientRecord, digest_of
from evomerge.candidate import Candidate, Evaluation
from evomerge.config.base import Split
from evomerge.config.search import SearchConfig
from evomerge.errors import WorkFailed
from evomerge.events import Evaluated, Finished, Listener, SearchStarts, Warned
from evomerge.optimizers.base import Problem
from evomerge.optimizers.make import make_optimizer, passes_for_rows
from evomerge.optimizers.ranking import Ranking
from evomerge.search.asynchronous import AsyncSchedule
from evomerge.search.controls import (
    essential_controls,
    further_controls,
    start_of_weights,
    start_weights,
)
from evomerge.search.criteria import Criteria, check_limits
from evomerge.search.generations import Generations
from evomerge.search.learning import Learning, loss_limits, sources_of
from evomerge.search.results import Results
from evomerge.search.subsets import Subsets
from evomerge.search.watching import Watch
from evomerge.spaces import SearchSpace
from evomerge.versions import versions
from evomerge.workers import Job, Result, WorkerPool
from evomerge.workers.sharing import Sharing


def _without_difference(controls: Sequence[Evaluation], config: SearchConfig) -> Iterator[str]:
    """A sentence for each metric on which all controls score the same, so that it may tell no candidates apart."""
    all_scores = [evaluation.scores for evaluation in controls if evaluation.scores is not None]
    for metric in config.measured:
        values = {scores[metric.name] for scores in all_scores}
        if metric.cost is None and len(values) == 1 and len(all_scores) > 1:
            yield (
                f"{metric.name}: base, parents and uniform merge all score {values.pop():.3f}; look at what the task "
                "asks and how it is answered, since a search on it may tell no candidates apart."
            )


class Schedule(Protocol):
    """A source of jobs, which receives the evaluation of every job that it has handed out."""

    def next(self) -> Job | None:
        """The next job, or None while there is none to hand out."""
        ...

    def arrival(self) -> Arrival | None:
        """What is recorded with the next evaluation that arrives; None where the order of arrival does not count."""
        ...

    def receive(self, job: Job, evaluation: Evaluation) -> None:
        """Takes the evaluation of a job that it has handed out."""
        ...


class Proposals(Schedule, Protocol):
    """The schedule of an optimizer."""

    @property
    def early(self) -> str:
        """Why it has ended before its budget was spent; empty where it has not."""
        ...


@runtime_checkable
class FollowsGradients(Protocol):
    """A schedule whose jobs may ask for gradients."""

    def record(self, job: Job, result: Result) -> GradientRecord:
        """What the archive keeps of a job's result."""
        ...

    def receive_gradient(self, record: GradientRecord) -> None:
        """Takes what the archive keeps of a job that it has handed out."""
        ...


class InTurn:
    """Steps along gradients first, then the schedule that starts where they end. See `Schedule`."""

    def __init__(self, learning: Learning, then: Callable[[Learning], Proposals | None]) -> None:
        """learning: the steps.
        then: makes the schedule that follows, once the steps are over; None where none follows.
        """
        self._learning = learning
        self._make: Callable[[Learning], Proposals | None] | None = then
        self._then: Proposals | None = None

    def next(self) -> Job | None:
        """The next job of the schedule whose turn it is."""
        if not self._learning.finished:
            return self._learning.next()
        if self._make is not None:
            self._then, self._make = self._make(self._learning), None
        return self._then.next() if self._then is not None else None

    def arrival(self) -> Arrival | None:
        """None: where gradients are followed, the order of arrival does not count."""
        return None

    def receive(self, job: Job, evaluation: Evaluation) -> None:
        """Hands an evaluation to the schedule that asked for it."""
        if self._then is None:
            self._learning.receive(job, evaluation)
        else:
            self._then.receive(job, evaluation)

    def record(self, job: Job, result: Result) -> GradientRecord:
        """See `FollowsGradients`."""
        return self._learning.record(job, result)

    def receive_gradient(self, record: GradientRecord) -> None:
        """See `FollowsGradients`."""
        self._learning.receive_gradient(record)

    @property
    def early(self) -> str:
        """See `Proposals`."""
        return self._learning.early if self._then is None else self._then.early


class FixedList:
    """A schedule that hands out given candidates on one split. See `Schedule`."""

    def __init__(self, candidates: Sequence[Candidate], split: Split = "search") -> None:
        """candidates: in the order in which their jobs are handed out.
        split: the split that they are scored on.
        """
        self._candidates = candidates
        self._queue = deque(Job(candidate, split) for candidate in candidates)
        self._received: dict[str, Evaluation] = {}

    def next(self) -> Job | None:
        """The job of the next candidate; None after the last."""
        return self._queue.popleft() if self._queue else None

    def arrival(self) -> None:
        """None, since the order of arrival does not count."""

    def receive(self, job: Job, evaluation: Evaluation) -> None:
        """Keeps the evaluation of a job."""
        self._received[job.candidate.id] = evaluation

    @property
    def candidates(self) -> Sequence[Candidate]:
        """Its candidates, in order."""
        return self._candidates

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """The evaluations by id, in the order of the candidates, whichever finished first."""
        return {candidate.id: self._received[candidate.id] for candidate in self._candidates}


@dataclass
class Search:
    """A search, run by a pool of workers and recorded in an archive.

    config: the search's, resolved.
    space: what genomes are decoded by.
    archive: where evaluations are recorded.
    pool: the workers.
    listener: is told what happens.
    names: the names of the tensors of a merge.
    """

    config: SearchConfig
    space: SearchSpace
    archive: Archive
    pool: WorkerPool
    listener: Listener
    names: Sequence[str] = ()

    def run(self) -> None:
        """Runs the search until its budget is spent. Where it was interrupted, it goes on from the archive.

        Raises WorkFailed where no control could be evaluated, where a constraint has no parent to compare with, and
        where the archive does not fit the search.
        """
        self.pool.listener = self.archive.listener = self.listener
        quantized = self.config.evaluation.quantize is not None
        essential = FixedList(essential_controls(self.config))
        self._drain([essential], quantized)
        further = FixedList(further_controls(self.config, self.space))
        proposals = self._proposals(essential)
        self._drain([proposals, further], quantized)
        self._drain([FixedList(self._results.finalists())])
        chosen = self._results.reported()
        for split in self.config.splits[1:]:
            self._drain([FixedList(chosen, split)])
        self.archive.record_end(self.config.limit, proposals.early)
        self.listener(Finished(len(self.archive.records())))

    def score(self, candidates: Sequence[Candidate], split: Split) -> None:
        """Scores given candidates on a split, unquantized, but for those that the archive holds already.

        candidates: in the order in which they are handed out.
        split: the split.
        Raises WorkFailed where the archive holds another candidate by the same id.
        """
        self.pool.listener = self.archive.listener = self.listener
        self._drain([FixedList(candidates, split)])

    @cached_property
    def _workers(self) -> Sharing:
        """The pool, whose workers share what is left of a candidate."""
        shards = self.config.workers.shards
        return Sharing(self.pool, 1 if shards == "auto" else shards)  # a config from before shards has auto

    @property
    def _results(self) -> Results:
        return Results(self.archive, self.config)

    def _proposals(self, essential: FixedList) -> Proposals:
        """The schedule of the optimizer, which starts at the best essential control, or where the config says.

        essential: the essential controls, evaluated.
        """
        criteria = self._results.criteria(steering(self.config))
        scores = criteria.told(list(essential.evaluations.values()))
        ranking = Ranking(criteria.weights, elite=self.config.optimizer.ranking == "elite")
        ranking.observe(scores)
        values = ranking.means(scores)
        if not np.isfinite(values).any():
            first = next(iter(essential.evaluations.values()))
            raise WorkFailed(f"no control could be evaluated, so nothing else can be ({first.error}).")
        check_limits(self.archive, self.config, criteria)
        for warning in _without_difference(list(essential.evaluations.values()), self.config):
            self.listener(Warned(warning))
        leader = list(essential.evaluations)[int(np.argmax(values))]
        start = self.space.encode(start_weights(self.config, leader))
        given = start_of_weights(self.config)
        if given is not None:
            start = self.space.encode(dict.fromkeys(self.config.models, given))
        self.listener(SearchStarts(leader if given is None else f"weights of {given:g}"))
        weights = [start_weights(self.config, control) for control in essential.evaluations]
        merges = np.array([bool(control_weights) for control_weights in weights])  # all but the base
        encoded = [self.space.encode(control_weights) for control_weights in weights if control_weights]
        plain = self.config.rows is None  # controls weigh no rows, so no genome is one of them
        evaluated = (np.stack(encoded), scores[merges]) if encoded and plain else None
        problem = Problem(self.space.genes, start, self.config.seed, ranking, evaluated, self.space.draw)
        if self.config.optimizer.follows_gradients:
            limits = loss_limits(self.config, essential.candidates, list(essential.evaluations.values()))
            sources = sources_of(self.config, essential.candidates, list(essential.evaluations.values()))
            learning = Learning(self.config, self.space, self.names, problem, criteria, limits, self.listener, sources)
            return InTurn(learning, partial(self._evolution, essential, problem, criteria))
        if self.config.optimizer.schedule == "pipelined":
            return self._generations(essential, problem, criteria)
        optimizer = make_optimizer(self.config.optimizer, problem)
        schedule = AsyncSchedule(optimizer, self.space, self.config, criteria.told)
        for record in self.archive.arrivals():
            job = replace(schedule.replayed(record), quantized=record.evaluation.quantize is not None)
            self._check_replay(job, record)
            schedule.receive(job, record.evaluation)
        return schedule

    def _evolution(
        self, essential: FixedList, problem: Problem, criteria: Criteria, learning: Learning
    ) -> Proposals | None:
        """What follows the steps along gradients; None where nothing does."""
        config = self.config.optimizer
        if not config.stages[1:]:
            return None
        after = replace(problem, start=learning.outcome)
        return self._generations(essential, after, criteria, learning)

    def _generations(
        self, essential: FixedList, problem: Problem, criteria: Criteria, learning: Learning | None = None
    ) -> Generations:
        """The generations of the optimizer, from a start.

        essential: the essential controls, evaluated.
        problem: the genes and the start.
        criteria: those of the search items.
        learning: the steps along gradients that went before; None where there were none.
        """
        controls = list(essential.evaluations.values())
        subsets = Subsets(criteria, controls) if self.config.subsets is True else None
        after, watch = self.config.optimizer.stop_after, None
        if after is not None and self.config.items.selection:
            watch = Watch(criteria, after)
            for candidate, evaluation in learning.scored if learning is not None else ():
                watch.learn([candidate], [evaluation], counted=False)
        optimizer = make_optimizer(self.config.optimizer.evolving, problem)
        first, spent = 0, float(math.ceil(passes_for_rows(self.config)))  # so that the last candidate fits whole
        if learning is not None:
            first, spent = learning.candidates, learning.cost
        return Generations(optimizer, self.space, self.config, criteria, subsets, watch, first, spent)

    def _drain(self, schedules: Sequence[Schedule], quantized: bool = False) -> None:
        """Carries out all jobs that the schedules hand out. Jobs of an earlier schedule go first.

        Two jobs per worker and one more are kept in the pool, so that no worker waits for the archive.

        schedules: where jobs come from.
        quantized: whether merges are quantized before they are scored.
        """
        owners: dict[Any, Schedule] = {}
        while True:
            while len(owners) <= 2 * self._workers.size:
                schedule, job = self._next(schedules)
                if job is None or schedule is None:
                    break
                job = replace(job, quantized=quantized)
                if self._replayed(schedule, job):
                    continue
                owners[job.key] = schedule
                self._workers.submit(job)
            if not owners:
                return
            job, result = self._workers.wait()
            self._received(owners.pop(job.key), job, result)

    def _replayed(self, schedule: Schedule, job: Job) -> bool:
        """Whether the archive holds a job's result, which the schedule then receives."""
        if job.descent is not None and isinstance(schedule, FollowsGradients):
            gradient = self.archive.find_gradient(job.descent.step, job.descent.shard)
            if gradient is not None:
                self._check_same(job.candidate.id, "genome", gradient.genome == digest_of(job.candidate.genome or ()))
                schedule.receive_gradient(gradient)
            return gradient is not None
        record = self.archive.find(job.candidate.id, job.study)
        if record is not None:
            self._check_replay(job, record)
            schedule.receive(job, record.evaluation)
        return record is not None

    def _received(self, owner: Schedule, job: Job, result: Result) -> None:
        """Records a job's result, and hands it to the schedule that asked for it."""
        if job.descent is not None:
            assert isinstance(owner, FollowsGradients)
            gradient = owner.record(job, result)
            self.archive.record_gradient(gradient)
            owner.receive_gradient(gradient)
            return
        assert isinstance(result, Evaluation)
        quantize = self.config.evaluation.quantize if job.quantized else None
        evaluation = replace(result, subset=job.subset, quantize=quantize)
        self.archive.record(job.candidate, evaluation, job.study, owner.arrival())
        self.listener(Evaluated(job.candidate, evaluation, job.study))
        owner.receive(job, evaluation)

    def _next(self, schedules: Sequence[Schedule]) -> tuple[Schedule | None, Job | None]:
        for schedule in schedules:
            job = schedule.next()
            if job is not None:
                return schedule, job
        return None, None

    def _check_replay(self, job: Job, record: Record) -> None:
        """Raises WorkFailed where a record of the archive has another genome or another subset than the job."""
        if job.candidate.kind == "search":
            self._check_same(job.candidate.id, "genome", job.candidate.genome == record.candidate.genome)
            self._check_same(job.candidate.id, "subset of items", job.subset == record.evaluation.subset)

    def _check_same(self, identity: str, what: str, same: bool) -> None:
        """Raises WorkFailed where a record is not what the search now comes to."""
        if not same:
            recorded, now = self.archive.recorded_versions(), versions()
            changed = [
                f"{name} {recorded[name]} → {now.get(name)}" for name in recorded if recorded[name] != now.get(name)
            ]
            hint = f"; versions changed: {', '.join(changed)}" if changed else ""
            raise WorkFailed(
                f"candidate {identity} is recorded with another {what} than the search now proposes{hint}; "
                "resume with the versions that recorded it."
            )
