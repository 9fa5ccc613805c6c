"""Stand-ins without models: a pool that scores genomes by a formula and finishes jobs in any order, and a worker."""

import inspect
import os
from collections.abc import Callable, Sequence

import numpy as np

from evomerge.candidate import Evaluation, Split, failure
from evomerge.recipe import Recipe
from evomerge.workers import Job

Scorer = Callable[..., Sequence[float] | str]  # of a candidate, or of a candidate and a split


class Killed(BaseException):
    """What a test's kill raises: no handler of the search may swallow it."""


class FakePool:
    """Finishes a random one of the jobs that could be running; counts every evaluation; can die after some of them."""

    def __init__(
        self, names: Sequence[str], scorer: Scorer, size: int = 1, seed: int = 0, dies_after: int | None = None
    ) -> None:
        self._names, self._scorer, self._size = names, scorer, size
        self._random = np.random.default_rng(seed)
        self._jobs: list[Job] = []
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
        job = self._jobs.pop(self._random.integers(min(self._size, len(self._jobs))))
        self.evaluated.append((job.candidate.id, job.split))
        takes_split = len(inspect.signature(self._scorer).parameters) > 1
        result = self._scorer(job.candidate, job.split) if takes_split else self._scorer(job.candidate)
        if isinstance(result, str):
            return job, failure(result)
        scores = dict(zip(self._names, result, strict=True))
        return job, Evaluation(scores=scores, items=10, fingerprint=job.candidate.recipe.content_id())

    def close(self) -> None:
        self._jobs.clear()


class FakeWorker:
    """A worker that obeys the weight of a recipe's first model: negative raises, above 1 kills the process."""

    def evaluate(self, recipe: Recipe, split: Split) -> Evaluation:
        assert recipe.models is not None
        weight = recipe.models[0].parameters["weight"]
        assert isinstance(weight, float)
        if weight < 0:
            raise RuntimeError("a bug in the worker")
        if weight > 1:
            os._exit(1)
        return Evaluation(scores={"score": weight}, items=1, fingerprint=split)


def make_fake_worker() -> FakeWorker:
    return FakeWorker()
