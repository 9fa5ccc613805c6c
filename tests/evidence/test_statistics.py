"""What a difference is worth, beside enumeration and scipy."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evomerge.evidence.statistics import holm, interval, mcnemar, sign_flip, weighted_difference, wilson
from evomerge.randomness import counter_rng

answers = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), max_size=14)
p_values = st.lists(st.floats(0, 1), max_size=12)


def flips(differences: np.ndarray) -> np.ndarray:
    """The sum under every choice of signs."""
    return np.array([np.dot(signs, differences) for signs in product([-1, 1], repeat=len(differences))])


@given(answers)
def test_mcnemars_p_value_is_the_share_of_all_sign_choices_at_least_as_extreme(pairs):
    mine, theirs = np.array(pairs).reshape(-1, 2).T
    differences = (mine - theirs)[mine != theirs]
    extreme = np.abs(flips(differences)) >= abs(differences.sum())
    assert mcnemar(mine, theirs) == pytest.approx(extreme.mean())
    assert mcnemar(theirs, mine) == pytest.approx(mcnemar(mine, theirs))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_joint_p_value_is_that_of_all_sign_choices_within_each_task(seed):
    random = np.random.default_rng(seed)
    tasks = [random.choice([-1.0, 0.0, 1.0], size=7), random.normal(0.6, 1.0, size=6)]
    weights = np.array([1.0, 3.0])
    shares = [0.25 / 7, 0.75 / 6]
    sums = np.add.outer(*(share * flips(task) for share, task in zip(shares, tasks, strict=True))).ravel()
    difference = sum(share * task.sum() for share, task in zip(shares, tasks, strict=True))
    assert weighted_difference(tasks, weights) == pytest.approx(difference)
    exact = (np.abs(sums) >= abs(difference) - 1e-9).mean()
    found = sign_flip(tasks, weights, counter_rng(seed))
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20000) + 1e-3)


@pytest.mark.parametrize("binary", [True, False])
def test_the_interval_is_scipys_percentile_bootstrap_up_to_chance(binary):
    random = np.random.default_rng(5)
    task = random.choice([-1.0, 0.0, 1.0], size=200, p=[0.1, 0.6, 0.3]) if binary else random.normal(0.1, 1, size=200)
    found = interval([task], np.ones(1), counter_rng(7))
    theirs = stats.bootstrap((task,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert found == pytest.approx((theirs.low, theirs.high), abs=0.02 * float(task.std()))
    assert found[0] < task.mean() < found[1]


def test_the_other_way_round_the_difference_is_the_opposite_and_the_p_value_the_same():
    task, one = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=80), np.ones(1)
    assert weighted_difference([task], one) == -weighted_difference([-task], one)
    assert sign_flip([task], one, counter_rng(3)) == sign_flip([-task], one, counter_rng(3))


@given(p_values)
def test_holm_rejects_what_the_step_down_procedure_rejects(values):
    corrected = holm(values)
    for level in (0.05, 0.3):
        order = sorted(range(len(values)), key=lambda i: values[i])
        rejected = set()
        for step, index in enumerate(order):
            if values[index] * (len(values) - step) >= level:
                break
            rejected.add(index)
        assert {i for i, value in enumerate(corrected) if value < level} == rejected


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_interval_of_a_share_is_scipys(share):
    expected = stats.binomtest(*share).proportion_ci(0.95, method="wilson")
    assert wilson(*share) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson(*share)
    assert low <= share[0] / share[1] <= high
    assert low < high
