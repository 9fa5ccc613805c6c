"""Order statistics: the element that sorting would give, whether the table has it or not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging.methods import order
from evomerge.merging.methods.kernels import UNIFORM_STEPS, ascending, kth_smallest, piece_size
from evomerge.merging.methods.order import OrderStatistics, elements_at, order_statistics

few = settings(max_examples=40, deadline=None, derandomize=True)
LARGE = 3 * UNIFORM_STEPS + 40_007
CPU = torch.device("cpu")


def table_of(vector: torch.Tensor, beyond: int = 0) -> OrderStatistics:
    return order_statistics(vector.__getitem__, len(vector), vector.device, beyond)


@pytest.fixture(scope="module", params=["sorted", "counted"], autouse=True)
def way(request):
    """Vectors are sorted, or counted by their bits, as long ones are; 300 values of the upper bits at a time."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "counted":
            patch.setattr("evomerge.merging.methods.order._SORTED", 0)
            patch.setattr("evomerge.merging.methods.order._GROUP", 300)
        yield


@pytest.fixture(scope="module", params=["distinct", "tied", "mostly zero"])
def tensor(request, way) -> torch.Tensor:
    values = torch.randn(LARGE, generator=torch.Generator().manual_seed(1)).abs()
    if request.param == "distinct":
        return values
    return (values * 20).round() / 20 if request.param == "tied" else (values - 1).clamp(min=0)


@pytest.fixture(scope="module")
def table(tensor) -> OrderStatistics:
    return table_of(tensor)


@pytest.fixture(scope="module")
def ordered(tensor) -> torch.Tensor:
    return tensor.sort().values


def never(piece: slice) -> torch.Tensor:
    raise AssertionError("the table has this element")


@few
@given(index=st.integers(0, LARGE - 1))
def test_any_element_is_the_one_that_sorting_gives(tensor, table, ordered, index):
    assert table.at(index, tensor.__getitem__) == ordered[index]


def test_all_ranks_at_once_are_the_sorted_tensor(tensor, ordered):
    assert torch.equal(elements_at(tensor.__getitem__, LARGE, np.arange(LARGE), CPU), ordered)


@pytest.mark.parametrize("density", [1 / UNIFORM_STEPS, 0.25, 40000 / UNIFORM_STEPS, 65535 / UNIFORM_STEPS])
def test_a_density_in_steps_is_answered_from_the_table(table, ordered, density):
    kept = int(density * LARGE)
    for beside in (-1, 0, 1):
        if 0 < kept + beside <= LARGE:
            assert table.at(LARGE - kept - beside, never) == ordered[LARGE - kept - beside]


@pytest.mark.parametrize("beyond", [1, 12_345, LARGE - 10])
def test_a_density_may_count_from_the_largest_that_are_left_out(tensor, ordered, beyond):
    table = table_of(tensor, beyond)
    for density in (0.0, 1 / UNIFORM_STEPS, 0.25):
        index = LARGE - beyond - int(density * LARGE)
        if 0 <= index < LARGE:
            assert table.at(index, never) == ordered[index]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_table_of_a_small_tensor_holds_all_of_it(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(2)).abs()
    assert [table_of(values).at(index, never) for index in range(count)] == values.sort().values.tolist()


def test_the_table_of_a_large_tensor_is_small(table):
    assert table.values.numel() <= 3 * (UNIFORM_STEPS + 1)


@few
@given(
    values=st.lists(st.floats(min_value=0.0, width=32) | st.just(float("inf")), min_size=1, max_size=300),
    data=st.data(),
)
def test_elements_at_some_ranks_are_those_that_sorting_gives(values, data):
    vector = torch.tensor(values, dtype=torch.float32)
    ranks = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=9)))
    found = elements_at(vector.__getitem__, len(vector), ranks, CPU)
    assert torch.equal(found, vector.sort().values[torch.from_numpy(ranks)])


def test_a_long_vector_is_never_held_as_a_whole(tensor):
    """Only where it is counted: shorter vectors are sorted."""
    read = []

    def vector(piece: slice) -> torch.Tensor:
        read.append(piece.stop - piece.start)
        return tensor[piece]

    elements_at(vector, LARGE, np.array([5, LARGE // 2]), CPU)
    assert max(read) == (LARGE if order._SORTED else piece_size(CPU))


@few
@given(values=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=50), data=st.data())
def test_sorting_and_selecting_are_torch_s(values, data):
    values = torch.tensor(values)
    assert torch.equal(ascending(values), values.sort().values)
    k = data.draw(st.integers(0, len(values) - 1))
    assert kth_smallest(values, k) == values.sort().values[k]
