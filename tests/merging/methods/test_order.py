"""Order statistics: the element that sorting would give, whether the table has it or not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging.methods.kernels import UNIFORM_STEPS, ascending, kth_smallest
from evomerge.merging.methods.order import OrderStatistics, order_statistics

few = settings(max_examples=40, deadline=None, derandomize=True)
LARGE = 3 * UNIFORM_STEPS + 40_007


@pytest.fixture(scope="module", params=["distinct", "tied"])
def tensor(request) -> torch.Tensor:
    values = torch.randn(LARGE, generator=torch.Generator().manual_seed(1)).abs()
    return values if request.param == "distinct" else (values * 20).round() / 20


@pytest.fixture(scope="module")
def table(tensor) -> OrderStatistics:
    return order_statistics(tensor)


@pytest.fixture(scope="module")
def ordered(tensor) -> torch.Tensor:
    return tensor.sort().values


def never() -> torch.Tensor:
    raise AssertionError("the table has this element")


@few
@given(index=st.integers(0, LARGE - 1))
def test_any_element_is_the_one_that_sorting_gives(tensor, table, ordered, index):
    assert table.at(index, lambda: tensor) == ordered[index]


@pytest.mark.parametrize("density", [1 / UNIFORM_STEPS, 0.25, 40000 / UNIFORM_STEPS, 65535 / UNIFORM_STEPS])
def test_a_density_in_steps_is_answered_from_the_table(table, ordered, density):
    kept = int(density * LARGE)
    for beside in (-1, 0, 1):
        if 0 < kept + beside <= LARGE:
            assert table.at(LARGE - kept - beside, never) == ordered[LARGE - kept - beside]


@pytest.mark.parametrize("beyond", [1, 12_345, LARGE - 10])
def test_a_density_may_count_from_the_largest_that_are_left_out(tensor, ordered, beyond):
    table = order_statistics(tensor, beyond)
    for density in (0.0, 1 / UNIFORM_STEPS, 0.25):
        index = LARGE - beyond - int(density * LARGE)
        if 0 <= index < LARGE:
            assert table.at(index, never) == ordered[index]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_table_of_a_small_tensor_holds_all_of_it(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(2))
    assert [order_statistics(values).at(index, never) for index in range(count)] == values.sort().values.tolist()


def test_the_table_of_a_large_tensor_is_small(table):
    assert table.values.numel() <= 3 * (UNIFORM_STEPS + 1)


@few
@given(values=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=50), data=st.data())
def test_sorting_and_selecting_are_torch_s(values, data):
    values = torch.tensor(values)
    assert torch.equal(ascending(values), values.sort().values)
    k = data.draw(st.integers(0, len(values) - 1))
    assert kth_smallest(values, k) == values.sort().values[k]
