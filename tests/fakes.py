"""Stand-ins without models: a pool that scores genomes by a formula and finishes jobs in any order, and a worker."""

import inspect
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from evomerge.candidate import Evaluation, Subset, failure
from evomerge.config.base import Split
from evomerge.errors import WorkerPoisoned
from evomerge.events import Listener, unheard
from evomerge.recipe import Recipe
from evomerge.workers import Job

Scorer = Callable[..., Sequence[float] | str]  # of a candidate, or of a candidate and a split


class Killed(BaseException):
    """What a test's kill raises: no handler of the search may swallow it."""


class FakePool:
    """Finishes a random one of the jobs that could be running; counts every evaluation; can die after some of them."""

    def __init__(
        self,
        names: Sequence[str],
        scorer: Scorer,
        size: int = 1,
        seed: int = 0,
        dies_after: int | None = None,
        order: Sequence[str] = (),
    ) -> None:
        """order: ids of candidates that finish one after the other, before chance decides."""
        self._names, self._scorer, self._size, self._order = names, scorer, size, deque(order)
        self._random = np.random.default_rng(seed)
        self._jobs: list[Job] = []
        self.listener: Listener = unheard
        self._dies_after = dies_after
        self.evaluated: list[tuple[str, Split]] = []

    @property
    def size(self) -> int:
        return self._size

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> tuple[Job, Evaluation]:
        if self._dies_after is not None and len(self.evaluated) >= self._dies_after:
            raise Killed
        job = self._jobs.pop(self._next())
        self.evaluated.append((job.candidate.id, job.split))
        takes_split = len(inspect.signature(self._scorer).parameters) > 1
        result = self._scorer(job.candidate, job.split) if takes_split else self._scorer(job.candidate)
        if isinstance(result, str):
            return job, failure(result)
        scores = dict(zip(self._names, result, strict=True))
        return job, Evaluation(scores=scores, items=10, fingerprint=job.candidate.recipe.content_id())

    def _next(self) -> int:
        ids = [job.candidate.id for job in self._jobs]
        if self._order and self._order[0] in ids:
            return ids.index(self._order.popleft())
        return int(self._random.integers(min(self._size, len(self._jobs))))

    def close(self) -> None:
        self._jobs.clear()


class FakeWorker:
    """A worker that obeys the weight of a recipe's first model: negative raises, 2 kills the process, 3 hangs, 4 leaves
    a worker that is good for nothing, 5 makes a result of 150 MiB."""

    def evaluate(self, recipe: Recipe, split: Split, subset: Subset | None = None) -> Evaluation:
        assert recipe.models is not None
        weight = recipe.models[0].parameters["weight"]
        assert isinstance(weight, float)
        if weight < 0:
            raise RuntimeError("a bug in the worker")
        if weight == 2:
            os._exit(1)
        if weight == 3:
            time.sleep(600)
        if weight == 4:
            raise WorkerPoisoned("the GPU computes nothing any more")
        fingerprint = split if weight != 5 else "x" * (150 * 2**20)
        return Evaluation(scores={"score": weight}, items=1, fingerprint=fingerprint)


def make_fake_worker() -> FakeWorker:
    return FakeWorker()


class WorkerThatNamesItsGpus:
    """Gives the GPUs that torch would see as its fingerprint."""

    def evaluate(self, recipe: Recipe, split: Split, subset: Subset | None = None) -> Evaluation:
        return Evaluation(scores={"score": 0.0}, items=1, fingerprint=os.environ["CUDA_VISIBLE_DEVICES"])


def make_worker_that_names_its_gpus() -> WorkerThatNamesItsGpus:
    return WorkerThatNamesItsGpus()
