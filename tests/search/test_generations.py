"""Generations are asked for and told in one fixed order, whoever finishes first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evomerge.candidate import Evaluation, Subset, failure
from evomerge.config.search import SearchConfig
from evomerge.optimizers.pareto import ScoreArray
from evomerge.recipe import Recipe, linear
from evomerge.search.criteria import Criteria
from evomerge.search.generations import Generations
from evomerge.spaces import Gene, Genome
from evomerge.workers import Job
from tests.searches import small_search


@dataclass
class Recording:
    """An optimizer whose proposals depend on all that it was told, and which notes what is asked of it.

    population: the size of a generation.
    ends_after: how many generations it has; None where there is no end.
    calls: `ask` and `tell`, each with the number of the generation.
    told: the scores of each generation that was told.
    """

    population: int
    ends_after: int | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)
    told: list[ScoreArray] = field(default_factory=list)
    _asked: list[Genome] = field(default_factory=list)

    def ask(self) -> Genome:
        number = len(self._asked)
        self.calls.append(("ask", number))
        if number == self.ends_after:
            return np.empty((0, 1))
        known = sum((float(np.nansum(scores)) * (i + 1) for i, scores in enumerate(self.told)), 0.0)
        genomes = (np.arange(self.population)[:, np.newaxis] + 0.37 * number + known) % 1.0
        self._asked.append(genomes)
        return genomes

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        number = len(self.told)
        assert np.array_equal(genomes, self._asked[number])
        self.calls.append(("tell", number))
        self.told.append(scores)


class OneWeight:
    """A space of one gene: the weight of the first model beside the second."""

    genes: tuple[Gene, ...] = (Gene("weight", "weight", "all", 0.0, 1.0, 0.5, 0.1),)

    def decode(self, genome: Sequence[float] | Genome) -> Recipe:
        return linear({"zoo:math": float(genome[0]), "zoo:lang": 1.0})

    def encode(self, weights: Mapping[str, float]) -> Genome:
        return np.array([0.5])

    def draw(self, random: np.random.Generator) -> Genome:
        return random.random(1)


def evaluation(job: Job) -> Evaluation:
    """Two scores of the genome, and a failure for every seventh candidate."""
    candidate = job.candidate
    if (candidate.generation + candidate.index) % 7 == 6:
        return replace(failure("out of memory"), subset=job.subset)
    assert candidate.genome is not None
    share = 1.0 if job.subset is None else job.subset.share
    scores = {"base_qa": share * candidate.genome[0], "cross_math_b": share * (1 - candidate.genome[0]) ** 2}
    return Evaluation(scores, subset=job.subset)


def generations(optimizer: Recording, budget: int, lag: int, subsets: Any = None) -> Generations:
    config = SearchConfig.model_validate(small_search(optimizer={"evaluations": budget, "lag": lag}))
    return Generations(optimizer, OneWeight(), config, Criteria(config.objectives), subsets)


def finish(schedule: Generations, running: int = 1, seed: int = 0) -> list[Job]:
    """Runs a schedule to its end with so many jobs at once, of which any may finish first; gives all jobs in order."""
    random, jobs, open_jobs = np.random.default_rng(seed), [], []
    while True:
        while len(open_jobs) < running and (job := schedule.next()) is not None:
            jobs.append(job)
            open_jobs.append(job)
        if not open_jobs:
            return jobs
        job = open_jobs.pop(int(random.integers(len(open_jobs))))
        schedule.receive(job, evaluation(job))


budgets, populations, lags = st.integers(1, 30), st.integers(1, 6), st.integers(0, 4)
together, seeds = st.integers(1, 12), st.integers(0, 99)


@given(budgets, populations, lags, together, seeds)
def test_the_first_generations_are_asked_for_at_once_and_then_a_tell_and_an_ask_alternate(
    budget: int, population: int, lag: int, running: int, seed: int
) -> None:
    optimizer = Recording(population)
    finish(generations(optimizer, budget, lag), running, seed)
    count = -(-budget // population)
    expected = [("ask", number) for number in range(min(lag + 1, count))]
    for number in range(count - lag - 1):
        expected += [("tell", number), ("ask", number + lag + 1)]
    assert optimizer.calls == expected


@given(budgets, populations, lags, together, seeds)
def test_the_order_of_arrival_and_the_number_of_workers_change_no_proposal(
    budget: int, population: int, lag: int, running: int, seed: int
) -> None:
    one, other = Recording(population), Recording(population)
    alone = finish(generations(one, budget, lag))
    beside = finish(generations(other, budget, lag), running, seed)
    assert alone == beside
    assert all(np.array_equal(*pair, equal_nan=True) for pair in zip(one.told, other.told, strict=True))


@given(budgets, populations, lags)
def test_the_budget_is_kept_to_the_candidate_and_ids_count_them(budget: int, population: int, lag: int) -> None:
    jobs = finish(generations(Recording(population), budget, lag), 4)
    numbers = [divmod(number, population) for number in range(budget)]
    assert [job.candidate.id for job in jobs] == [f"g{generation:04d}-{index:02d}" for generation, index in numbers]
    assert [(job.candidate.generation, job.candidate.index) for job in jobs] == numbers
    assert {(job.candidate.kind, job.split, job.subset) for job in jobs} == {("search", "search", None)}


@given(budgets, populations, lags, together, seeds, st.data())
def test_a_search_that_is_replayed_from_any_of_its_evaluations_hands_out_the_same_jobs(
    budget: int, population: int, lag: int, running: int, seed: int, data: st.DataObject
) -> None:
    whole = finish(generations(Recording(population), budget, lag), running, seed)
    known = data.draw(st.sets(st.sampled_from([job.candidate.id for job in whole])))
    again = generations(Recording(population), budget, lag)
    jobs: list[Job] = []
    waiting: list[Job] = []
    while (job := again.next()) is not None or waiting:
        if job is None:
            job = waiting.pop()
            again.receive(job, evaluation(job))
            continue
        jobs.append(job)
        if job.candidate.id in known:
            again.receive(job, evaluation(job))
        else:
            waiting.append(job)
    assert jobs == whole


@given(populations, lags, st.integers(0, 4))
def test_an_optimizer_that_has_nothing_left_ends_the_search(population: int, lag: int, ends_after: int) -> None:
    optimizer = Recording(population, ends_after)
    schedule = generations(optimizer, 1000, lag)
    assert len(finish(schedule)) == ends_after * population
    assert optimizer.calls[-1] == ("ask", ends_after)
    assert schedule.next() is None
    assert optimizer.calls[-1] == ("ask", ends_after)


def test_a_generation_is_told_in_its_own_order_with_failures_as_nan() -> None:
    optimizer = Recording(7)
    jobs = finish(generations(optimizer, 21, 0), 7, seed=3)
    assert len(optimizer.told) == 2
    for number, told in enumerate(optimizer.told):
        found = [evaluation(job) for job in jobs if job.candidate.generation == number]
        assert [bool(np.isnan(row).all()) for row in told] == [each.failed for each in found]
        scores = [list(each.scores.values()) for each in found if each.scores is not None]
        assert told[~np.isnan(told).any(axis=1)].tolist() == scores
        assert 0 < len(scores) < 7


@dataclass
class EverySecond:
    """Stands in for `Subsets`: every second candidate of a generation goes on to all items.

    settled: the scores that each generation had on its subset.
    learned: how many evaluations on all items were known when a generation was settled.
    """

    settled: list[list[Evaluation]] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)

    def draw(self, number: int) -> Subset:
        return Subset(number, 0.5)

    def learn(self, evaluations: Sequence[Evaluation]) -> None:
        self.learned.append(len(evaluations))

    def halves(self, evaluations: Sequence[Evaluation]) -> list[tuple[float, float]]:
        return []

    def settle(self, evaluations: Sequence[Evaluation]) -> list[Evaluation | None]:
        self.settled.append(list(evaluations))
        return [None if index % 2 else each for index, each in enumerate(evaluations)]

    def adapt(self, halves: Sequence[tuple[float, float]]) -> None:
        return


@given(st.integers(1, 5), populations, lags, together, seeds)
def test_with_subsets_all_are_scored_on_that_of_their_generation_and_only_the_chosen_on_all_items(
    count: int, population: int, lag: int, running: int, seed: int
) -> None:
    subsets = EverySecond()
    jobs = finish(generations(Recording(population), count * population, lag, subsets), running, seed)
    everybody = [(number, index) for number in range(count) for index in range(population)]
    screened = [job for job in jobs if job.subset is not None]
    whole = [job for job in jobs if job.subset is None]
    assert [(job.candidate.generation, job.candidate.index) for job in screened] == everybody
    assert [job.subset for job in screened] == [Subset(number, 0.5) for number, _ in everybody]
    assert [(job.candidate.generation, job.candidate.index) for job in whole] == [
        (number, index) for number, index in everybody if index % 2
    ]
    by_generation = [[evaluation(job) for job in screened if job.candidate.generation == i] for i in range(count)]
    assert subsets.settled == by_generation
    assert subsets.learned == [population // 2] * (count - 1)
