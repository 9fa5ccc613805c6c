"""Stages: periods of a search in which only some kinds of genes move, each starting at the best candidate so far."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evomerge.config.running import OptimizerConfig, StageConfig
from evomerge.optimizers.base import Optimizer, Problem
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.pending import Pending
from evomerge.optimizers.ranking import Incumbent
from evomerge.optimizers.scaling import Scaling
from evomerge.spaces import Genome, active, canonical


class StagedOptimizer:
    """Runs an optimizer on the genes of one stage after the other; all other genes stay at the stage's start."""

    def __init__(
        self, config: OptimizerConfig, problem: Problem, maker: Callable[[OptimizerConfig, Problem], Optimizer]
    ) -> None:
        self._config, self._problem, self._maker = config, problem, maker
        self._best = Incumbent(problem.start)
        self._pending: Pending[tuple[Optimizer, Genome]] = Pending()
        self._stage = -1
        self._enter_next()

    def _enter_next(self) -> None:
        self._stage += 1
        stage = self._config.stages[self._stage]
        self._start = self._best.genome
        self._moves = self._movable(stage)
        genes = tuple(gene for gene, moves in zip(self._problem.genes, self._moves, strict=True) if moves)
        self._scaling = Scaling(genes, self._start[self._moves]) if stage.scaled else None
        problem = Problem(
            genes=genes if self._scaling is None else self._scaling.genes,
            start=self._start[self._moves] if self._scaling is None else self._scaling.start,
            seed=self._problem.seed + 7919 * self._stage,
            ranking=self._problem.ranking,
        )
        own = {"name": stage.name, "population": stage.population} if stage.name is not None else {}
        self._optimizer = self._maker(self._config.model_copy(update=own), problem)
        self._asked = 0

    def _movable(self, stage: StageConfig) -> NDArray[np.bool_]:
        """A mask of the stage's genes that can count while all others stay; of all its genes where none can."""
        genes = self._problem.genes
        wanted = np.array([gene.kind in stage.genes for gene in genes])
        moving = {gene.name for gene, moves in zip(genes, wanted, strict=True) if moves}
        settled = [tuple(condition for condition in gene.when if condition.gene not in moving) for gene in genes]
        fixed = [replace(gene, when=conditions) for gene, conditions in zip(genes, settled, strict=True)]
        movable = wanted & active(fixed, self._start)
        return movable if movable.any() else wanted

    def _left(self, stage: StageConfig) -> bool:
        last = self._stage == len(self._config.stages) - 1
        return last or stage.evaluations is None or self._asked < stage.evaluations

    def ask(self) -> Genome:
        """The next generation of the present stage (see `Optimizer`)."""
        if not self._left(self._config.stages[self._stage]):
            self._enter_next()
        asked = self._optimizer.ask()
        self._asked += len(asked)
        generation = np.tile(self._start, (len(asked), 1))
        generation[:, self._moves] = asked if self._scaling is None else self._scaling.expanded(asked)
        generation = canonical(self._problem.genes, generation)
        own = generation[:, self._moves] if self._scaling is None else asked
        self._pending.add(generation, [(self._optimizer, genome) for genome in own])
        return generation

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes scores (see `Optimizer`), and passes on those of the present stage."""
        self._best.offer(genomes, self._problem.ranking.means(scores))
        owners = self._pending.take(genomes)
        present = np.array([optimizer is self._optimizer for optimizer, _ in owners])
        if not present.all():  # some are of a stage that is over
            self._problem.ranking.observe(scores[~present])
        if present.any():
            told = np.stack([genome for (_, genome), here in zip(owners, present, strict=True) if here])
            self._optimizer.tell(told, scores[present])
