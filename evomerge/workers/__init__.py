"""WorkerPool: runs jobs and hands back their results in the order in which they finish.

To add a pool: in a file of its own, write a class with this protocol and a function that makes it from a config. Add a
row to `POOLS` in the config, and run the pool through the contract in tests/contracts/pool.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from evomerge.candidate import Candidate, Descent, Evaluation, Gradient, Measured, Part, Shard, Study, Subset, failure
from evomerge.config.base import Split
from evomerge.errors import EvomergeError, first_line
from evomerge.events import Listener
from evomerge.recipe import Recipe

Result = Evaluation | Gradient | Part | Measured


class Evaluator(Protocol):
    """What a pool runs: a `Worker`, or a stand-in in tests."""

    def evaluate(
        self, recipe: Recipe, split: Split, subset: Subset | None = None, quantized: bool = False, /
    ) -> Evaluation:
        """The evaluation of a recipe on a split, or on a subset of its items; of its quantized merge, if asked."""
        ...

    def evaluate_shard(
        self, recipe: Recipe, split: Split, subset: Subset | None, shard: Shard, quantized: bool = False, /
    ) -> Part | Evaluation:
        """One shard of a recipe's evaluation; a failed evaluation where the candidate fails."""
        ...

    def join(self, split: Split, subset: Subset | None, parts: Sequence[Part], /) -> Evaluation:
        """The evaluation that follows from all its shards."""
        ...

    def descend(self, recipe: Recipe, descent: Descent, /) -> Gradient | Evaluation:
        """The gradient of a recipe's loss on a shard of a mini-batch; a failed evaluation where there is none."""
        ...

    def measure(self, kind: str, model: str, /) -> Measured:
        """Statistics of a model, measured unless they lie in the run's folder already."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A candidate to be scored on a split or on one shard of it, or the shards of an evaluation to be joined, or a
    candidate whose loss's gradient is asked for.

    candidate: the candidate.
    split: the split.
    subset: the part of the search items to score it on; None for all items of the split.
    descent: what gradient is asked for; None for scores.
    shard: the shard of the evaluation that is asked for; None for the whole.
    parts: all shards of the evaluation, to be joined; empty where something is to be scored.
    quantized: whether the merge is quantized before it is scored.
    statistic: the kind of statistics that is asked for of the candidate, a single model; None where it is scored.
    """

    candidate: Candidate
    split: Split
    subset: Subset | None = None
    descent: Descent | None = None
    shard: Shard | None = None
    parts: tuple[Part, ...] = ()
    quantized: bool = False
    statistic: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is neither a shard nor the joining of shards."""
        return self.shard is None and not self.parts

    @property
    def whole(self) -> "Job":
        """The job that it is a shard of, or itself."""
        return self if self.is_whole else replace(self, shard=None, parts=())

    @property
    def study(self) -> Study:
        """The study of the archive in which the evaluation is kept: the split's, `subset`, or `quantized`."""
        if self.subset is not None:
            return "subset"
        return "quantized" if self.quantized else self.split

    @property
    def key(self) -> tuple[str, Study, int | None]:
        """What sets the job apart from all others of a search; its shards have the same."""
        return self.candidate.id, self.study, None if self.descent is None else self.descent.shard


class WorkerPool(Protocol):
    """Workers that run jobs.

    listener: is told what happens to workers, and of candidates that are tried again (`evomerge.events`).
    """

    listener: Listener

    @property
    def size(self) -> int:
        """How many jobs can run at once. Submit about twice as many, so that no worker waits for the next."""
        ...

    def submit(self, job: Job) -> None:
        """Takes a job and returns at once. Candidates start in the order of submission; the jobs of one candidate go to
        a worker that holds it, if that is free (`waiting`)."""
        ...

    def drop(self, job: Job) -> None:
        """Forgets all shards of a job that do not run yet."""
        ...

    def wait(self) -> tuple[Job, Result]:
        """The next job to finish, and its result. Blocks until then. A candidate that fails has an evaluation, whatever
        was asked for.

        Raises WorkFailed where the pool itself can no longer go on.
        """
        ...

    def close(self) -> None:
        """Stops all workers, whatever they are doing."""
        ...


def run_guarded(evaluator: Evaluator, job: Job) -> Result:
    """The result of a job. An exception that is not an EvomergeError becomes the candidate's failure.

    evaluator: merges and scores the candidate.
    job: the job.
    Raises EvomergeError as the evaluator does.
    """
    try:
        return _run(evaluator, job)
    except EvomergeError:
        raise
    except Exception as error:
        return failure(first_line(error))


def _run(evaluator: Evaluator, job: Job) -> Result:
    recipe = job.candidate.recipe
    if job.statistic is not None:
        return evaluator.measure(job.statistic, recipe.references[0])
    if job.descent is not None:
        return evaluator.descend(recipe, job.descent)
    if job.parts:
        return evaluator.join(job.split, job.subset, job.parts)
    if job.shard is not None:
        return evaluator.evaluate_shard(recipe, job.split, job.subset, job.shard, job.quantized)
    return evaluator.evaluate(recipe, job.split, job.subset, job.quantized)
