"""Integer kernels: the same everywhere, uniform, independent, and blind to no changed bit."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evomerge.merging.methods.kernels import (
    UNIFORM_STEPS,
    as_field,
    below,
    checksum,
    counted,
    divisor,
    exact_l1,
    field_steps,
    largest_magnitudes,
    limit_of,
    uniform_field,
)
from evomerge.merging.resident.models import fingerprint
from tests.merging.methods.masks import keep_mask

N = 1 << 17
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}

few = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 2**63 - 1)
names = st.sampled_from(["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])


def normal(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


# uniform_field


def test_the_uniform_field_is_what_it_always_was():
    """Recorded fingerprints of random merges depend on these numbers, so they may never change."""
    assert uniform_field(0, 0, "tensor", 6, "cpu").tolist() == [-17647, 17323, 19519, -31538, -679, -3215]
    assert uniform_field(7, 2, "model.norm.weight", 3, "cpu").tolist() == [-29826, -20855, 2258]


@pytest.mark.parametrize("steps", [0, 1, 2, 20000, 32767, 32768, 32769, 65535, 65536])
def test_all_forms_of_a_field_keep_the_same_numbers(steps):
    numbers = torch.arange(65536, dtype=torch.int32)
    expected, limit = (numbers < steps).float(), torch.tensor(float(steps))
    kept = (numbers - 32768).to(torch.int16)
    generator = torch.Generator().manual_seed(steps)
    rest = torch.randint(0, 65536, numbers.shape, generator=generator, dtype=torch.int32)
    for field in (kept, as_field(kept, planes=True), (numbers << 16) | rest):
        assert torch.equal(below(field, limit, torch.tensor(limit_of(steps))), expected)
        assert torch.equal(below(field, limit, torch.tensor(limit_of(steps)), torch.tensor(1.5)), 1.5 * expected)
        assert torch.equal(field_steps(counted(field)), numbers.float())


@few
@given(seed=seeds, position=st.integers(0, 9), name=names, short=st.integers(0, 300), longer=st.integers(0, 300))
def test_a_draw_does_not_depend_on_how_many_there_are(seed, position, name, short, longer):
    whole = uniform_field(seed, position, name, short + longer, "cpu")
    assert torch.equal(uniform_field(seed, position, name, short, "cpu"), whole[:short])


def test_a_draw_does_not_depend_on_other_draws_or_on_torch_s_generator():
    before = torch.random.get_rng_state()
    first = uniform_field(1, 0, "tensor", 100, "cpu")
    uniform_field(1, 1, "other", 100, "cpu")
    torch.manual_seed(5)
    assert torch.equal(uniform_field(1, 0, "tensor", 100, "cpu"), first)
    torch.random.set_rng_state(before)


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_uniform(seed):
    """Chi-square over 256 bins: 255 degrees of freedom, standard deviation sqrt(510); so for high and for low bits."""
    draws = uniform_field(seed, 0, "tensor", N, "cpu").long() + 32768
    assert 0 <= draws.min() <= draws.max() < UNIFORM_STEPS
    for bins in (draws >> 8, draws & 255):
        counts = torch.bincount(bins, minlength=256).double()
        chi_square = ((counts - N / 256) ** 2 / (N / 256)).sum().item()
        assert abs(chi_square - 255) < 5 * math.sqrt(510)


def test_fields_of_different_seeds_models_and_tensors_are_uncorrelated():
    keys = [*itertools.product((0, 1, 2**40), (0, 1), ("model.layers.1.a", "model.layers.11.a"))]
    fields = torch.stack([uniform_field(*key, N, "cpu").float() for key in keys])
    correlation = torch.corrcoef(fields).fill_diagonal_(0)
    assert correlation.abs().max().item() < 5 / math.sqrt(N)


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 256, 4096])
def test_neighbours_in_a_field_are_uncorrelated(distance):
    field = uniform_field(0, 0, "tensor", N, "cpu").float()
    pairs = torch.stack([field[:-distance], field[distance:]])
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 5 / math.sqrt(N)


# keep_mask


@few
@given(seed=seeds, densities=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_masks_are_nested_as_the_density_grows(seed, densities):
    field = uniform_field(seed, 0, "tensor", 2000, "cpu")
    sparse, dense = (keep_mask(field, density) for density in densities)
    assert not (sparse & ~dense).any()


@few
@given(seed=seeds, density=st.floats(0, 1))
def test_a_mask_keeps_its_density_of_the_elements(seed, density):
    kept = keep_mask(uniform_field(seed, 0, "tensor", N, "cpu"), density).double().mean().item()
    assert kept == pytest.approx(density, abs=5 * 0.5 / math.sqrt(N) + 1 / UNIFORM_STEPS)


def test_density_one_keeps_all_and_density_zero_nothing():
    every = torch.arange(-32768, 32768).to(torch.int16)
    assert keep_mask(every, 1.0).all()
    assert not keep_mask(every, 0.0).any()
    assert keep_mask(every, 0.25).sum() == UNIFORM_STEPS // 4


# exact_l1


@few
@given(seed=seeds, count=st.integers(1, 3000), exponent=st.integers(-60, 60))
def test_exact_l1_is_the_same_in_any_order(seed, count, exponent):
    delta = normal(count, seed) * 2.0**exponent
    largest = delta.abs().max()
    shuffled = delta[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    assert exact_l1(delta, largest) == exact_l1(shuffled, largest)
    assert exact_l1(delta, largest) == sum(exact_l1(part, largest) for part in delta.split(7))


@few
@given(seed=seeds, count=st.integers(1, 3000), exponent=st.integers(-60, 60))
def test_exact_l1_is_close_to_the_float64_sum(seed, count, exponent):
    delta = normal(count, seed) * 2.0**exponent
    largest = delta.abs().max()
    total = exact_l1(delta, largest).item() * largest.double().item() / 2**30
    assert total == pytest.approx(delta.double().abs().sum().item(), rel=1e-8)


def test_exact_l1_of_zeros_is_zero():
    assert exact_l1(torch.zeros(5), torch.tensor(0.0)) == 0


# largest_magnitudes


@few
@given(values=st.lists(st.integers(-6, 6), min_size=1, max_size=60), data=st.data())
def test_largest_magnitudes_keeps_that_many_and_all_that_tie_with_the_smallest(values, data):
    count = data.draw(st.integers(1, len(values)))
    delta = torch.tensor(values, dtype=torch.float32)
    mask = largest_magnitudes(delta, count)
    threshold = sorted(map(abs, values), reverse=True)[count - 1]
    assert mask.tolist() == [abs(value) >= threshold for value in values]
    assert mask.sum() >= count


@few
@given(seed=seeds, count=st.integers(1, 60))
def test_largest_magnitudes_keeps_the_shape_and_exactly_that_many_where_none_tie(seed, count):
    delta = normal(60, seed).view(3, 4, 5)
    mask = largest_magnitudes(delta, count)
    assert mask.shape == delta.shape
    assert mask.sum() == count


# divisor


def test_a_negligible_divisor_counts_as_one():
    assert [divisor(value) for value in (0.0, 9e-9, -9e-9)] == [1.0] * 3
    assert divisor(-0.5) == -0.5


# checksum


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_checksum_changes_with_any_single_bit(dtype, data, seed):
    tensor = normal(200, seed, dtype)
    bits = tensor.view(INTEGERS[dtype])
    place = data.draw(st.integers(0, 199))
    width = 8 * tensor.element_size()
    flip = data.draw(st.integers(0, width - 1))
    before = checksum(tensor, "tensor").item()
    bits[place] ^= (1 << flip) if flip < width - 1 else -(1 << flip)
    assert checksum(tensor, "tensor").item() != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_of_a_small_tensor_goes_unnoticed(dtype):
    tensor = normal(64, 1, dtype)
    bits, width = tensor.view(INTEGERS[dtype]), 8 * tensor.element_size()
    found = {checksum(tensor, "tensor").item()}
    for place, flip in itertools.product(range(64), range(width)):
        mask = (1 << flip) if flip < width - 1 else -(1 << flip)
        bits[place] ^= mask
        found.add(checksum(tensor, "tensor").item())
        bits[place] ^= mask
    assert len(found) == 1 + 64 * width


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_checksum_changes_with_a_swap_of_unequal_elements(dtype, data, seed):
    tensor = normal(2000, seed, dtype)
    a, b = data.draw(st.tuples(st.integers(0, 1999), st.integers(0, 1999)))
    assume(tensor[a] != tensor[b])
    swapped = tensor.clone()
    swapped[a], swapped[b] = tensor[b], tensor[a]
    assert checksum(swapped, "tensor") != checksum(tensor, "tensor")


def test_the_checksum_changes_with_name_shape_and_dtype():
    tensor = torch.zeros(6)
    others = [
        checksum(tensor, "other"),
        checksum(tensor.view(2, 3), "tensor"),
        checksum(tensor.view(3, 2), "tensor"),
        checksum(torch.zeros(7), "tensor"),
        *(checksum(tensor.to(dtype), "tensor") for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    ]
    assert len({checksum(tensor, "tensor").item(), *(other.item() for other in others)}) == 8


def test_the_checksum_sees_the_values_not_the_layout_in_memory():
    tensor = normal(35).view(5, 7)
    assert checksum(tensor.t().contiguous().t(), "tensor") == checksum(tensor, "tensor")
    assert checksum(torch.nn.Parameter(tensor), "tensor") == checksum(tensor, "tensor")
    assert checksum(torch.tensor(1.0), "scalar") != checksum(torch.tensor(2.0), "scalar")


def test_neither_checksums_nor_fields_nor_norms_depend_on_the_number_of_threads():
    tensor, before, found = normal(300_001), torch.get_num_threads(), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        field = uniform_field(0, 0, "tensor", 300_001, "cpu")
        found.add((checksum(tensor, "t").item(), checksum(field, "f").item(), exact_l1(tensor, tensor.max()).item()))
    torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_changes_no_kernel():
    tensor = normal(100_003)
    assert torch.equal(uniform_field(3, 1, "t", 100_003, "cpu"), uniform_field(3, 1, "t", 100_003, "cuda").cpu())
    assert checksum(tensor, "t").item() == checksum(tensor.cuda(), "t").item()
    assert exact_l1(tensor, tensor.max()).item() == exact_l1(tensor.cuda(), tensor.cuda().max()).item()


# fingerprint


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_has_16_digits_and_does_not_depend_on_the_order_of_tensors(dtype):
    tensors = {f"tensor{index}": normal(50, index, dtype) for index in range(5)}
    found = fingerprint(tensors)
    assert len(found) == 16
    assert int(found, 16) >= 0
    assert fingerprint(dict(reversed(tensors.items()))) == found


def test_a_fingerprint_changes_when_two_tensors_trade_places():
    a, b = normal(50, 0), normal(50, 1)
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})


def test_the_fingerprint_is_what_it_always_was():
    """Recipes record it."""
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": -torch.arange(5.0).bfloat16()}
    assert fingerprint(tensors) == "86d780b4a9ba58ae"
