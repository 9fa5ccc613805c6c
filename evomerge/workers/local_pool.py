"""A pool of one worker in this process: no Ray, no other process; for small searches, tests and scoring by hand."""

from collections import deque
from collections.abc import Callable

from evomerge.candidate import Evaluation
from evomerge.workers import Job
from evomerge.workers.worker import Worker


class LocalPool:
    """Evaluates jobs one after the other when they are waited for."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._worker = make_worker()
        self._jobs: deque[Job] = deque()

    @property
    def size(self) -> int:
        return 1

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> tuple[Job, Evaluation]:
        job = self._jobs.popleft()
        return job, self._worker.evaluate(job.candidate.recipe, job.split)

    def close(self) -> None:
        self._jobs.clear()
