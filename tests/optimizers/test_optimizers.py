import numpy as np
import pytest

from evomerge.config import OptimizerConfig, StageConfig
from evomerge.optimizers import Problem, make_optimizer, resolve
from evomerge.optimizers.random_search import random_genome
from evomerge.optimizers.ranking import Ranking
from evomerge.spaces import Gene
from tests.contracts.optimizer import DIMENSION, OptimizerContract, genes, scores


class TestCmaEs(OptimizerContract):
    config = OptimizerConfig(name="cma_es", population=8)


class TestDiagonalCmaEs(OptimizerContract):
    config = OptimizerConfig(name="cma_es", population=8, covariance="diagonal", ranking="weighted_sum")


class TestGroupEvolution(OptimizerContract):
    config = OptimizerConfig(name="group_evolution")


class TestRandomSearch(OptimizerContract):
    config = OptimizerConfig(name="random_search")


class TestStages(OptimizerContract):
    config = OptimizerConfig(
        population=8,
        stages=(StageConfig(genes=("weight",), evaluations=24), StageConfig(genes=("weight", "density"))),
    )


def best_mean_after(config: OptimizerConfig, evaluations: int, seed: int) -> float:
    """The best weighted mean that an optimizer finds on the contract's problem."""
    ranking = Ranking(np.ones(2), elite=config.ranking == "elite")
    optimizer = make_optimizer(config, Problem(genes(), np.full(DIMENSION, 0.0), seed, ranking))
    best, done = -np.inf, 0
    while done < evaluations:
        genomes = optimizer.ask()
        told = scores(genomes)
        optimizer.tell(genomes, told)
        best, done = max(best, float(told.mean(axis=1).max())), done + len(genomes)
    return best


@pytest.mark.parametrize("name", ["cma_es", "group_evolution"])
def test_every_optimizer_beats_random_search_at_equal_budget(name: str) -> None:
    def median(which: str) -> float:
        config = resolve(OptimizerConfig.model_validate({"name": which}), DIMENSION, 2)
        return float(np.median([best_mean_after(config, 200, seed) for seed in range(5)]))

    assert median(name) > median("random_search")


def test_a_stage_moves_only_its_genes_and_the_next_starts_at_the_best() -> None:
    config = resolve(TestStages.config, DIMENSION, 2)
    start = np.full(DIMENSION, 0.5)
    optimizer = make_optimizer(config, Problem(genes(), start, 1, Ranking(np.ones(2), elite=False)))
    weights = np.array([gene.kind == "weight" for gene in genes()])
    best = (-np.inf, start)
    for _ in range(3):
        genomes = optimizer.ask()
        assert (genomes[:, ~weights] == 0.5).all()
        told = scores(genomes)
        leader = int(told.mean(axis=1).argmax())
        best = max(best, (float(told.mean(axis=1)[leader]), genomes[leader]), key=lambda pair: pair[0])
        optimizer.tell(genomes, told)
    moved = optimizer.ask()
    assert not (moved[:, ~weights] == 0.5).all()
    assert np.linalg.norm(moved.mean(axis=0) - best[1]) < np.linalg.norm(moved.mean(axis=0) - start)


def test_group_evolution_changes_one_group_of_the_best_so_far() -> None:
    config = resolve(OptimizerConfig(name="group_evolution", population=3), DIMENSION, 2)
    parent = np.full(DIMENSION, 0.5)
    optimizer = make_optimizer(config, Problem(genes(), parent, 1, Ranking(np.ones(2), elite=False)))
    first = optimizer.ask()
    assert np.array_equal(first[0], parent), "the start itself is scored, so that children have something to beat"
    groups = [gene.group for gene in genes()]
    for genomes in (first[1:], optimizer.ask()):
        for genome in genomes:
            assert len({group for group, changed in zip(groups, genome != parent, strict=True) if changed}) == 1


def test_cma_restarts_with_twice_the_population_when_it_has_converged() -> None:
    config = resolve(OptimizerConfig(population=6), DIMENSION, 1)
    tight = tuple(Gene(f"g{i}", "weight", "all", -1.0, 1.0, 0.0, 0.05) for i in range(DIMENSION))
    optimizer = make_optimizer(config, Problem(tight, np.zeros(DIMENSION), 1, Ranking(np.ones(1), elite=False)))
    sizes = []
    for _ in range(150):
        genomes = optimizer.ask()
        sizes.append(len(genomes))
        optimizer.tell(genomes, -((genomes - 0.3) ** 2).sum(axis=1, keepdims=True))
    assert sizes[0] == 6
    assert 12 in sizes


def test_random_genomes_depend_on_nothing_but_seed_and_index() -> None:
    later = random_genome(genes(), seed=5, index=9)
    assert np.array_equal(later, random_genome(genes(), seed=5, index=9))
    assert not np.array_equal(later, random_genome(genes(), seed=6, index=9))


def test_automatic_choices_do_not_change_when_a_search_with_many_evaluations_is_extended() -> None:
    chosen = resolve(OptimizerConfig(evaluations=300), dimension=20, objectives=2)
    longer = resolve(chosen.model_copy(update={"evaluations": 3000}), dimension=20, objectives=2)
    assert longer == chosen.model_copy(update={"evaluations": 3000})
