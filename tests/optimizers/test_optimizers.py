from typing import Any

import numpy as np
import pytest

from evomerge.config.running import OptimizerConfig, StageConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.make import make_optimizer, resolve
from evomerge.optimizers.random_search import random_genome
from evomerge.optimizers.ranking import Ranking
from evomerge.spaces import Condition, Gene, active, categorical
from tests.contracts.optimizer import DIMENSION, OptimizerContract, genes, mixed_genes, scores


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


class TestCmaEsWithChoices(OptimizerContract):
    config = OptimizerConfig(name="cma_es", population=8)
    genes, start = mixed_genes(), None


class TestGroupEvolutionWithChoices(OptimizerContract):
    config = OptimizerConfig(name="group_evolution", population=3)
    genes, start = mixed_genes(), None


class TestRandomSearchWithChoices(OptimizerContract):
    config = OptimizerConfig(name="random_search")
    genes, start = mixed_genes(), None


class TestStagesWithChoices(OptimizerContract):
    config = OptimizerConfig(
        population=8,
        stages=(StageConfig(genes=("method", "take"), evaluations=24), StageConfig(genes=("weight", "steps"))),
    )
    genes, start = mixed_genes(), None


MEMBERS = tuple(categorical(f"take:{name}", "take", "models", ("out", "in"), "in") for name in "abcdef")


class TestGreedySoup(OptimizerContract):
    config = OptimizerConfig(name="greedy_soup")
    genes, start, lag = MEMBERS, None, 0

    def test_another_seed_gives_other_proposals(self) -> None:
        """It draws nothing."""
        assert np.array_equal(self.make(1).ask(), self.make(2).ask())

    def test_a_generation_in_which_everything_failed_does_not_stop_it(self) -> None:
        optimizer = self.make()
        for index in range(len(MEMBERS)):
            genomes = optimizer.ask()
            assert genomes.sum() == 1, f"nothing was kept, so model {index} stands alone"
            optimizer.tell(genomes, np.full((1, 2), np.nan))
        assert optimizer.ask().shape == (0, len(MEMBERS))


def greedy_soup(values: np.ndarray[tuple[int], np.dtype[np.float64]], order: list[int]) -> list[list[int]]:
    """What Wortsman et al.'s recipe 1 tries, as the paper's pseudocode has it, with a soup's value in `values`."""
    ingredients: list[int] = []
    tried, best = [], -np.inf
    for model in order:
        soup = [*ingredients, model]
        tried.append(sorted(soup))
        value = values[sum(1 << index for index in soup)]
        if value >= best:
            ingredients, best = soup, value
    return tried


@pytest.mark.parametrize("seed", range(8))
def test_a_greedy_soup_tries_what_the_paper_s_pseudocode_tries(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 12, 64) / 12.0  # with ties
    bits = 2 ** np.arange(6)
    alone = np.eye(6)
    known = (alone, values[bits][:, np.newaxis])
    ranking = Ranking(np.ones(1), elite=False)
    problem = Problem(MEMBERS, np.ones(6), seed, ranking, known)
    optimizer = make_optimizer(resolve(OptimizerConfig(name="greedy_soup"), 6, 1), problem)
    tried = []
    while len(genomes := optimizer.ask()):
        optimizer.tell(genomes, values[(genomes @ bits).astype(int)][:, np.newaxis])
        tried.append(np.flatnonzero(genomes[0]).tolist())
    order = sorted(range(6), key=lambda index: -values[1 << index])
    assert tried == greedy_soup(values, order)


