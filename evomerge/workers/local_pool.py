"""A pool of one worker in this process: no Ray, no other process; for small searches, tests and scoring by hand."""

from collections import deque
from collections.abc import Callable

from evomerge.candidate import Evaluation
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.events import Listener, unheard
from evomerge.workers import Evaluator, Job, evaluate_guarded


def make(_config: SearchConfig, make_worker: Callable[[], Evaluator], address: str | None) -> "LocalPool":
    """The pool that a config asks for. Raises InputError where an address asks for a cluster as well.

    Ray's own RAY_ADDRESS does not count: Ray sets it for every job, and a job may hold a search of one worker.
    """
    if address:
        raise InputError(
            f"--address {address}: workers.pool is local, so this process evaluates and no cluster is used; leave "
            "--address out, or let Ray's workers evaluate (--workers N, or --set workers.pool=ray)."
        )
    return LocalPool(make_worker)


class LocalPool:
    """Evaluates jobs one after the other when they are waited for."""

    def __init__(self, make_worker: Callable[[], Evaluator]) -> None:
        self._worker = make_worker()
        self._jobs: deque[Job] = deque()
        self.listener: Listener = unheard

    @property
    def size(self) -> int:
        return 1

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> tuple[Job, Evaluation]:
        job = self._jobs.popleft()
        return job, evaluate_guarded(self._worker, job.candidate.recipe, job.split, job.subset)

    def close(self) -> None:
        self._jobs.clear()
