"""CMA-ES (Hansen 2016, arXiv:1604.00772) by pycma, on genes scaled by their steps; categorical and integer genes are
relaxed to real numbers.

pycma draws from a private generator, so a replay of the told scores proposes the same genomes bit for bit. When pycma's
criteria say that it has stalled, it starts again from the best candidate told, with twice the population.
"""

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.config.running import OptimizerConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.pending import Pending
from evomerge.optimizers.ranking import Incumbent
from evomerge.optimizers.relaxation import Relaxation
from evomerge.quiet import quiet
from evomerge.spaces import Genome

_MARGIN = 0.02  # share of the box between start and bounds; a start at a bound puts half of a generation on it


class CmaEs:
    """One CMA-ES over all objectives, ranked by `Problem.ranking`."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._config, self._problem = config, problem
        self._relaxed = Relaxation(problem.genes)
        self._population, self._restarts = config.population, 0
        self._ranked: deque[tuple[list[NDArray[np.float64]], list[float]]] = deque()
        self._best = Incumbent(problem.start)
        self._pending: Pending[tuple[Any, NDArray[np.float64]]] = Pending()
        self._arrived: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        self._strategy = self._start(problem.start)

    def _start(self, start: Genome) -> Any:
        with quiet():
            import cma

        low, high, scale = self._relaxed.low, self._relaxed.high, self._relaxed.scale
        margin = _MARGIN * (high - low)
        inside = np.clip(self._relaxed.points(start), low + margin, high - margin)
        options = {
            "bounds": [low / scale, high / scale],
            "popsize": self._population,
            "CMA_diagonal": self._config.covariance == "diagonal",
            "CMA_mirrors": 0,
            "seed": np.nan,
            "randn": _PrivateNormals(self._problem.seed, self._restarts),
            "verbose": -9,
            # accuracies are quantized, so plateaus are ordinary and no reason to stop
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": 10**6,
            "tolstagnation": 10**6,
            "tolx": 1e-2,
        }
        with quiet():
            return cma.CMAEvolutionStrategy(inside / scale, 1.0, options)

    def ask(self) -> Genome:
        """The next generation (see `Optimizer`)."""
        if self._ranked:  # not in `tell`, since pycma learns from one population between two asks
            solutions, losses = self._ranked.popleft()
            with quiet():
                self._strategy.tell(solutions, losses)
        if self._config.restarts and self._strategy.stop():
            self._restart()
        solutions = self._strategy.ask()
        genomes = self._relaxed.genomes(np.stack(solutions) * self._relaxed.scale)
        self._pending.add(genomes, [(self._strategy, solution) for solution in solutions])
        return genomes

    def _restart(self) -> None:
        self._observe([scores for _, scores in self._arrived])
        self._arrived.clear()
        self._ranked.clear()
        self._restarts += 1
        self._population *= 2
        self._strategy = self._start(self._best.genome)

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes scores in any order (see `Optimizer`); pycma learns from as many as a population has."""
        self._best.offer(genomes, self._problem.ranking.means(scores))
        late = []
        for (strategy, solution), row in zip(self._pending.take(genomes), scores, strict=True):
            if strategy is self._strategy:
                self._arrived.append((solution, row))
            else:  # a restart has replaced this strategy, so it has nothing to learn any more
                late.append(row)
        self._observe(late)
        while len(self._arrived) >= self._population:
            batch, self._arrived = self._arrived[: self._population], self._arrived[self._population :]
            told = np.stack([row for _, row in batch])
            losses = self._problem.ranking.losses(told).tolist()
            self._ranked.append(([solution for solution, _ in batch], losses))
            self._problem.ranking.observe(told)

    def _observe(self, rows: list[NDArray[np.float64]]) -> None:
        if rows:
            self._problem.ranking.observe(np.stack(rows))


class _PrivateNormals:
    """The `randn` that pycma calls, drawing from a generator of its own."""

    def __init__(self, seed: int, restart: int) -> None:
        self._generator = np.random.RandomState(np.random.SeedSequence([seed, restart]).generate_state(4))

    def __call__(self, *shape: int) -> Any:
        return self._generator.randn(*shape)
