"""The asynchronous schedule: the optimizer is told each evaluation as it arrives, and no worker waits for another.

The proposals then depend on which candidate finishes first, and so on the number of workers and on chance. The archive
makes them repeatable: it holds the `Arrival` of each evaluation, and a resumed search goes through the same asks and
tells again. So an archive depends on its config and on the recorded order, and on nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from evomerge.archive.archive import Arrival, Record
from evomerge.candidate import Candidate, Evaluation
from evomerge.config.search import SearchConfig
from evomerge.errors import WorkFailed
from evomerge.optimizers.base import Optimizer
from evomerge.optimizers.make import passes_for_rows
from evomerge.optimizers.pareto import ScoreArray
from evomerge.search.generations import NOTHING_LEFT, propose
from evomerge.spaces import SearchSpace
from evomerge.workers import Job


@dataclass
class AsyncSchedule:
    """A schedule that asks the optimizer whenever a worker has nothing to do, until the budget is spent.

    See `Schedule`.

    optimizer: proposes genomes.
    space: decodes them.
    config: the search's.
    told: turns evaluations into the scores that the optimizer is told, shape (n, objectives + limits).
    """

    optimizer: Optimizer
    space: SearchSpace
    config: SearchConfig
    told: Callable[[Sequence[Evaluation]], ScoreArray]
    _asked: int = field(init=False, default=0)
    _arrived: int = field(init=False, default=0)
    _created: int = field(init=False, default=0)
    _exhausted: bool = field(init=False, default=False)
    _queue: dict[str, tuple[int, Candidate]] = field(init=False, default_factory=dict)

    def next(self) -> Job | None:
        """The next job, for which the optimizer is asked if need be; None once the budget is spent."""
        while not self._queue and self._created < self._budget and not self._exhausted:
            self._ask()
        identity = next(iter(self._queue), None)
        if identity is None or self._queue[identity][0] >= self._budget:
            return None
        return Job(self._queue.pop(identity)[1], "search")

    @property
    def _budget(self) -> int:
        """How many candidates the budget has room for."""
        return self.config.budget - math.ceil(passes_for_rows(self.config))

    def _ask(self) -> None:
        genomes = self.optimizer.ask()
        self._exhausted = len(genomes) == 0
        for index, genome in enumerate(genomes):
            candidate = propose(self.space, genome, self._asked, index)
            self._queue[candidate.id] = (self._created + index, candidate)
        self._created += len(genomes)
        self._asked += 1

    @property
    def early(self) -> str:
        """Why it has ended before its budget was spent; empty where it has not."""
        return NOTHING_LEFT if self._exhausted and self._created < self._budget else ""

    def arrival(self) -> Arrival:
        """The number of the next evaluation to arrive, and how many asks came before it."""
        return Arrival(self._arrived, self._asked)

    def receive(self, job: Job, evaluation: Evaluation) -> None:
        """Tells the optimizer the evaluation of a job at once."""
        self.optimizer.tell(np.array(job.candidate.genome)[np.newaxis], self.told([evaluation]))
        self._arrived += 1

    def replayed(self, record: Record) -> Job:
        """The job of a recorded arrival, after the same asks as in the recorded search.

        record: the next arrival of the archive.
        Raises WorkFailed where the optimizer does not propose its candidate.
        """
        assert record.arrival is not None
        while self._asked < record.arrival.asked and not self._exhausted:
            self._ask()
        identity = record.candidate.id
        if record.arrival.number != self._arrived or identity not in self._queue:
            raise WorkFailed(
                f"candidate {identity} is recorded as arrival {record.arrival.number}, which the search does not come "
                "to again; restore the archive from a copy."
            )
        return Job(self._queue.pop(identity)[1], "search")
