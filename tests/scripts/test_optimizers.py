"""The made-up problems on which optimizers are compared are sound."""

import runpy
from typing import Any

import numpy as np
import pytest

from tests.conftest import REPOSITORY

BENCH = REPOSITORY / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return runpy.run_path(str(BENCH / "optimizers"))


@pytest.mark.parametrize("dimension", [10, 24])
def test_the_score_of_a_made_up_merge_is_a_measurement_of_its_true_accuracy(
    bench: dict[str, Any], dimension: int
) -> None:
    random = np.random.default_rng(0)
    problems = [bench["Imitation"](dimension, seed) for seed in range(5)]
    pairs = [(each.score(x), each.true(x)) for each in problems for x in random.uniform(0, 1.5, (20, dimension))]
    scores, true = np.array(pairs).T
    assert np.abs(scores - true).max() < 0.1
    assert abs((scores - true).mean()) < 0.02


def test_parents_and_their_uniform_merge_are_far_from_the_best_made_up_merge(bench: dict[str, Any]) -> None:
    for seed in (1, 2):
        best, start = bench["limits_of_imitation"](10, seed)
        assert best > start + 0.2


def test_the_best_for_a_smaller_budget_is_among_the_first_candidates_of_a_longer_search(bench: dict[str, Any]) -> None:
    values, _ = bench["on_imitation"](10, "random_search", 1, [20, 60])
    alone, _ = bench["on_imitation"](10, "random_search", 1, [20])
    assert values[20] == alone[20]


def test_a_search_for_a_made_up_merge_beats_random_search(bench: dict[str, Any]) -> None:
    for seed in (1, 2, 3):
        found = {
            name: bench["on_imitation"](10, name, seed, [200])[0][200] for name in ("group_evolution", "random_search")
        }
        assert found["group_evolution"] > found["random_search"]
