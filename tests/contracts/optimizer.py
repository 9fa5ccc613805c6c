"""What every optimizer must do."""

import numpy as np
from numpy.typing import NDArray

from evomerge.config.running import OptimizerConfig
from evomerge.optimizers.base import Optimizer, Problem
from evomerge.optimizers.make import make_optimizer, resolve
from evomerge.optimizers.ranking import Ranking
from evomerge.spaces import Condition, Gene, Genome, canonical, categorical

DIMENSION, OBJECTIVES = 6, 2


def genes() -> tuple[Gene, ...]:
    return tuple(
        Gene(f"gene{i}", "weight" if i < 4 else "density", f"group{i // 2}", -1.0, 1.0 + i, 0.0, 0.2)
        for i in range(DIMENSION)
    )


def mixed_genes() -> tuple[Gene, ...]:
    """A choice of four, a choice of two, a whole number, and three numbers of which two count only sometimes."""
    method = categorical("method", "method", "method", ("a", "b", "c", "d"), "b")
    take = categorical("take:math", "take", "models", ("out", "in"), "in", (Condition("method", ("b", "c", "d")),))
    steps = Gene("steps", "steps", "method", 1.0, 5.0, 2.0, 1.0, integer=True)
    numbers = tuple(
        Gene(f"weight{i}", "weight", f"group{i}", 0.0, 1.5, 0.5, 0.3, when=when)
        for i, when in enumerate([(), (Condition("method", ("b", "c")),), (Condition("take:math", ("in",)),)])
    )
    return (method, take, steps, *numbers)


def scores(genomes: Genome) -> NDArray[np.float64]:
    """Two smooth conflicting objectives, larger is better."""
    optimum = np.linspace(0.2, 0.9, DIMENSION)
    return np.stack([-((genomes - optimum) ** 2).sum(1), -((genomes - optimum / 2) ** 2).sum(1)], axis=1)


class OptimizerContract:
    """To test an optimizer that learns from scores: subclass, and set `config`."""

    config: OptimizerConfig
    genes: tuple[Gene, ...] = genes()
    start: float | None = 0.5
    lag = 1

    def make(self, seed: int = 3) -> Optimizer:
        ranking = Ranking(np.ones(OBJECTIVES), elite=True)
        start = np.array([gene.start if self.start is None else self.start for gene in self.genes])
        problem = Problem(self.genes, start, seed, ranking)
        return make_optimizer(resolve(self.config, DIMENSION, OBJECTIVES), problem)

    def proposals(self, optimizer: Optimizer, generations: int) -> list[Genome]:
        """Asks and tells pipelined, with one failure in every generation, while there is something left to try."""
        asked = [optimizer.ask() for _ in range(self.lag + 1)]
        for generation in range(generations):
            if not len(asked[generation]):
                break
            told = scores(asked[generation])
            told[generation % len(told)] = np.nan
            optimizer.tell(asked[generation], told)
            asked.append(optimizer.ask())
        return asked

    def test_proposals_stay_inside_the_box_and_are_canonical(self) -> None:
        low, high = np.array([gene.low for gene in self.genes]), np.array([gene.high for gene in self.genes])
        for genomes in self.proposals(self.make(), 12):
            assert genomes.shape[1] == DIMENSION
            assert (genomes >= low).all()
            assert (genomes <= high).all()
            assert np.array_equal(genomes, canonical(self.genes, genomes))

    def test_the_same_seed_and_scores_give_the_same_proposals_whatever_else_draws_random_numbers(self) -> None:
        first = self.proposals(self.make(), 8)
        optimizer = self.make()
        np.random.seed(99)
        second = self.proposals(optimizer, 4)
        np.random.random(7)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=False))

    def test_another_seed_gives_other_proposals(self) -> None:
        assert not np.array_equal(self.make(1).ask()[1:], self.make(2).ask()[1:])

    def test_a_generation_in_which_everything_failed_does_not_stop_it(self) -> None:
        optimizer = self.make()
        for _ in range(3):
            genomes = optimizer.ask()
            optimizer.tell(genomes, np.full((len(genomes), OBJECTIVES), np.nan))
        assert np.isfinite(optimizer.ask()).all()

    def test_told_arrays_are_left_alone(self) -> None:
        optimizer = self.make()
        genomes = optimizer.ask()
        told = scores(genomes)
        before = genomes.copy(), told.copy()
        optimizer.tell(genomes, told)
        assert np.array_equal(genomes, before[0])
        assert np.array_equal(told, before[1])
