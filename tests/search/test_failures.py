"""Why candidates failed, counted by kinds of reasons."""

import pytest

from evomerge.candidate import Evaluation, failure
from evomerge.search.failures import counted, kind


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "non-finite weights after the merge in model.layers.0.self_attn.q_proj.weight",
            "non-finite weights after the merge in model.norm.weight",
        ),
        ("took longer than workers.time_limit, which is 3 s", "took longer than workers.time_limit, which is 12.5 s"),
        ("took 2 workers down (killed by signal 9)", "took 3 workers down (killed by signal 11)"),
    ],
)
def test_reasons_that_differ_in_numbers_and_tensors_only_are_one(one: str, other: str) -> None:
    assert kind(one) == kind(other)


def test_what_a_reason_is_about_stays() -> None:
    assert "workers.time_limit" in kind("took longer than workers.time_limit, which is 3 s")
    assert kind("a log-likelihood of task base_qa is not a number") != kind(
        "a log-likelihood of task x is not a number"
    )


def test_the_commonest_reason_comes_first_and_successes_are_not_counted() -> None:
    evaluations = [failure(f"bad weights in model.layers.{n}.mlp.weight") for n in range(3)]
    evaluations += [failure("out of memory"), Evaluation(scores={"a": 1.0}, items=1, fingerprint="x")]
    assert list(counted(evaluations).items()) == [("bad weights in …", 3), ("out of memory", 1)]
