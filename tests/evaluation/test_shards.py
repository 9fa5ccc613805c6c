"""The answers to shards, joined: the scores of an evaluation in one piece, to the bit."""

from random import Random

import pytest

from evomerge.candidate import Shard, Subset
from evomerge.evaluation.harness import Harness


@pytest.fixture
def harnesses(load, qa_task, choice_task, generation_task, search_config):
    """Two harnesses, as of two workers, with means over items, a metric of the whole corpus, and written texts."""

    def make(**generation):
        qa_task()
        choice_task(count=31)
        generation_task(generation_kwargs={"max_gen_toks": 4, **generation})
        names = ("qa", "qa:perplexity", "choice", "choice:acc_norm", "writing:exact_match")
        config = search_config(*names, evaluation={"batch_size": 4})
        return [Harness(config, *load("math")) for _ in range(2)]

    return make


@pytest.mark.parametrize("generation", [{}, {"do_sample": True, "temperature": 1.0}], ids=["greedy", "sampled"])
def test_shards_of_several_workers_joined_are_the_whole_evaluation_to_the_bit(harnesses, generation):
    workers, random = harnesses(**generation), Random(0)
    for subset in (None, Subset(1, 0.4)):
        whole = workers[0].evaluate("search", subset=subset)
        assert whole.scores.keys() - whole.outcomes.keys() == {"qa:perplexity"}
        for count in (1, 2, 3, 7, 40):
            shards = [Shard(number, count) for number in range(count)]
            random.shuffle(shards)
            answered = [(shard, random.choice(workers).answers("search", None, subset, shard)) for shard in shards]
            assert random.choice(workers).scores("search", subset, answered) == whole


def test_every_shard_has_work_unless_there_are_fewer_batches_than_shards(harnesses):
    harness = harnesses()[0]
    assert not any(harness.is_empty("search", None, Shard(number, 3)) for number in range(3))
    empty = [harness.is_empty("search", None, Shard(number, 500)) for number in range(500)]
    assert empty == sorted(empty)
    assert 3 < empty.count(False) < 500
