"""Bounds of single models hold for every candidate, and leave the genes of other models as they were."""

from typing import Any

import numpy as np
import pytest

from evomerge.config.files import load
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from tests.contracts.space import SpaceContract
from tests.searches import WriteSearch
from tests.spaces.test_parameter import TENSORS, make_space, parameters

BOUNDS: dict[str, Any] = {"math": {"weight": {"low": 0.3}}, "lang": {"weight": {"low": -1, "high": 0}}}


class TestBoundsByModel(SpaceContract):
    space = make_space(method="task_arithmetic", layer_granularity=2, models=BOUNDS)
    tensors = TENSORS


def test_a_model_keeps_its_floor_and_another_its_negative_weights_in_every_tensor() -> None:
    space = make_space(method="task_arithmetic", layer_granularity=2, models=BOUNDS)
    random = np.random.default_rng(3)
    for genome in [space.encode({"lang": 1.0}), *(space.draw(random) for _ in range(20))]:
        for weights in parameters(space, genome).values():
            assert weights["path/math"] >= 0.3
            assert -1 <= weights["path/lang"] <= 0


def test_other_genes_stay_as_they_were() -> None:
    usual, bounded = make_space().genes, make_space(models={"math": {"density": {"low": 0.5}}}).genes
    changed = [(one, other) for one, other in zip(usual, bounded, strict=True) if one != other]
    assert {tuple(other.name.split(":")[:2]) for _, other in changed} == {("density", "math")}
    assert all(other.low == 0.5 and other.high == one.high for one, other in changed)


def test_a_weight_may_be_fixed_for_one_model_alone_and_freed_for_one_alone() -> None:
    fixed = make_space(method="linear", models={"math": {"weight": {"fixed": 0.8}}})
    assert {gene.name.split(":")[1] for gene in fixed.genes} == {"lang"}
    genome = fixed.draw(np.random.default_rng(0))
    assert {weights["path/math"] for weights in parameters(fixed, genome).values()} == {0.8}
    freed = make_space(method="linear", weight={"fixed": 1.0}, models={"math": {"weight": {"low": 0.5}}})
    assert {gene.name.split(":")[1] for gene in freed.genes} == {"math"}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"maths": {"weight": {"low": 0}}}, r"^space.models.maths is none of the models; did you mean 'math'"),
        (
            {"math": {"weight": {"low": 2}}},
            r"^space.models.math.weight: low is 2; use a value below high, which is 1.5",
        ),
        ({"math": {"density": {"low": 0}}}, r"^space.models.math.density.low is 0; use a value in \(0, 1\]"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(models: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_space(models=models)


def test_a_space_without_bounds_by_model_keeps_its_digest(search_file: WriteSearch) -> None:
    plain, empty, bounded = (load(search_file(space=space)) for space in ({}, {"models": {}}, {"models": BOUNDS}))
    assert plain.digest() == empty.digest() != bounded.digest()
    before = plain.model_dump(mode="json")
    del before["space"]["models"]
    assert SearchConfig.model_validate(before).digest() == plain.digest()
