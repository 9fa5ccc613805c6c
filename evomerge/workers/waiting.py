"""Waiting: the jobs of a pool that no worker has begun, and which of them a worker takes next.

A worker that holds a candidate's merge takes the next shard of that candidate. Only when no such shard is left, it
takes a candidate that no worker holds, in the order of submission. Only when there is none either, it helps with a
candidate that others hold, and has to merge it once more. So there are no more merges than candidates as long as there
are enough candidates.
"""

from collections import Counter, deque
from collections.abc import Iterable

from evomerge.workers import Job


class Waiting:
    """The jobs that no worker has begun."""

    def __init__(self) -> None:
        self._jobs: dict[str, deque[Job]] = {}  # by candidate, in the order of submission
        self._urgent: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._urgent) + sum(map(len, self._jobs.values()))

    def add(self, job: Job) -> None:
        """Takes a job. Joins come before all others, since the search waits for them and they need no merge."""
        if job.parts:
            self._urgent.append(job)
        else:
            self._jobs.setdefault(job.candidate.id, deque()).append(job)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Takes jobs that a worker has not finished; they come before all others."""
        self._urgent.extendleft(reversed(list(jobs)))

    def take(self, holds: str | None, held: Counter[str], helps: bool = True) -> Job | None:
        """The next job for a worker; None where there is none for it.

        holds: the id of the candidate whose merge the worker holds; None where it holds none.
        held: how many workers hold each candidate, by id.
        helps: whether it may take a job of a candidate that only others hold.
        """
        if self._urgent:
            return self._urgent.popleft()
        chosen = holds if holds in self._jobs else next((name for name in self._jobs if not held[name]), None)
        if chosen is None and helps:
            chosen = self._neediest(held)
        return self._pop(chosen) if chosen is not None else None

    def _neediest(self, held: Counter[str]) -> str | None:
        """The candidate with the most jobs left for each of its workers; of several the first."""
        return max(self._jobs, key=lambda name: len(self._jobs[name]) / (1 + held[name]), default=None)

    def _pop(self, name: str) -> Job:
        job = self._jobs[name].popleft()
        if not self._jobs[name]:
            del self._jobs[name]
        return job

    def drop(self, job: Job) -> None:
        """Forgets all shards of a job."""
        self._urgent = deque(other for other in self._urgent if other.whole.key != job.key)
        left = deque(other for other in self._jobs.pop(job.candidate.id, ()) if other.whole.key != job.key)
        if left:
            self._jobs[job.candidate.id] = left

    def clear(self) -> None:
        """Forgets all jobs."""
        self._jobs.clear()
        self._urgent.clear()
