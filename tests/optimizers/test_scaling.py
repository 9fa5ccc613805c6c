"""Scaling: many weights as multiples of a start, one multiple for each model and group."""

import numpy as np
import pytest

from evomerge.config.running import OptimizerConfig, StageConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.make import make_optimizer, resolve
from evomerge.optimizers.ranking import Ranking
from evomerge.optimizers.scaling import Scaling
from evomerge.spaces import Condition, Gene, active, canonical, categorical
from tests.contracts.optimizer import OptimizerContract

TENSORS = {"embeddings": ["e"], "layer_0": ["a", "b", "c"], "layer_1": ["d", "f", "g"]}


def many() -> tuple[Gene, ...]:
    """A choice, weights of tensors in groups, densities of groups, and a weight that counts only with one choice."""
    method = categorical("method", "method", "method", ("linear", "ties"), "ties")
    weights = [
        Gene(f"weight:{model}:{tensor}", "weight", group, -0.5, 1.5, 0.5, 0.3, when=when)
        for group, tensors in TENSORS.items()
        for tensor in tensors
        for model, when in (("math", ()), ("lang", (Condition("method", ("ties",)),)))
    ]
    densities = [
        Gene(f"density:{model}:{group}", "density", group, 0.1, 1.0, 1.0, 0.03)
        for group in TENSORS
        for model in ("math", "lang")
    ]
    return (method, *weights, *densities)


def start(seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    random, genes = np.random.default_rng(seed), many()
    drawn = [random.uniform(gene.low, gene.high) for gene in genes]
    return canonical(genes, np.array([1.0, *drawn[1:]]))


@pytest.mark.parametrize("seed", range(5))
def test_where_all_factors_are_1_it_stands_exactly_for_the_start(seed: int) -> None:
    scaling = Scaling(many(), start(seed))
    assert np.array_equal(scaling.expanded(scaling.start[np.newaxis])[0], start(seed))


def test_there_is_one_factor_for_each_model_and_group_and_all_other_genes_are_as_they_were() -> None:
    genes = Scaling(many(), start()).genes
    factors = [gene for gene in genes if gene.kind == "weight"]
    assert [gene.name for gene in factors] == [
        f"factor:{model}:{group}" for group in TENSORS for model in ("math", "lang")
    ]
    assert [gene for gene in genes if gene.kind != "weight"] == [gene for gene in many() if gene.kind != "weight"]
    assert {(gene.low, gene.start, gene.high) for gene in factors} == {(0.5, 1.0, 1.5)}


def test_a_factor_multiplies_the_weights_of_its_model_and_group_and_nothing_else() -> None:
    at = start() / 2  # so that no product leaves the box
    at[0] = 1.0
    scaling, genes = Scaling(many(), at), many()
    at = canonical(genes, at)
    for index, fewer in enumerate(scaling.genes):
        if fewer.kind != "weight":
            continue
        moved = scaling.start.copy()
        moved[index] = 1.25
        _, model, group = fewer.name.split(":")
        mine = [gene.kind == "weight" and gene.group == group and f":{model}:" in gene.name for gene in genes]
        expected = np.where(mine, at * 1.25, at)
        assert np.array_equal(scaling.expanded(moved[np.newaxis])[0], canonical(genes, expected))


def test_what_it_stands_for_is_canonical_whatever_the_factors() -> None:
    scaling, genes, random = Scaling(many(), start()), many(), np.random.default_rng(4)
    low, high = (np.array([getattr(gene, end) for gene in scaling.genes]) for end in ("low", "high"))
    expanded = scaling.expanded(low + (high - low) * random.random((50, len(low))))
    assert np.array_equal(expanded, canonical(genes, expanded))


class TestScaledStages(OptimizerContract):
    """A stage by tensors first, and one with factors that starts where it ended."""

    genes = tuple(
        Gene(f"weight:m{i % 2}:t{i}", "weight", f"group{i // 4}", -1.0, 2.0, 0.5, 0.2)
        if i < 4
        else Gene(f"density:m{i}", "density", f"group{i}", -1.0, 2.0, 0.5, 0.2)
        for i in range(6)
    )
    config = OptimizerConfig(
        name="group_evolution",
        population=4,
        stages=(
            StageConfig(genes=("weight",), evaluations=8),
            StageConfig(genes=("weight", "density"), scaled=True),
        ),
    )


@pytest.mark.parametrize("name", ["group_evolution", "cma_es", "random_search"])
def test_a_scaled_stage_keeps_the_ratios_of_the_weights_at_its_start(name: str) -> None:
    genes, at = many(), start() / 3
    at[0] = 1.0
    at = canonical(genes, at)
    stages = (StageConfig(genes=("weight", "density"), scaled=True),)
    config = OptimizerConfig.model_validate({"name": name, "population": 6, "stages": stages})
    problem = Problem(genes, at, 2, Ranking(np.ones(1), elite=False))
    optimizer = make_optimizer(resolve(config, len(genes), 1, genes), problem)
    groups = {(gene.name.split(":")[1], gene.group) for gene in genes if gene.kind == "weight"}
    for _ in range(4):
        asked = optimizer.ask()
        for model, group in groups:
            mine = [gene.kind == "weight" and gene.group == group and f":{model}:" in gene.name for gene in genes]
            ratios = asked[:, mine] / at[mine]
            assert np.allclose(ratios, ratios[:, :1])
        assert active(genes, asked).all()
        optimizer.tell(asked, -np.abs(asked - 0.4).sum(axis=1, keepdims=True))


def test_a_scaled_stage_of_an_elite_evolution_first_tries_its_start() -> None:
    genes, at = many(), start(3)
    config = OptimizerConfig(
        name="group_evolution", population=4, stages=(StageConfig(genes=("weight",), scaled=True),)
    )
    problem = Problem(genes, at, 2, Ranking(np.ones(1), elite=False))
    asked = make_optimizer(resolve(config, len(genes), 1, genes), problem).ask()
    assert np.array_equal(asked[0], at)
