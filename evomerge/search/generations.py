"""Pipelined generations: generations 0 to lag are asked at once, then tell(g) and ask(g + lag + 1) strictly alternate.

So proposals depend neither on timing nor on the number of workers. `evomerge.search.asynchronous` gives this up to keep
workers busier.

With subsets, a generation is first scored on its subset. Once all earlier generations are complete, it is settled which
of its candidates are scored on all search items.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.candidate import Candidate, Evaluation, Subset
from evomerge.config.search import SearchConfig
from evomerge.optimizers.base import Optimizer
from evomerge.search.criteria import Criteria
from evomerge.search.subsets import Subsets
from evomerge.search.watching import Watch
from evomerge.spaces import Genome, SearchSpace
from evomerge.workers import Job

NOTHING_LEFT = "its optimizer has nothing more to propose"


def propose(space: SearchSpace, genome: NDArray[np.float64], generation: int, index: int) -> Candidate:
    """The candidate of a proposed genome.

    space: decodes the genome.
    genome: shape (genes,).
    generation: the number of the ask.
    index: the genome's place in it.
    """
    return Candidate(
        id=f"g{generation:04d}-{index:02d}",
        kind="search",
        generation=generation,
        index=index,
        recipe=space.decode(genome),
        genome=tuple(genome.tolist()),
    )


@dataclass
class _Generation:
    """A generation that has been asked for.

    genomes: as the optimizer proposed them, shape (n, genes).
    candidates: of these genomes, as far as the budget goes.
    subset: the subset of its first scores; None where it is scored on all search items at once.
    evaluations: of each candidate on all search items, or an estimate of that; None until there is either.
    screened: of each candidate on the subset; None until there is one.
    halves: weighted means on the two halves of the items (`Subsets.halves`).
    """

    genomes: Genome
    candidates: list[Candidate]
    subset: Subset | None
    evaluations: list[Evaluation | None]
    screened: list[Evaluation | None]
    halves: list[tuple[float, float]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return None not in self.evaluations


@dataclass
class Generations:
    """The generations of an optimizer, until the budget is spent. See `Schedule`.

    optimizer: proposes genomes.
    space: decodes them.
    config: the search's.
    criteria: those of the search items.
    subsets: chooses the subsets; None where all candidates are scored on all search items.
    watch: says when the search ends before its budget is spent; None where it does not.
    first: the number of the first generation.
    spent: what has been spent of the budget before.
    """

    optimizer: Optimizer
    space: SearchSpace
    config: SearchConfig
    criteria: Criteria
    subsets: Subsets | None = None
    watch: Watch | None = None
    first: int = 0
    spent: float = 0.0
    _asked: int = field(init=False, default=0)
    _settled: int = field(init=False, default=0)
    _told: int = field(init=False, default=0)
    _exhausted: bool = field(init=False, default=False)
    _watched: bool = field(init=False, default=False)
    _open: dict[int, _Generation] = field(init=False, default_factory=dict)
    _queue: deque[Job] = field(init=False, default_factory=deque)

    def next(self) -> Job | None:
        """The next job; None while jobs that run must finish first, and once the budget is spent."""
        self._advance()
        return self._queue.popleft() if self._queue else None

    def _advance(self) -> None:
        """Settles, tells and asks in their fixed order, as far as the received evaluations allow.

        Nothing is told any more once no further ask follows.
        """
        self._settle()
        while self.spent < self.config.limit and not self._exhausted and not self._watching():
            if self._asked - self._told <= self.config.optimizer.lag:
                self._ask()
            elif self._told < self._settled and self._open[self._told].complete:
                self._tell()
            else:
                return

    def _watching(self) -> bool:
        """Whether the best candidate is being scored on selection items, or has shown that the search is over."""
        if self.watch is None:
            return False
        candidate = self.watch.due() if not self._watched else None
        if candidate is not None:
            self._watched = True
            self._queue.append(Job(candidate, "selection"))
            self.spent += self._cost_of_selection
        return self._watched or self.watch.over

    @property
    def _cost_of_selection(self) -> float:
        """What it costs to score a candidate on selection items."""
        items = self.config.items
        return (items.selection or 0) / items.search if items.search else 1.0

    def _ask(self) -> None:
        genomes = self.optimizer.ask()
        self._exhausted = len(genomes) == 0
        subset = self.subsets.draw(self._asked) if self.subsets is not None else None
        cost = subset.share if subset is not None and self.config.optimizer.equivalents is not None else 1.0
        left = genomes[: math.ceil((self.config.limit - self.spent) / cost)]
        number = self.first + self._asked
        candidates = [propose(self.space, genome, number, index) for index, genome in enumerate(left)]
        self._queue.extend(Job(candidate, "search", subset) for candidate in candidates)
        none: list[Evaluation | None] = [None] * len(candidates)
        self._open[self._asked] = _Generation(genomes, candidates, subset, [*none], [*none])
        self.spent += len(candidates) * cost
        self._asked += 1

    def _settle(self) -> None:
        """Decides for one generation after the other which of its candidates are scored on all search items."""
        while self._settled < self._asked:
            generation, before = self._open[self._settled], self._open.get(self._settled - 1)
            seen = generation.evaluations if generation.subset is None else generation.screened
            scored = [evaluation for evaluation in seen if evaluation is not None]
            if len(scored) < len(seen) or (before is not None and not before.complete):
                return
            if self.subsets is not None:
                if before is not None:
                    self.subsets.learn(
                        [evaluation for evaluation in before.evaluations if evaluation and evaluation.subset is None]
                    )
                generation.halves = self.subsets.halves(scored)
                if generation.subset is not None:
                    generation.evaluations = self.subsets.settle(scored)
            self._queue.extend(
                Job(candidate, "search")
                for candidate, evaluation in zip(generation.candidates, generation.evaluations, strict=True)
                if evaluation is None
            )
            self._settled += 1

    def _tell(self) -> None:
        self._open.pop(self._told - 1, None)
        generation = self._open[self._told]
        evaluations = [evaluation for evaluation in generation.evaluations if evaluation is not None]
        self.optimizer.tell(generation.genomes, self.criteria.told(evaluations))
        if generation.subset is not None and self.config.optimizer.equivalents is not None:
            self.spent += sum(evaluation.subset is None for evaluation in evaluations)
        if self.watch is not None:
            self.watch.learn(generation.candidates, evaluations)
        if self.subsets is not None:
            self.subsets.adapt(generation.halves)
        self._told += 1

    @property
    def early(self) -> str:
        """Why it has ended before its budget was spent; empty where it has not."""
        if self.spent >= self.config.limit:
            return ""
        if self.watch is not None and self.watch.over:
            return f"scores on selection items have not risen for {self.watch.stop_after} candidates"
        return NOTHING_LEFT if self._exhausted else ""

    def arrival(self) -> None:
        """None, since the order of arrival does not count."""

    def receive(self, job: Job, evaluation: Evaluation) -> None:
        """Keeps the evaluation of a job until its generation is settled or told."""
        if job.split == "selection":
            assert self.watch is not None
            self._watched = False
            self.watch.receive(evaluation)
            return
        generation = self._open[job.candidate.generation - self.first]
        kept = generation.evaluations if job.subset is None else generation.screened
        kept[job.candidate.index] = evaluation
