"""WorkerPool: runs jobs somewhere and hands back evaluations in whatever order they finish.

To add a pool: write a class with this protocol and what makes it of a config in a file of its own, add a row to `POOLS`
in the config, and run it through the contract in tests/contracts/pool.py.
"""

from dataclasses import dataclass
from typing import Protocol

from evomerge.candidate import Candidate, Evaluation, Study, Subset, failure
from evomerge.config.base import Split
from evomerge.errors import EvomergeError, first_line
from evomerge.events import Listener
from evomerge.recipe import Recipe


class Evaluator(Protocol):
    """What a pool runs: a `Worker`, or a test's stand-in."""

    def evaluate(self, recipe: Recipe, split: Split, subset: Subset | None = None, /) -> Evaluation: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate to be scored on one split, or on a subset of the search's."""

    candidate: Candidate
    split: Split
    subset: Subset | None = None

    @property
    def study(self) -> Study:
        """Where its evaluation is kept."""
        return self.split if self.subset is None else "subset"


class WorkerPool(Protocol):
    listener: Listener  # is told what becomes of workers: events about workers, and CandidateRetried

    @property
    def size(self) -> int:
        """How many jobs can run at once. Submit about twice as many, so that no worker waits for the next."""
        ...

    def submit(self, job: Job) -> None:
        """Takes a job; returns at once. Jobs start in the order of submission."""
        ...

    def wait(self) -> tuple[Job, Evaluation]:
        """Blocks until a submitted job has finished. A candidate's failure is an evaluation; raises WorkFailed only
        when the pool itself can go on no longer."""
        ...

    def close(self) -> None:
        """Stops all workers, whatever they are doing."""
        ...


def evaluate_guarded(evaluator: Evaluator, recipe: Recipe, split: Split, subset: Subset | None = None) -> Evaluation:
    """The evaluation of a recipe; an exception that is none of ours is recorded as the candidate's failure."""
    try:
        return evaluator.evaluate(recipe, split, subset)
    except EvomergeError:
        raise
    except Exception as error:
        return failure(first_line(error))
