import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.optimizers.pareto import exclusive_gains, front_mask, hypervolume, ranks

scores = st.integers(1, 12).flatmap(
    lambda rows: st.integers(1, 3).flatmap(
        lambda columns: arrays(np.float64, (rows, columns), elements=st.integers(0, 6).map(float))
    )
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a >= b).all() and (a > b).any())


@given(scores)
def test_the_front_is_what_no_other_row_dominates(matrix: np.ndarray) -> None:
    expected = [not any(dominates(other, row) for other in matrix) for row in matrix]
    assert front_mask(matrix).tolist() == expected


@given(scores)
def test_rank_zero_is_the_front_and_each_rank_is_the_front_of_what_is_left(matrix: np.ndarray) -> None:
    left, rank = np.arange(len(matrix)), ranks(matrix)
    for level in range(rank.max() + 1):
        front = left[front_mask(matrix[left])]
        assert set(front) == set(np.flatnonzero(rank == level))
        left = np.setdiff1d(left, front)


@given(scores)
def test_hypervolume_counts_the_dominated_unit_cells(matrix: np.ndarray) -> None:
    cells = np.stack(np.meshgrid(*[np.arange(6)] * matrix.shape[1], indexing="ij"), -1).reshape(-1, matrix.shape[1])
    covered = sum(bool((matrix >= cell + 1).all(axis=1).any()) for cell in cells)
    assert hypervolume(matrix, np.zeros(matrix.shape[1])) == covered


@given(scores)
def test_an_exclusive_gain_is_what_is_lost_without_the_row(matrix: np.ndarray) -> None:
    reference = np.full(matrix.shape[1], -1.0)
    front = np.zeros((1, matrix.shape[1]))
    gains = exclusive_gains(matrix, front, reference)
    for index, gain in enumerate(gains):
        without = np.vstack([front, np.delete(matrix, index, axis=0)])
        expected = hypervolume(np.vstack([front, matrix]), reference) - hypervolume(without, reference)
        assert np.isclose(gain, expected)


def test_failed_rows_are_never_on_the_front_and_an_empty_front_has_no_volume() -> None:
    assert front_mask(np.array([[np.nan, 1.0], [0.0, 0.0]])).tolist() == [False, True]
    assert hypervolume(np.empty((0, 2)), np.zeros(2)) == 0.0
