import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evomerge.optimizers.ranking import Incumbent, Ranking


def test_elite_ranks_by_front_then_gain_then_mean() -> None:
    #   second
    #     |  a(.1,.9)
    #     |      b(.5,.6)     b adds the most volume to the front
    #     |    d(.4,.5)       d is dominated by b
    #     |          c(.9,.1)
    #     +------------- first
    ranking = Ranking(np.ones(2), elite=True)
    ranking.observe(np.array([[0.0, 0.0]]))
    losses = ranking.losses(np.array([[0.1, 0.9], [0.5, 0.6], [0.9, 0.1], [0.4, 0.5]]))
    assert losses.argmin() == 1
    assert losses.argmax() == 3


def test_elite_prefers_what_extends_the_front_over_what_repeats_it() -> None:
    ranking = Ranking(np.ones(2), elite=True)
    ranking.observe(np.array([[0.8, 0.2], [0.2, 0.8]]))
    losses = ranking.losses(np.array([[0.8, 0.1], [0.5, 0.55]]))
    assert losses[1] < losses[0]


def test_failures_come_last_under_both_rankings() -> None:
    told = np.array([[0.5, 0.5], [np.nan, np.nan], [0.1, 0.1]])
    for elite in (True, False):
        losses = Ranking(np.ones(2), elite=elite).losses(told)
        assert losses.argmax() == 1
        assert np.isfinite(losses).all()


def test_weights_change_a_weighted_sum() -> None:
    told = np.array([[1.0, 0.0], [0.0, 0.9]])
    assert Ranking(np.array([1.0, 1.0]), elite=False).losses(told).argmin() == 0
    assert Ranking(np.array([1.0, 2.0]), elite=False).losses(told).argmin() == 1


def test_the_incumbent_gives_way_to_its_equal_but_not_to_a_failure() -> None:
    incumbent = Incumbent(np.array([0.0]))
    incumbent.offer(np.array([[1.0]]), np.array([0.5]))
    incumbent.offer(np.array([[2.0]]), np.array([0.5]))
    incumbent.offer(np.array([[3.0]]), np.array([-np.inf]))
    assert incumbent.genome.tolist() == [2.0]


rows = st.tuples(*[st.integers(0, 4)] * 2, *[st.sampled_from([0.0, 0.0, 0.1, 0.5])] * 2)


@given(st.lists(rows, min_size=1, max_size=10), st.lists(rows, max_size=6), st.booleans(), st.booleans())
def test_debs_rule_what_keeps_to_the_limits_comes_first_then_what_breaks_them_least(told, before, elite, fails):
    ranking = Ranking(np.ones(2), elite=elite)
    if before:
        ranking.observe(np.array(before, dtype=float))
    table = np.array(told, dtype=float)
    if fails:
        table[0] = np.nan
    broken = table[:, 2:].sum(axis=1)
    failed = np.isnan(broken)
    losses, means = ranking.losses(table), ranking.means(table)
    assert np.isfinite(losses).all()
    for order in (losses, -means):
        for one in range(len(table)):
            for other in range(len(table)):
                if (failed[other] and not failed[one]) or broken[one] < broken[other]:
                    assert order[one] < order[other]


@given(st.lists(rows, min_size=1, max_size=8))
def test_limits_that_nobody_breaks_change_no_rank(told):
    table = np.array(told, dtype=float)
    table[:, 2:] = 0.0
    for elite in (True, False):
        plain, limited = Ranking(np.ones(2), elite=elite), Ranking(np.ones(2), elite=elite)
        plain.observe(table[:1, :2])
        limited.observe(table[:1])
        assert (plain.losses(table[:, :2]) == limited.losses(table)).all()
