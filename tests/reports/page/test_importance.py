"""Importances name the genes that decide, one by one or in groups."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evomerge.reports.page.importance import MOST_GENES, Feature, Features, features, importances
from evomerge.runs import directory as runs
from evomerge.spaces import Gene

GENES = [
    Gene(f"weight:{model}:l.{i}", "weight", f"layers_{i // 10}", 0, 1, 0.5, 0.1) for model in "ab" for i in range(40)
]


def drawn(count: int, decide: int) -> Features:
    """Candidates whose mean is the value of one gene."""
    values = np.random.default_rng(0).uniform(size=(count, 3))
    named = tuple(Feature(f"g{i}", (f"g{i}",), 0.0, 1.0) for i in range(3))
    rows = tuple(tuple(map(float, row)) for row in values)
    return Features(named, False, tuple(map(str, range(count))), rows, tuple(row[decide] for row in rows))


def test_the_gene_that_decides_is_the_most_important() -> None:
    for decide in (0, 2):
        shares = importances(drawn(40, decide))
        assert isinstance(shares, dict)
        assert next(iter(shares)) == f"g{decide}"
        assert shares[f"g{decide}"] > 0.8
    assert importances(drawn(40, 2)) == shares


def test_too_few_or_equal_candidates_get_a_sentence() -> None:
    assert "are needed" in str(importances(drawn(5, 0)))
    same = drawn(80, 0)
    assert "same mean" in str(importances(Features(same.features, False, same.candidates, same.values, (1.0,) * 80)))


def test_a_gene_that_does_not_count_everywhere_is_left_out() -> None:
    some = drawn(20, 0)
    values = ((None, *some.values[0][1:]), *some.values[1:])
    shares = importances(Features(some.features, False, some.candidates, values, some.means))
    assert isinstance(shares, dict)
    assert set(shares) == {"g1", "g2"}


def test_many_genes_are_taken_together_by_kind_model_and_group(finished: Path, zoo_run: Path) -> None:
    results = runs.read(finished).results
    found = features(results, GENES)
    assert len(GENES) > MOST_GENES
    assert found.grouped
    assert [feature.name for feature in found.features] == [
        f"weight:{model}:layers_{group}" for model in "ab" for group in range(4)
    ]
    assert sorted(name for feature in found.features for name in feature.genes) == sorted(gene.name for gene in GENES)
    few = features(results, GENES[:MOST_GENES])
    assert not few.grouped
    run = runs.read(zoo_run)
    every = features(run.results, run.prepared.space.genes)
    row = every.candidates.index("l0006")
    record = run.archive.find("l0006", "search")
    genes = (record and run.archive.genes(record.candidate)) or {}
    for feature, value in zip(every.features, every.values[row], strict=True):
        assert value == pytest.approx(np.mean([genes[name] for name in feature.genes]))


@example([0.1] * 3)
@given(st.lists(st.floats(0.1, 1.3), min_size=1, max_size=40))
def test_the_mean_of_genes_never_leaves_their_bounds(values: list[float]) -> None:
    """Rounding would take it there, and optuna refuses such values."""
    genes = {f"g{index}": value for index, value in enumerate(values)}
    mean = Feature("all", tuple(genes), min(values), max(values)).of(genes)
    assert isinstance(mean, float)
    assert min(values) <= mean <= max(values)
    assert mean == pytest.approx(np.mean(values))