@pytest.mark.parametrize("name", ["cma_es", "group_evolution", "random_search"])
def test_every_choice_is_tried_and_a_choice_that_wins_is_found(name: str) -> None:
    config = resolve(OptimizerConfig.model_validate({"name": name}), DIMENSION, 1)
    start = np.array([gene.start for gene in mixed_genes()])
    optimizer = make_optimizer(config, Problem(mixed_genes(), start, 4, Ranking(np.ones(1), elite=False)))
    seen: set[float] = set()
    best = (-np.inf, start)
    for _ in range(40):
        genomes = optimizer.ask()
        seen |= set(genomes[:, 0])
        told = np.where(genomes[:, 0] == 3, 2.0, 0.0) - np.abs(genomes[:, 2] - 4) / 4
        best = max(best, (float(told.max()), genomes[told.argmax()]), key=lambda pair: pair[0])
        optimizer.tell(genomes, told[:, np.newaxis])
    assert seen == {0, 1, 2, 3}
    assert best[1][[0, 2]].tolist() == [3, 4]


def test_group_evolution_tries_a_method_with_other_numbers_each_time() -> None:
    method = categorical("method", "method", "method", ("linear", "slerp"), "linear")
    t = Gene("slerp.t", "slerp.t", "all", 0.0, 1.0, 0.5, 0.2, when=(Condition("method", ("slerp",)),))
    problem = Problem((method, t), np.array([0.0, 0.5]), 1, Ranking(np.ones(1), elite=False))
    optimizer = make_optimizer(resolve(OptimizerConfig(name="group_evolution", population=20), 2, 1), problem)
    tried = [tuple(genome) for genome in optimizer.ask()[1:]]
    assert {method for method, _ in tried} == {1.0}
    assert len(set(tried)) > 15


def test_a_stage_leaves_out_genes_that_its_start_makes_idle() -> None:
    stages = (StageConfig(genes=("weight",)),)
    start = np.array([3.0, 0.0, 2.0, 0.5, 0.5, 0.5])  # method d without math, so only the first weight counts
    problem = Problem(mixed_genes(), start, 1, Ranking(np.ones(1), elite=False))
    assert active(mixed_genes(), start)[3:].tolist() == [True, False, False]
    config = resolve(OptimizerConfig(name="group_evolution", population=30, stages=stages), DIMENSION, 1)
    generation = make_optimizer(config, problem).ask()
    assert (generation[1:, 3] != 0.5).all(), "no candidate is wasted on a weight that does not count"


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
    config = resolve(OptimizerConfig(name="cma_es", population=6), DIMENSION, 1)
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


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [({"evaluations": 599}, "group_evolution"), ({"evaluations": 600}, "cma_es"), ({"equivalents": 600}, "cma_es")],
)
def test_numbers_are_left_to_the_optimizer_that_is_ahead_with_such_a_budget(
    budget: dict[str, int], chosen: str
) -> None:
    config = OptimizerConfig.model_validate(budget)
    assert resolve(config, DIMENSION, 1, genes()).name == chosen


def test_automatic_choices_do_not_change_when_a_search_with_many_evaluations_is_extended() -> None:
    chosen = resolve(OptimizerConfig(evaluations=300), dimension=20, objectives=2)
    longer = resolve(chosen.model_copy(update={"evaluations": 3000}), dimension=20, objectives=2)
    assert longer == chosen.model_copy(update={"evaluations": 3000})


@pytest.mark.parametrize("name", ["cma_es", "cat_cma", "group_evolution", "random_search"])
def test_genomes_may_be_told_one_by_one_in_any_order(name: str) -> None:
    """And where the order is that of asking, a generation at once is the same as one by one."""
    config = resolve(OptimizerConfig.model_validate({"name": name, "population": 6}), DIMENSION, 2)

    def make() -> Any:
        return make_optimizer(config, Problem(genes(), np.full(DIMENSION, 0.5), 3, Ranking(np.ones(2), elite=True)))

    single, whole, shuffled = make(), make(), make()
    for _ in range(4):
        genomes = [single.ask(), whole.ask()]
        assert np.array_equal(*genomes)
        whole.tell(genomes[0], scores(genomes[0]))
        for genome in genomes[0]:
            single.tell(genome[np.newaxis], scores(genome[np.newaxis]))
    pending = np.concatenate([shuffled.ask() for _ in range(5)])
    for index in np.random.default_rng(0).permutation(len(pending)):
        shuffled.tell(pending[[index]], scores(pending[[index]]))
    assert np.isfinite(shuffled.ask()).all()
