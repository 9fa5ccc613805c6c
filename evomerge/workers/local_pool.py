"""A pool with one worker in this process, without Ray: for small searches, tests and scoring by hand."""

from collections import Counter
from collections.abc import Callable

from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.events import Listener, unheard
from evomerge.workers import Evaluator, Job, Result, run_guarded
from evomerge.workers.waiting import Waiting


def make(_config: SearchConfig, make_worker: Callable[[], Evaluator], address: str | None) -> "LocalPool":
    """A pool with one worker.

    make_worker: makes the worker.
    address: a cluster's; it must be empty. RAY_ADDRESS may be set, since Ray sets it for every job, and a job may be a
        search with one worker.
    Raises InputError where an address is given.
    """
    if address:
        raise InputError(
            f"--address {address}: workers.pool is local, so this process evaluates and no cluster is used; leave "
            "--address out, or let Ray's workers evaluate (--workers N, or --set workers.pool=ray)."
        )
    return LocalPool(make_worker)


class LocalPool:
    """A pool that evaluates its jobs one after the other, each when `wait` is called. See `WorkerPool`."""

    def __init__(self, make_worker: Callable[[], Evaluator]) -> None:
        """make_worker: makes the worker; it is called once, here."""
        self._worker = make_worker()
        self._jobs = Waiting()
        self._holds: str | None = None
        self.listener: Listener = unheard

    @property
    def size(self) -> int:
        """1, since its jobs run one after the other."""
        return 1

    def submit(self, job: Job) -> None:
        """Takes a job, which runs in a later call of `wait`."""
        self._jobs.add(job)

    def drop(self, job: Job) -> None:
        """Forgets all shards of a job that have not run."""
        self._jobs.drop(job)

    def wait(self) -> tuple[Job, Result]:
        """The next job, and its result, which is made here."""
        job = self._jobs.take(self._holds, Counter())
        assert job is not None, "there is no job to wait for"
        self._holds = self._holds if job.parts else job.candidate.id
        return job, run_guarded(self._worker, job)

    def close(self) -> None:
        """Drops all jobs that have not run."""
        self._jobs.clear()
