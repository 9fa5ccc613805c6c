"""Row weights beside models whose rows are weighted before they are merged."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.merging import methods
from evomerge.merging.methods.base import Kind, Statistic
from evomerge.merging.methods.parts import part_of
from evomerge.merging.methods.rows import RowWeighted, per_element, row_count, row_slopes, row_weighted
from tests.merging.methods.autograd import with_weighted_rows
from tests.merging.methods.test_slopes import inputs_of


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_ties", "ties", "breadcrumbs", "nuslerp", "fisher", "wudi"])
def test_a_method_with_rows_merges_models_whose_rows_are_weighted(name: str) -> None:
    row = methods.get(f"{name}+rows", "here")
    inputs = inputs_of(row, {}, torch.float32)
    assert row.merge(inputs) == pytest.approx(methods.get(name, "here").merge(with_weighted_rows(inputs)), abs=2e-5)
    assert row.merge(inputs) != pytest.approx(methods.get(name, "here").merge(inputs), abs=1e-3)


def test_weights_of_1_change_nothing_but_the_last_place() -> None:
    row = methods.get("task_arithmetic+rows", "here")

    def ones(kind: Kind, index: int) -> Statistic:
        return Statistic(torch.ones(row_count(inputs.tensors[0].shape, True)))

    inputs = inputs_of(row, {}, torch.float32)
    inputs = replace(inputs, statistic=ones)
    assert row.merge(inputs) == pytest.approx(methods.get("task_arithmetic", "here").merge(inputs), abs=1e-6)


def test_a_tensor_without_weights_stays_as_it_is() -> None:
    row = methods.get("task_arithmetic+rows", "here")
    inputs = replace(inputs_of(row, {}, torch.float32), statistic=lambda kind, index: None)
    assert torch.equal(row.merge(inputs), methods.get("task_arithmetic", "here").merge(inputs))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans(), st.integers(0, 60), st.integers(1, 60))
@settings(deadline=None)
def test_any_piece_of_weighted_rows_is_that_of_the_whole(
    shape: list[int], in_layer: bool, first: int, length: int
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    base, tensor = torch.randn((2, *shape), generator=generator)
    numbers = torch.rand(row_count(shape, in_layer), generator=generator)
    made = RowWeighted(base, tensor, numbers)
    count = base.numel()
    piece = slice(min(first, count - 1), min(first + length, count))
    whole = made.part(slice(0, count))
    assert torch.equal(made.part(piece), whole[piece])
    own = numbers.view(*base.shape[:-1], 1) if len(numbers) > 1 else numbers
    assert torch.equal(whole, (own * (tensor - base) + base).reshape(-1))
    assert per_element(numbers, count, piece).numel() in (1, piece.stop - piece.start)
    assert torch.equal(part_of(tensor, piece), tensor.reshape(-1)[piece])  # the model itself is not written over


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_a_tensor_without_elements_has_weights_all_the_same(shape: tuple[int, ...]) -> None:
    row = methods.get("task_arithmetic+rows", "here")
    empty, numbers = torch.empty(shape), torch.ones(row_count(shape, True))
    inputs = replace(inputs_of(row, {}, torch.float32), base=empty, statistic=lambda *_: Statistic(numbers))
    inputs = replace(inputs, tensors=(empty,) * len(inputs.tensors))
    assert row.merge(inputs).shape == shape
    slopes = row_slopes(inputs, empty)
    assert [own.tolist() for own in slopes.values()] == [[0.0] * len(numbers)] * len(inputs.tensors)


@pytest.mark.parametrize("wrong", [(1,), (2,), (2, 3)])
def test_another_number_of_weights_than_a_tensor_has_rows_is_refused(wrong: tuple[int, ...]) -> None:
    row = methods.get("task_arithmetic+rows", "here")
    inputs = replace(inputs_of(row, {}, torch.float32), statistic=lambda *_: Statistic(torch.ones(wrong)))
    rows = inputs.tensors[0].shape[0]
    with pytest.raises(InputError, match=rf"has weights of shape {re.escape(str(list(wrong)))}, expected \[{rows}\]"):
        row.merge(inputs)


@pytest.mark.parametrize("in_layer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derivatives_by_rows_are_those_of_autograd(in_layer: bool, dtype: torch.dtype) -> None:
    inputs = replace(inputs_of(methods.get("task_arithmetic+rows", "here"), {}, dtype), in_layer=in_layer)
    assert inputs.base is not None
    gradient = torch.randn(inputs.base.shape, generator=torch.Generator().manual_seed(1))
    rows = row_count(inputs.base.shape, in_layer)
    leaves = [torch.ones(rows, dtype=torch.float64, requires_grad=True) for _ in inputs.tensors]
    changes = [
        leaf.view(-1, 1) * (tensor.float() - inputs.base.float()).double()
        for leaf, tensor in zip(leaves, inputs.tensors, strict=True)
    ]
    torch.autograd.backward((torch.stack(changes).sum(dim=0) * gradient.double()).sum())
    measured = row_slopes(inputs, gradient)
    assert measured.keys() == {("weight", index) for index in range(len(leaves))}
    for index, leaf in enumerate(leaves):
        assert measured["weight", index] == pytest.approx(leaf.grad, rel=1e-9, abs=1e-12)


def test_what_is_kept_of_weighted_rows_is_kept_apart() -> None:
    kept: dict[Any, Any] = {}

    def once(what: Any, names: tuple[int, ...], make: Any, /) -> Any:
        if (what, names) not in kept:
            kept[what, names] = make()
        return kept[what, names]

    plain = replace(inputs_of(methods.get("ties", "here"), {}, torch.float32), once=once)
    weighted = replace(inputs_of(methods.get("ties+rows", "here"), {}, torch.float32), once=once)
    alone = methods.get("ties+rows", "here").merge(inputs_of(methods.get("ties+rows", "here"), {}, torch.float32))
    methods.get("ties", "here").merge(plain)
    assert torch.equal(methods.get("ties+rows", "here").merge(weighted), alone)
    assert row_weighted(weighted).once is not once


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("linear+rows", "linear sets no base apart"),
        ("ties+row", "'row' is no known step; did you mean 'rows'"),
        ("ties+aim+rows", "name each step once, in this order: rows, aim"),
        ("ties+rows+rows", "name each step once"),
    ],
)
def test_steps_that_a_method_cannot_have_are_refused(name: str, says: str) -> None:
    assert methods.find(name) is None
    with pytest.raises(InputError, match=says):
        methods.get(name, "merge_method")


def test_a_method_may_have_both_steps() -> None:
    row = methods.get("dare_ties+rows+aim", "here")
    assert (row.name, row.plain, row.mergekit) == ("dare_ties+rows+aim", "dare_ties", False)
    assert {need.kind for need in row.statistics} == {"row_weights", "activations"}
