"""Optimizers of paths and of mixed genes: the contract, what their moves do, and that they search."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.config.running import OptimizerConfig
from evomerge.config.spaces import DataFlowConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.make import make_optimizer, resolve
from evomerge.optimizers.path_evolution import crossed, mutated
from evomerge.optimizers.ranking import Ranking
from evomerge.spaces import Gene, Genome, categorical
from evomerge.spaces.data_flow import DataFlowSpace
from evomerge.spaces.paths import PathGenes, Step, path_genes
from tests.contracts.optimizer import OptimizerContract, genes, mixed_genes

LAYERS = 6


def flow(**settings: object) -> DataFlowSpace:
    config = DataFlowConfig.model_validate({"kind": "data_flow"} | settings)
    return DataFlowSpace(config, "base", {"a": "a", "b": "b"}, LAYERS, "llama")


def path_and_more() -> tuple[Gene, ...]:
    """Four steps over two models of three layers, with scales, and genes of other kinds."""
    scale = Gene("scale", "scale", "scale", -1.0, 1.5, 1.0, 0.1)
    path = path_genes([f"{model}:{layer}" for model in "ab" for layer in range(3)], 4, scale)
    return (*path, categorical("head", "donor", "head", ("a", "b"), "a"), *genes()[:1])


class TestCatCma(OptimizerContract):
    config = OptimizerConfig(name="cat_cma", population=8)


class TestCatCmaWithChoices(OptimizerContract):
    config = OptimizerConfig(name="cat_cma", population=8)
    genes, start = mixed_genes(), None


class TestCatCmaOfChoicesAlone(OptimizerContract):
    config = OptimizerConfig(name="cat_cma", population=8)
    genes = tuple(categorical(f"gate{i}", "gate", f"slot{i}", ("closed", "open"), "open") for i in range(6))
    start = None


@pytest.mark.filterwarnings("error")
class TestPathEvolution(OptimizerContract):
    config = OptimizerConfig(name="path_evolution", population=8)
    genes = path_and_more()[:6]
    start = None


def closeness(space: DataFlowSpace, genomes: Genome) -> NDArray[np.float64]:
    """How much of a hidden path (a's first three layers, two of them again, b's last three) genomes share with it, as
    pairs of neighbors; and how near 1.2 their scales are."""
    wanted = [("a", 0), ("a", 1), ("a", 2), ("a", 1), ("a", 2), ("b", 3), ("b", 4), ("b", 5)]
    pairs, found = set(pairwise(wanted)), []
    for genome in genomes:
        hops = space.path(genome).hops
        names = [(hop.model, hop.layer) for hop in hops]
        share = len(pairs & set(pairwise(names))) / max(len(pairs), len(names) - 1)
        found.append([share - 0.5 * float(np.mean([(hop.scale - 1.2) ** 2 for hop in hops]))])
    return np.array(found)


def best_after(space: DataFlowSpace, name: str, evaluations: int, seed: int) -> float:
    config = resolve(OptimizerConfig.model_validate({"name": name}), len(space.genes), 1, space.genes)
    start = space.encode({"a": 1.0})
    problem = Problem(space.genes, start, seed, Ranking(np.ones(1), elite=False), None, space.draw)
    optimizer, best, done = make_optimizer(config, problem), -np.inf, 0
    while done < evaluations:
        genomes = optimizer.ask()
        told = closeness(space, genomes)
        optimizer.tell(genomes, told)
        best, done = max(best, float(told.max())), done + len(genomes)
    return best


def test_the_default_beats_random_paths_at_equal_budget():
    space = flow(scale={"low": 0.5, "high": 1.5})
    assert resolve(OptimizerConfig(), len(space.genes), 1, space.genes).name == "path_evolution"
    median = {
        which: np.median([best_after(space, which, 240, seed) for seed in range(3)])
        for which in ("auto", "random_search")
    }
    assert median["auto"] > median["random_search"]


def test_moves_keep_to_the_blocks_that_are_there_and_the_places_that_there_are():
    space = flow(granularity=2, max_layers=12, scale={"low": 0.5, "high": 1.5})
    places = PathGenes(space.genes)
    random = np.random.default_rng(0)
    path, other = places.read(space.encode({"a": 1.0})), places.read(space.encode({"b": 1.0}))
    for _ in range(400):
        path = mutated(places, crossed(places, path, other, random) if random.random() < 0.2 else path, random)
        assert 0 < len(path) <= len(places)
        assert all(1 <= step.block <= 6 and 0.5 <= step.scale <= 1.5 for step in path)


def test_a_crossing_goes_on_at_the_layer_that_follows():
    space = flow()
    places = PathGenes(space.genes)
    path, other = places.read(space.encode({"a": 1.0})), places.read(space.encode({"b": 1.0}))
    for seed in range(10):
        child = crossed(places, path, other, np.random.default_rng(seed))
        cut = sum(places.models[step.block] == 0 for step in child)
        assert [places.layers[step.block] for step in child] == list(range(LAYERS))
        assert [places.models[step.block] for step in child] == [0] * cut + [1] * (LAYERS - cut)


def test_once_a_path_has_lasted_half_a_generation_tunes_its_scales():
    space = flow(scale={"low": 0.5, "high": 1.5})
    places, start = PathGenes(space.genes), space.encode({"a": 1.0})
    config = resolve(OptimizerConfig(name="path_evolution"), len(space.genes), 1, space.genes)
    optimizer = make_optimizer(config, Problem(space.genes, start, 1, Ranking(np.ones(1), elite=False)))
    for _ in range(6):
        genomes = optimizer.ask()
        same = np.array([np.array_equal(places.blocks_of(genome), places.blocks_of(start)) for genome in genomes])
        nearness = [-np.mean([(step.scale - 1.2) ** 2 for step in places.read(genome)]) for genome in genomes]
        optimizer.tell(genomes, np.where(same, np.array(nearness), -9.0)[:, None])
    assert same[:4].all()
    assert not same.all()
    assert places.read(genomes[0]) != [Step(step.block) for step in places.read(start)]
