"""Stand-ins without models: a pool that scores genomes by a formula and finishes jobs in any order, and a worker."""

import inspect
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import sin

import numpy as np

from evomerge.candidate import Candidate, Descent, Evaluation, Gradient, Part, Shard, Subset, failure
from evomerge.config.base import Split
from evomerge.errors import WorkerPoisoned
from evomerge.events import Listener, unheard
from evomerge.merging.plan import make_plan
from evomerge.recipe import Recipe
from evomerge.workers import Job, Result

Scorer = Callable[..., Sequence[float] | str]  # of a candidate, or of a candidate and a split
Follower = Callable[[Candidate, Descent], Gradient | str]


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
        follower: Follower | None = None,
        fails_at: int = 0,
    ) -> None:
        """order: ids of candidates that finish one after the other, before chance decides.
        follower: answers jobs that ask for gradients.
        fails_at: the shard in which a candidate fails, if it does.
        """
        self._fails_at = fails_at
        self._follower = follower
        self._names, self._scorer, self._size, self._order = names, scorer, size, deque(order)
        self._random = np.random.default_rng(seed)
        self._jobs: list[Job] = []
        self.listener: Listener = unheard
        self._dies_after = dies_after
        self.evaluated: list[tuple[str, str]] = []  # ids with their splits, or with the shards of gradients

    @property
    def size(self) -> int:
        return self._size

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> tuple[Job, Result]:
        if self._dies_after is not None and len(self.evaluated) >= self._dies_after:
            raise Killed
        job = self._jobs.pop(self._next())
        if job.descent is not None:
            return job, self._followed(job.candidate, job.descent)
        what = job.split if job.shard is None else f"{job.study}, shard {job.shard.number}"
        self.evaluated.append((job.candidate.id, what))
        if job.shard is not None and job.shard.number != self._fails_at:
            return job, Part(job.shard, None)
        assert [part.shard.number for part in job.parts] == list(range(len(job.parts)))
        takes_split = len(inspect.signature(self._scorer).parameters) > 1
        result = self._scorer(job.candidate, job.split) if takes_split else self._scorer(job.candidate)
        if isinstance(result, str):
            return job, failure(result)
        if job.shard is not None:
            return job, Part(job.shard, None)
        scores = dict(zip(self._names, result, strict=True))
        return job, Evaluation(scores=scores, items=10, fingerprint=job.candidate.recipe.content_id())

    def drop(self, job: Job) -> None:
        self._jobs = [other for other in self._jobs if other.whole.key != job.key]

    def _followed(self, candidate: Candidate, descent: Descent) -> Result:
        self.evaluated.append((candidate.id, f"shard {descent.shard} of step {descent.step}"))
        assert self._follower is not None, "nobody expected gradients"
        gradient = self._follower(candidate, descent)
        return failure(gradient) if isinstance(gradient, str) else gradient

    def _next(self) -> int:
        ids = [job.candidate.id for job in self._jobs]
        if self._order and self._order[0] in ids:
            return ids.index(self._order.popleft())
        return int(self._random.integers(min(self._size, len(self._jobs))))

    def close(self) -> None:
        self._jobs.clear()


class Quadratics:
    """Losses of a merge by its weights: for each metric, the mean over tensors and models of the squared distance from
    the weights that the metric wants, which differ a little between mini-batches. A shard has some of the tensors."""

    def __init__(self, names: Sequence[str], wanted: Mapping[str, Mapping[str, float]], noise: float = 0.0) -> None:
        """names: the tensors.
        wanted: for each metric, the weights that it wants, by the references of models.
        noise: by how much these vary from step to step.
        """
        self._names, self._wanted, self._noise = names, wanted, noise

    def __call__(self, candidate: Candidate, descent: Descent) -> Gradient:
        weights = {
            (merge.name, model): own.get("weight", 1.0)
            for merge in make_plan(candidate.recipe, self._names).tensors
            for model, own in zip(merge.models, merge.per_model, strict=True)
        }
        losses = dict.fromkeys(descent.weights_by_name, 0.0)
        slopes: dict[tuple[str, str | None, str], float] = {}
        for name, factor in descent.weights:
            for tensor in self._names[descent.shard :: descent.shards]:
                for model, best in self._wanted[name].items():
                    noise = self._noise * sin(7 * descent.step + len(tensor))
                    distance = weights.get((tensor, model), 0.0) - best - noise
                    count = len(self._names) * len(self._wanted[name])
                    losses[name] += distance**2 / count
                    if "weight" in descent.wanted:
                        place = tensor, model, "weight"
                        slopes[place] = slopes.get(place, 0.0) + factor * 2 * distance / count
        return Gradient(losses, slopes, candidate.recipe.content_id())


class FakeWorker:
    """A worker that obeys the weight of a recipe's first model: negative raises, 2 kills the process, 3 hangs, 4 leaves
    a worker that is good for nothing, 5 makes a result of 150 MiB."""

    def evaluate(
        self, recipe: Recipe, split: Split, subset: Subset | None = None, quantized: bool = False
    ) -> Evaluation:
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

    def evaluate_shard(
        self, recipe: Recipe, split: Split, subset: Subset | None, shard: Shard, quantized: bool = False
    ) -> Part:
        whole = self.evaluate(recipe, split, subset)
        assert whole.scores is not None
        return Part(shard, whole.scores["score"] / shard.count, fingerprint=whole.fingerprint, seconds=1.0)

    def join(self, split: Split, subset: Subset | None, parts: Sequence[Part]) -> Evaluation:
        scores = {"score": sum(part.answers for part in parts)}
        return Evaluation(scores, items=len(parts), fingerprint=split, seconds=sum(part.seconds for part in parts))

    def descend(self, recipe: Recipe, descent: Descent) -> Gradient:
        scored = self.evaluate(recipe, "search")
        assert scored.scores is not None
        assert scored.fingerprint is not None
        slopes = {("tensor", "model", name): scored.scores["score"] / descent.shards for name in descent.wanted}
        return Gradient({name: float(descent.shard) for name, _ in descent.weights}, slopes, scored.fingerprint)


def make_fake_worker() -> FakeWorker:
    return FakeWorker()


class WorkerThatNamesItsGpus:
    """Gives the GPUs that torch would see as its fingerprint."""

    def evaluate(
        self, recipe: Recipe, split: Split, subset: Subset | None = None, quantized: bool = False
    ) -> Evaluation:
        return Evaluation(scores={"score": 0.0}, items=1, fingerprint=os.environ["CUDA_VISIBLE_DEVICES"])

    def evaluate_shard(
        self, recipe: Recipe, split: Split, subset: Subset | None, shard: Shard, quantized: bool = False
    ) -> Part:
        return Part(shard, None, fingerprint=os.environ["CUDA_VISIBLE_DEVICES"])

    def join(self, split: Split, subset: Subset | None, parts: Sequence[Part]) -> Evaluation:
        return Evaluation(scores={"score": 0.0}, items=1, fingerprint=parts[0].fingerprint)

    def descend(self, recipe: Recipe, descent: Descent) -> Gradient:
        return Gradient({}, {}, os.environ["CUDA_VISIBLE_DEVICES"])


def make_worker_that_names_its_gpus() -> WorkerThatNamesItsGpus:
    return WorkerThatNamesItsGpus()
