"""Which job a worker takes next, with a pool of pretended workers that all take equally long."""

from collections import Counter
from dataclasses import replace

import pytest

from evomerge.candidate import Part, Shard
from evomerge.workers import Job
from evomerge.workers.waiting import Waiting
from tests.contracts.pool import job


def shards(name: str, count: int) -> list[Job]:
    return [replace(job(name, 0.5), shard=Shard(number, count)) for number in range(count)]


def worked(waiting: Waiting, workers: int) -> tuple[list[Job], int]:
    """The jobs in the order in which they were taken, and how many merges that took."""
    holds: list[str | None] = [None] * workers
    taken, merges = [], 0
    while len(waiting):
        for worker in range(workers):
            held = Counter(name for name in holds if name is not None)
            chosen = waiting.take(holds[worker], held)
            if chosen is not None:
                merges += holds[worker] != chosen.candidate.id
                holds[worker] = chosen.candidate.id
                taken.append(chosen)
    return taken, merges


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_there_are_no_more_merges_than_candidates_while_there_are_candidates_for_all_workers(workers: int) -> None:
    waiting, candidates = Waiting(), 12  # which all numbers of workers divide
    expected = [shard for number in range(candidates) for shard in shards(f"c{number}", 8)]
    for shard in expected:
        waiting.add(shard)
    taken, merges = worked(waiting, workers)
    assert merges == candidates
    assert sorted(taken, key=expected.index) == expected


def test_workers_share_a_candidate_when_there_is_no_other() -> None:
    waiting = Waiting()
    for shard in shards("only", 8):
        waiting.add(shard)
    taken, merges = worked(waiting, 4)
    assert (len(taken), merges) == (8, 4)


def test_a_worker_that_may_not_help_leaves_shards_to_those_who_hold_the_candidate() -> None:
    waiting = Waiting()
    for shard in shards("only", 2):
        waiting.add(shard)
    held = Counter(["only"])
    assert waiting.take("other", held, helps=False) is None
    assert waiting.take("only", held, helps=False) is not None
    assert waiting.take("other", held) is not None
    assert len(waiting) == 0


def test_joins_and_jobs_of_lost_workers_come_first_and_dropped_shards_never() -> None:
    waiting = Waiting()
    first, second = shards("first", 2), shards("second", 2)
    for shard in [*first, *second]:
        waiting.add(shard)
    join = replace(job("third", 0.5), parts=(Part(Shard(0, 1), None),))
    waiting.add(join)
    lost = shards("lost", 1)
    waiting.put_back(lost)
    waiting.drop(first[0].whole)
    assert [waiting.take(None, Counter()) for _ in range(5)] == [*lost, join, *second, None]
