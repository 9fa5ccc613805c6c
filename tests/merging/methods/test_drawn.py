"""Uniform numbers by counter: an independent hash gives the same, wherever a piece starts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.merging.methods.drawn import ROW, Drawn, field_part, key_of
from evomerge.merging.methods.kernels import uniform_field


def lowbias32(x):
    """Wellons 2018, on unsigned numbers."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def by_numpy(seed, position, name, indices):
    key = key_of(seed, position, name)
    low, high = np.frombuffer(key, dtype="<u4")
    blocks = (indices >> 32).astype(np.uint32) * np.uint32(0x9E3779B1)
    mixed = lowbias32(lowbias32(indices.astype(np.uint32) ^ low) + (blocks + high))
    return (mixed >> np.uint32(16)).astype(np.int64) - 32768


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    position=st.integers(0, 9),
    start=st.one_of(
        st.integers(0, 3 * ROW), st.integers(0, 2**31), st.sampled_from([2**31 - 5, 2**32 - 9000, 2**32, 2**33 + 77])
    ),
    count=st.integers(1, 2 * ROW + 3),
)
def test_every_piece_has_the_numbers_of_an_independent_hash(seed, position, start, count):
    field = Drawn(seed, position, "model.norm.weight")
    part = field_part(field, slice(start, start + count), torch.device("cpu"))
    assert part.dtype == torch.int16
    assert np.array_equal(
        part.numpy().astype(np.int64), by_numpy(seed, position, field.name, np.arange(start, start + count))
    )


@pytest.mark.parametrize("count", [1, ROW, 3 * ROW + 1, 1 << 17])
def test_a_field_that_is_kept_is_the_one_that_is_made_again(count):
    kept = uniform_field(3, 1, "tensor", count, "cpu")
    assert torch.equal(field_part(Drawn(3, 1, "tensor"), slice(0, count), torch.device("cpu")), kept)
    assert torch.equal(field_part(kept, slice(1, count), torch.device("cpu")), kept[1:])
