"""Stages: parts of a search that move only some kinds of genes, each starting at the best candidate told so far."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from evomerge.config import OptimizerConfig, StageConfig
from evomerge.optimizers import Maker, Optimizer, Problem
from evomerge.optimizers.ranking import Incumbent
from evomerge.pareto import Scores
from evomerge.spaces import Genome


class StagedOptimizer:
    """Runs the configured optimizer on one stage's genes after the other; the rest stay at the stage's start."""

    def __init__(self, config: OptimizerConfig, problem: Problem, maker: Maker) -> None:
        self._config, self._problem, self._maker = config, problem, maker
        self._best = Incumbent(problem.start)
        self._told_of: deque[tuple[Optimizer, NDArray[np.bool_]]] = deque()
        self._stage = -1
        self._enter_next()

    def _enter_next(self) -> None:
        self._stage += 1
        stage = self._config.stages[self._stage]
        self._moves = np.array([gene.kind in stage.genes for gene in self._problem.genes])
        self._start = self._best.genome
        part = Problem(
            genes=tuple(gene for gene in self._problem.genes if gene.kind in stage.genes),
            start=self._start[self._moves],
            seed=self._problem.seed + 7919 * self._stage,
            ranking=self._problem.ranking,
        )
        self._optimizer = self._maker(self._config, part)
        self._asked = 0

    def _left(self, stage: StageConfig) -> bool:
        last = self._stage == len(self._config.stages) - 1
        return last or stage.evaluations is None or self._asked < stage.evaluations

    def ask(self) -> Genome:
        if not self._left(self._config.stages[self._stage]):
            self._enter_next()
        moved = self._optimizer.ask()
        self._asked += len(moved)
        self._told_of.append((self._optimizer, self._moves))
        generation = np.tile(self._start, (len(moved), 1))
        generation[:, self._moves] = moved
        return generation

    def tell(self, genomes: Genome, scores: Scores) -> None:
        self._best.offer(genomes, self._problem.ranking.means(scores))
        optimizer, moves = self._told_of.popleft()
        if optimizer is self._optimizer:
            optimizer.tell(genomes[:, moves], scores)
        else:  # of a stage that is over
            self._problem.ranking.observe(scores)
