"""Factors: products whose bits depend on no order, beside whole numbers of Python."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as some

from evomerge.merging.methods.parts import whole_of
from evomerge.merging.sources import factors
from evomerge.merging.sources.factors import Factored, Factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int, spread: float = 1.0) -> Factors:
    """Factors whose numbers differ in size, the more the larger the spread."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        sizes = torch.exp(spread * torch.randn(shape, generator=generator))
        return (0.1 * sizes * torch.randn(shape, generator=generator)).clamp(-6e4, 6e4).to(dtype)

    return Factors(matrix(rows, rank), matrix(rank, columns), 1.7)


def weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(numbers: list[float]) -> list[Fraction]:
    """Numbers as multiples of one power of two, by the definition: half to even, with so many bits that `rank` products
    of two of them fit into 53."""
    largest, bits = max(map(abs, numbers)), (53 - math.ceil(math.log2(len(numbers)))) // 2
    if largest == 0:
        return [Fraction(0)] * len(numbers)
    step = Fraction(2) ** (math.frexp(largest)[1] - bits)
    return [round(Fraction(number) / step) * step for number in numbers]


def by_definition(start: torch.Tensor, change: Factors) -> torch.Tensor:
    left = [rounded(row) for row in change.left.double().tolist()]
    right = [rounded(column) for column in change.right.double().T.tolist()]
    products = [[sum(map(Fraction.__mul__, row, column), Fraction(0)) for column in right] for row in left]
    assert all(Fraction(float(number)) == number for row in products for number in row), "a sum was rounded"
    delta = np.array([[float(number) * change.scale for number in row] for row in products]).astype(np.float32)
    return torch.from_numpy(start.float().numpy() + delta).to(start.dtype)


@given(
    rows=some.integers(1, 9),
    columns=some.integers(1, 9),
    rank=some.integers(1, 40),
    stored=some.sampled_from(DTYPES),
    kept=some.sampled_from(DTYPES),
    spread=some.sampled_from([0.0, 1.0, 8.0]),
    seed=some.integers(0, 1000),
)
@example(rows=3, columns=2, rank=32, stored=torch.float32, kept=torch.float32, spread=8.0, seed=0)
def test_a_product_has_the_bits_of_its_definition(rows, columns, rank, stored, kept, spread, seed):
    change, start = drawn(rows, columns, rank, stored, seed, spread), weight(rows, columns, kept, seed)
    assert torch.equal(whole_of(Factored(start, [change])), by_definition(start, change))


@given(
    cuts=some.lists(some.integers(0, 37 * 23), max_size=6),
    order=some.permutations(range(12)),
    block=some.integers(1, 900),
)
def test_bits_depend_neither_on_pieces_nor_on_blocks_nor_on_the_order_of_the_rank(cuts, order, block):
    changes = [drawn(37, 23, 12, dtype, seed) for seed, dtype in enumerate((torch.float32, torch.bfloat16))]
    start = weight(37, 23, torch.bfloat16, 0)
    whole = whole_of(Factored(start, changes)).flatten()
    shuffled = [Factors(each.left[:, order], each.right[order], each.scale) for each in changes]
    ends = sorted({0, *cuts, whole.numel()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "_BLOCK", block)
        other = Factored(start, shuffled)
        found = torch.cat([other.part(slice(*pair)) for pair in pairwise(ends)])
    assert torch.equal(found, whole)


def test_bits_do_not_depend_on_threads_nor_on_how_the_matrix_lies():
    change, start = drawn(700, 300, 16, torch.float32, 0), weight(700, 300, torch.float32, 1)
    expected = whole_of(Factored(start, [change]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(whole_of(Factored(start, [change])), expected)
    finally:
        torch.set_num_threads(before)
    turned = Factors(change.right.T, change.left.T, change.scale)
    assert torch.equal(whole_of(Factored(start.T.contiguous(), [turned])), expected.T)


@pytest.mark.parametrize("rank", [1, 16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_as_near_to_the_true_one_as_float32_comes(rank, dtype):
    change, start = drawn(50, 40, rank, dtype, 0), torch.zeros(50, 40)
    true = change.left.double() @ change.right.double() * change.scale
    sizes = change.left.double().abs().amax(1, True) * change.right.double().abs().amax(0, True) * change.scale
    found = whole_of(Factored(start, [change])).double()
    assert ((found - true).abs() <= sizes * 2.0**-23 * max(1, rank / 8)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0, 1e4])
def test_what_is_said_to_be_small_makes_no_finite_number_infinite(dtype, size):
    largest = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    change = Factors(torch.full((4, 2), size), torch.full((2, 4), size), 1.0)
    stays = bool(torch.isfinite(whole_of(Factored(largest, [change]))).all())
    assert stays or not change.is_small(dtype)
    assert change.is_small(dtype) is (dtype != torch.float16 or size < 2)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_factor_that_is_not_finite_shows(bad):
    change = Factors(torch.tensor([[1.0, 0.0], [bad, 1.0]]), torch.ones(2, 3), 1.0)
    assert not change.is_small(torch.float32)
    found = whole_of(Factored(torch.zeros(2, 3), [change]))
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1]).any()
